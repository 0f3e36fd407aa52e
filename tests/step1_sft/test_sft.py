"""SFT's loss: the response's cross-entropy, EOS included, equal to Hugging Face's own."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from step1_sft import main as sft
from step1_sft.config import SFTConfig
from step1_sft.main import ResponseModelling
from training.config import check_config
from training.data import FILLER, collate_texts, read_records, response_labels, tokenize
from training.fitting import held_out_splits
from training.models.loading import load_policy
from training.models.pretrained import Pretrained
from training.runtime.engine import TrainedModule, optimizer_step

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture
def task(stage_settings, world_tokenizer) -> ResponseModelling:
    config = check_config(SFTConfig, stage_settings("sft"), "config:")
    data = tokenize(read_records(config.data, "sft"), world_tokenizer, config.data, "sft")
    policy = load_policy(Pretrained(config.model_name_or_path), world_tokenizer)
    trained = TrainedModule(policy, config, config, 1)
    held_out = held_out_splits(data.eval, config.data)
    return ResponseModelling(trained, data.train, held_out, config, world_tokenizer.pad_token_id)


def own_losses(task: ResponseModelling, batch) -> torch.Tensor:
    """Per token, from the Hugging Face model and shifted labels."""
    logits = task.policy.module.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask
    ).logits
    labels = response_labels(batch)[:, 1:].reshape(-1)
    losses = cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="none")
    return losses[labels != -100]


@torch.no_grad()
def test_the_loss_is_hugging_faces_own(task: ResponseModelling) -> None:
    batch = task.collate([0, 1, 2, 3])
    own = own_losses(task, batch)
    assert task.items(batch) == len(own)
    assert task.loss_sum(batch).item() == pytest.approx(own.sum().item(), rel=1e-5)
    everything = batch.attention_mask[:, 1:].sum()
    assert len(own) < everything  # the prompt carries no loss


def test_eos_is_learned(task: ResponseModelling, world_tokenizer) -> None:
    """The label on EOS is there, and one gradient step makes EOS likelier."""
    eos = world_tokenizer.eos_token_id
    batch = task.collate([0, 1, 2, 3])
    labels = response_labels(batch)
    assert ((labels == eos).sum(-1) == 1).all()
    lasts = labels.gather(1, batch.last_positions[:, None])
    assert (lasts == eos).all()

    def eos_logp() -> torch.Tensor:
        scored = batch.response_mask & (batch.input_ids == eos)
        return task.policy(batch.input_ids, batch.attention_mask, scored)[0].sum().detach()

    before = eos_logp()
    optimizer_step([task.policy], [batch], lambda b: [task.loss_sum(b)], task.items)
    assert eos_logp() > before


def test_fillers_carry_no_loss(task: ResponseModelling) -> None:
    batch = task.collate([FILLER, FILLER])
    assert task.items(batch) == 0
    assert task.loss_sum(batch).item() == 0.0


@torch.no_grad()
def test_evaluation_is_a_mean_over_tokens(task: ResponseModelling) -> None:
    task.eval_batch_size = 3  # uneven batches
    assert sum(map(len, task.held_out.values())) == 8
    for split, data in task.held_out.items():
        batches = [collate_texts(data, [row], task.pad_token_id) for row in range(len(data))]
        losses = torch.cat([own_losses(task, batch) for batch in batches])
        found = task.evaluate(split)
        assert found[f"{split}/loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
        perplexity = math.exp(losses.mean().item())
        assert found[f"{split}/perplexity"] == pytest.approx(perplexity, rel=1e-4)


def test_the_stage_writes_its_contract(stage_settings) -> None:
    settings = stage_settings("sft") | {"max_steps": 2, "export_steps": 1}
    config = check_config(SFTConfig, settings, "config:")
    sft.main(config)
    output = Path(config.output_dir)
    assert {"config.json", "metrics.jsonl", "model"} <= {path.name for path in output.iterdir()}
    assert [path.name for path in (output / "exports").iterdir()] == ["step-00000001"]
    before, after = (
        load_file(place / "model.safetensors")
        for place in (output / "exports" / "step-00000001" / "model", output / "model")
    )
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in after)
    line = (output / "metrics.jsonl").read_text().splitlines()[-1]
    assert {"step", "train/loss", "validation/loss", "test/loss", "test/perplexity"} <= json.loads(
        line
    ).keys()
