"""Finds the head of a published reward model from its weights, under whatever name it has.

transformers calls a decoder's head `score`; OpenRLHF `value_head`, TRL and LLaMA-Factory
`v_head.summary`, UltraRM `regression_head`. Configs often say nothing of the number of labels,
which is then taken for 2; the weights say how many rows there are.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from huggingface_hub import get_safetensors_metadata
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from training.errors import UserError
from training.models.pretrained import UNREADABLE, Pretrained

SCORE = "score"


@dataclass(frozen=True)
class StoredHead:
    """A linear head as it is stored.

    name    of its layer in the weights
    rows    the number of labels
    weights the stored names of its weight and, if it has one, its bias, with their files
    """

    name: str
    rows: int
    weights: dict[str, str]

    @property
    def is_read_by_transformers(self) -> bool:
        return set(self.weights) == {f"{SCORE}.weight"}

    def read(self, pretrained: Pretrained, like: Tensor) -> nn.Linear:
        """The layer, with the type and place of `like`.

        Raises:
            UserError: the file cannot be read.
        """
        weight = self._tensor("weight", pretrained, like)
        bias = self._tensor("bias", pretrained, like)
        assert weight is not None
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        layer.weight = nn.Parameter(weight)
        if bias is not None:
            layer.bias = nn.Parameter(bias)
        return layer

    def _tensor(self, part: str, pretrained: Pretrained, like: Tensor) -> Tensor | None:
        name = f"{self.name}.{part}"
        if name not in self.weights:
            return None
        try:
            path = cached_file(pretrained.name_or_path, self.weights[name])
            with safe_open(path, "pt") as file:
                found: Tensor = file.get_tensor(name)
        except (*UNREADABLE, SafetensorError) as error:
            raise UserError(f"{name} of {pretrained} cannot be read: {error}") from error
        return found.to(like)


@lru_cache(maxsize=16)  # of one model that is asked for by the checks and by its loading
def stored_head(pretrained: Pretrained) -> StoredHead | None:
    """The linear head that is stored with the model; None if there is none or it is not known.

    It is the layer that the architecture has, or the only other one with a single row.
    """
    stored = stored_weights(pretrained)
    hidden = getattr(pretrained.config.get_text_config(), "hidden_size", None)
    if not stored:
        return None
    own, decoder = _own_names(pretrained)
    names = [own]
    if f"{own}.weight" not in stored:
        names = [
            name.removesuffix(".weight")
            for name, (shape, _) in stored.items()
            if shape == (1, hidden)
            and name.endswith(".weight")
            and not name.startswith(decoder)
            and "embed" not in name  # embeddings may have a single row too
        ]
    if len(names) != 1:
        return None
    parts = [f"{names[0]}.{part}" for part in ("weight", "bias")]
    return StoredHead(
        name=names[0],
        rows=stored[parts[0]][0][0],
        weights={part: stored[part][1] for part in parts if part in stored},
    )


def _own_names(pretrained: Pretrained) -> tuple[str, str]:
    """Where the architecture itself has its head, and how the names of its decoder begin."""
    try:
        model = pretrained.on_meta(pretrained.classifier)
    except UserError:  # the role's own check says so
        return SCORE, "model."
    return head_name(model) or SCORE, f"{model.base_model_prefix}."


def head_name(model: PreTrainedModel) -> str | None:
    """The last linear layer outside the base model with a row for each label."""
    inside = set(model.base_model.modules()) if model.base_model is not model else set()
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == model.config.num_labels
        and module not in inside
    ]
    return found[-1] if found else None


def stored_weights(pretrained: Pretrained) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and file of every stored weight, from the files' headers alone; {} if not known."""
    directory = Path(pretrained.name_or_path)
    try:
        if directory.is_dir():
            return _local(directory)
        if "gguf_file" in pretrained.location:
            return {}
        files = get_safetensors_metadata(pretrained.name_or_path).files_metadata
    except Exception:  # no network, no such model: whatever loads it says so
        return {}
    return {
        name: (tuple(info.shape), file)
        for file, content in files.items()
        for name, info in content.tensors.items()
    }


def _local(directory: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dictionary
                found[name] = tuple(file.get_slice(name).get_shape()), path.name
    return found


def other_shapes(pretrained: Pretrained, build: type, config: PretrainedConfig) -> str:
    """The first weight that has another shape than the config asks for; "" if there is none."""
    stored = stored_weights(pretrained)
    try:
        model = pretrained.on_meta(build, config)
    except UserError:
        return ""
    for name, value in model.state_dict().items():
        shape = tuple(value.shape)
        if name in stored and stored[name][0] != shape:
            return f"{name} is {list(stored[name][0])}, and config.json says {list(shape)}"
    return ""


def label_weights(pretrained: Pretrained, labels: int) -> Tensor | None:
    """[labels]: the weight of each label in the reward; None without `labels` in the settings.

    Raises:
        UserError: there is no such label, or several and no weights for them.
    """
    names = {str(number): number for number in range(labels)}
    stated = getattr(pretrained.config, "id2label", None) or {}
    if len(stated) == labels:
        names |= {str(name): int(number) for number, name in stated.items()}
    known = ", ".join(list(names)[-labels:])
    if not pretrained.labels:
        if labels != 1:
            raise UserError(
                f"{pretrained} has {labels} labels; a reward model has one (num_labels=1), or "
                f"reward.labels says how its labels add up: a weight for some of {known}"
            )
        return None
    if unknown := [name for name in pretrained.labels if name not in names]:
        raise UserError(f"reward.labels: {pretrained} has no label {unknown[0]!r}; it has {known}")
    weights = torch.zeros(labels)
    for name, weight in pretrained.labels.items():
        weights[names[name]] += weight
    return weights


def weighted(head: nn.Linear, weights: Tensor) -> nn.Linear:
    """The head with one row that gives Σ_k weights_k · (row k of `head`)."""
    one = nn.Linear(head.in_features, 1, bias=head.bias is not None)
    with torch.no_grad():
        one.weight = nn.Parameter((weights @ head.weight.float())[None].to(head.weight))
        if head.bias is not None:
            one.bias = nn.Parameter((weights @ head.bias.float())[None].to(head.bias))
    return one
