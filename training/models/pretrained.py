"""A pretrained model by name or path, before its weights are loaded."""

import copy
import struct
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from training.errors import UserError

PAD_TOKEN = "<pad>"
RESPONSE_END = "response_end"
"""Key in a reward model's config.json: what the model learned to see after a whole response."""
UNREADABLE = (OSError, ValueError, KeyError, struct.error)
"""What transformers raises for a model that is missing, of another kind, or truncated."""


class Pretrained:
    """A Hub name, a Hugging Face directory or a GGUF file.

    Its config and its tokenizer are read when they are first needed, and only once.
    """

    def __init__(
        self,
        name_or_path: str,
        trust_remote_code: bool = False,
        scores_only: bool = False,
        config: PretrainedConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """
        Args:
            scores_only: the model never ends a response itself, so a tokenizer that joins two texts
                with its own tokens (`reads_pairs`) may lack an EOS token.
            config, tokenizer: given where they have been read already.
        """
        self.name_or_path = name_or_path
        self.trust_remote_code = trust_remote_code
        self.scores_only = scores_only
        if config is not None:
            self.config = config
        if tokenizer is not None:
            self.tokenizer = tokenizer

    def __str__(self) -> str:
        return self.name_or_path

    @property
    def location(self) -> dict[str, str]:
        """Where `from_pretrained` looks for it, as keyword arguments."""
        path = Path(self.name_or_path)
        if path.suffix != ".gguf":
            return {"pretrained_model_name_or_path": self.name_or_path}
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's config as it stands on disk.

        Raises:
            UserError: there is none, or transformers cannot read it.
        """
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(
                **self.location, trust_remote_code=self.trust_remote_code
            )
        except UNREADABLE as error:
            raise UserError(f"no model config could be loaded from {self}: {error}") from error
        return config

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer with a pad token that is never its EOS token.

        A model whose pad token is its EOS masks EOS out of every loss and never learns to stop.
        Where there is no separate pad token, `<pad>` is added (`load_policy` grows the embeddings).

        Raises:
            UserError: there is no tokenizer, or it cannot end a response.
        """
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                **self.location, trust_remote_code=self.trust_remote_code
            )
        except UNREADABLE as error:
            raise UserError(f"no tokenizer could be loaded from {self}: {error}") from error
        if tokenizer.eos_token_id is None and not (self.scores_only and reads_pairs(tokenizer)):
            raise UserError(f"the tokenizer of {self} has no EOS token; responses need an end")
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
            tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
        return tokenizer

    @property
    def learned_end(self) -> int | None:
        """What stage 2 put after whole responses when it trained this reward model.

        None where stage 2 did not train it.
        """
        name = getattr(self.config, RESPONSE_END, None)
        if name is None:
            return None
        end: int = (
            self.tokenizer.eos_token_id
            if name == "eos"
            else self.tokenizer.convert_tokens_to_ids(name)
        )
        return end

    @cached_property
    def has_linear_score(self) -> bool:
        """Whether the classification model has a value after every token, as a critic needs."""
        return has_linear_score(self.on_meta(AutoModelForSequenceClassification))

    def on_meta(self, build: type, config: PretrainedConfig | None = None) -> PreTrainedModel:
        """The model of Auto class `build` without any weights.

        Args:
            config: in place of the model's own.

        Raises:
            UserError: transformers has no such model of this architecture.
        """
        config = copy.deepcopy(self.config) if config is None else config
        try:
            with torch.device("meta"):
                model: PreTrainedModel = build.from_config(  # type: ignore[attr-defined]  # Auto class
                    config, trust_remote_code=self.trust_remote_code
                )
        except ValueError as error:
            raise UserError(
                f"a {config.model_type} model has no {build.__name__}: {error}"
            ) from error
        return model


def reads_pairs(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it joins two texts as BERT does: [CLS] prompt [SEP] response [SEP]."""
    return tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None


def has_linear_score(model: PreTrainedModel) -> bool:
    """Whether the scalar is a linear function, named `score`, of the last hidden states."""
    return isinstance(getattr(model, "score", None), nn.Linear)
