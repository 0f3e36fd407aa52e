"""The reference's log-probabilities, computed once and kept in the output directory.

Training then needs no reference in memory, and a resumed run does not compute them again.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from step3_rlhf.direct.comparisons import Comparisons, RefLogps
from step3_rlhf.direct.config import DirectConfig
from step3_rlhf.loading import load_frozen_policy
from step3_rlhf.roles import Roles
from training import fitting
from training.data import FILLER, pad_sequences
from training.errors import UserError
from training.models.options import precision
from training.models.pretrained import Pretrained
from training.runtime import ranks
from training.runtime.tracking import say
from training.runtime.weights import weights_digest

FILE = "reference_logps.safetensors"
FINGERPRINT = "fingerprint"


def reference_logps(
    config: DirectConfig, roles: Roles, splits: Mapping[str, Comparisons]
) -> dict[str, RefLogps]:
    """Those of each split: from the output directory of a run that resumes, or computed.

    Raises:
        UserError: the run resumes, and its reference, precision or data have changed.
    """
    path = Path(config.output_dir) / FILE
    resumes = config.resume_from_checkpoint is not None
    found = read(path, fingerprint(config, roles.reference, splits)) if resumes else None
    if found is None:
        say(f"Scoring the compared responses with the reference, {roles.reference}, once")
        reference = load_frozen_policy(roles.reference, roles.policy.tokenizer, config)
        pad = roles.policy.tokenizer.pad_token_id
        size = config.per_device_eval_batch_size
        found = {split: score(reference, content, size, pad) for split, content in splits.items()}
    return {split: RefLogps(splits[split], values) for split, values in found.items()}


def keep(
    logps: Mapping[str, RefLogps],
    config: DirectConfig,
    model: Pretrained,
    splits: Mapping[str, Comparisons],
) -> None:
    """Write what `model` gave into the output directory unless it is there; rank 0 does."""
    path = Path(config.output_dir) / FILE
    if ranks.rank() == 0 and not path.exists():
        draft = path.with_suffix(".unfinished")
        content = {split: found.values for split, found in logps.items()}
        save_file(content, draft, {FINGERPRINT: fingerprint(config, model, splits)})
        os.replace(draft, path)
    ranks.barrier()


def read(path: Path, wanted: str) -> dict[str, Tensor] | None:
    """What `keep` wrote; None if there is nothing.

    Raises:
        UserError: it is of another reference, precision or data.
    """
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        if (file.metadata() or {}).get(FINGERPRINT) != wanted:
            raise UserError(
                f"{path} is of another reference, precision or data than there are now: the run "
                "would go on towards another optimum. Give it back what it started with, or start "
                "anew with overwrite_output_dir=true instead of resume_from_checkpoint"
            )
        return {split: file.get_tensor(split) for split in file.keys()}  # noqa: SIM118


def fingerprint(
    config: DirectConfig, reference: Pretrained, splits: Mapping[str, Comparisons]
) -> str:
    """A hash of the reference's weights, of their type and of all token ids that it scores.

    A model of the Hub is known by its name.
    """
    name = reference.name_or_path
    digest = hashlib.sha256((weights_digest(Path(name)) or name).encode())
    digest.update(f"\n{precision(config)}".encode())
    for split, comparisons in sorted(splits.items()):
        digest.update(f"\n{split} {len(comparisons.sets)}\n".encode())
        for found in comparisons.sets:
            for ids in (found.prompt, *found.responses):
                digest.update(f"{len(ids)} ".encode() + ids.tobytes())
    return digest.hexdigest()


@torch.no_grad()
def score(reference: nn.Module, comparisons: Comparisons, batch_size: int, pad: int) -> Tensor:
    """[tokens] log π_ref of the tokens of all responses, set by set; the ranks share the work."""
    texts, longest = [], []
    for compared in comparisons.sets:
        texts += [(compared.prompt.tolist(), response.tolist()) for response in compared.responses]
        longest += [max(map(len, compared.responses))] * len(compared.responses)
    # Responses to one prompt stay together, since packing computes their prompt once.
    order = sorted(range(len(texts)), key=lambda row: len(texts[row][0]) + longest[row])
    scored: list[tuple[int, Tensor]] = []
    batches = fitting.evaluation_batches(len(texts), batch_size)
    for places in tqdm(batches, desc="reference", disable=ranks.rank() != 0, leave=False):
        rows = [order[place] for place in places if place != FILLER]
        prompts, responses = zip(*(texts[row] for row in rows or [0]), strict=True)
        batch = pad_sequences(prompts, responses, pad).to(ranks.device())
        logp, _ = reference(batch.input_ids, batch.attention_mask, batch.response_mask)
        parts = logp[batch.response_mask].float().cpu().split([len(ids) for ids in responses])
        scored += zip(rows, parts, strict=False)
    everywhere = sorted(ranks.gather_objects(scored), key=lambda entry: entry[0])
    return torch.cat([values for _, values in everywhere])
