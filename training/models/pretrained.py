"""What a model's files say of it, and what is wrong with it, before its weights are loaded."""

import struct
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from training.errors import UserError

RESPONSE_END = "response_end"
"""In a reward model's config.json: what it learned to see after a whole response."""


UNREADABLE = (OSError, ValueError, KeyError, struct.error)
"""What transformers raises for a model that is missing, of another kind, or cut off."""


def _source(name_or_path: str) -> dict[str, str]:
    """Where `from_pretrained` looks: a Hub name, a directory, or one GGUF file."""
    path = Path(name_or_path)
    if path.suffix != ".gguf":
        return {"pretrained_model_name_or_path": name_or_path}
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def ends_with_eos(config: PretrainedConfig) -> bool:
    """Whether stage 2 made the reward model, of responses that end with EOS and nothing else."""
    return getattr(config, RESPONSE_END, None) == "eos"


def load_model_config(name_or_path: str, trust_remote_code: bool = False) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(
            **_source(name_or_path), trust_remote_code=trust_remote_code
        )
    except UNREADABLE as error:
        raise UserError(f"no model config could be loaded from {name_or_path}: {error}") from error


def check_positions(
    name_or_path: str, needs: dict[str, int], trust_remote_code: bool = False
) -> None:
    """Refuse lengths for which the model has no positions, before its weights are loaded.

    Args:
        needs: the longest sequences in tokens, by the settings that allow them.
    """
    config = load_model_config(name_or_path, trust_remote_code)
    known = getattr(config, "max_position_embeddings", None)
    faults = [f"{what} is {need} tokens" for what, need in needs.items() if known and need > known]
    if faults:
        raise UserError(faults, f"{name_or_path} knows {known} positions:")


def check_scalar_config(config: PretrainedConfig, name_or_path: str, new_head: bool) -> bool:
    """Whether the model has a trained head; a UserError where it cannot be a scalar model."""
    trained = any("SequenceClassification" in name for name in config.architectures or [])
    if trained and config.num_labels != 1:
        raise UserError(
            f"{name_or_path} has {config.num_labels} labels; a reward model has one (num_labels=1)"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name_or_path} is an encoder-decoder; reward models read one sequence")
    if not trained and not new_head:
        raise UserError(
            f"{name_or_path} is not a sequence-classification model, so its rewards would be "
            "arbitrary; stage 2 makes one from it"
        )
    return trained


def check_head(model: PreTrainedModel, name_or_path: str) -> None:
    """Refuse a classification model whose scalar is not a linear function of its last states."""
    if not _has_linear_score(model):
        raise UserError(f"{name_or_path}: {type(model).__name__} has no linear head named 'score'")


def has_linear_score(config: PretrainedConfig, trust_remote_code: bool = False) -> bool:
    """Whether the classification model has a value after every token, as a critic needs."""
    return _has_linear_score(on_meta(AutoModelForSequenceClassification, config, trust_remote_code))


def _has_linear_score(model: PreTrainedModel) -> bool:
    return isinstance(getattr(model, "score", None), nn.Linear)


def on_meta(
    build: type, config: PretrainedConfig, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model of Auto class `build` without any weights.

    Raises:
        UserError: transformers has no such model of this architecture.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = build.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise UserError(f"a {config.model_type} model has no {build.__name__}: {error}") from error
    return model


def check_policy_config(config: PretrainedConfig, name_or_path: str) -> None:
    """Refuse what is no causal language model with log-probabilities of `head(hidden)`.

    Raises:
        UserError: a sequence-classification model, or one that rescales its logits.
    """
    if any("SequenceClassification" in name for name in config.architectures or []):
        raise UserError(f"{name_or_path} is a sequence-classification model, not a language model")
    for field in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, field, None) not in (None, 1, 1.0):
            raise UserError(f"{name_or_path}: models with {field} are not supported")
