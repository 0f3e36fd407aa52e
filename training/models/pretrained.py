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

from training.data.chat_template import ChatTemplate
from training.errors import UserError

PAD_TOKEN = "<pad>"
RESPONSE_END = "response_end"
"""Key in a reward model's config.json: what followed complete responses in its training."""
LINK = "preference_link"
"""Key in a reward model's config.json: the link g of the preferences that it learned (§3.4)."""
UNREADABLE = (OSError, ValueError, KeyError, struct.error)
"""What transformers raises for a model that is missing, truncated or of another kind."""


class Pretrained:
    """A Hub name, a Hugging Face directory or a GGUF file.

    The config and the tokenizer are read when first needed, and only once.
    """

    def __init__(
        self,
        name_or_path: str,
        trust_remote_code: bool = False,
        scores_only: bool = False,
        config: PretrainedConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        template: ChatTemplate | None = None,
    ) -> None:
        """
        Args:
            scores_only: the model never generates, so its tokenizer may lack an EOS token if it
                joins two texts with its own tokens (`reads_pairs`).
            config, tokenizer: these objects, if they have been read already.
            template: the chat template to give to the tokenizer that is read.
        """
        self.name_or_path = name_or_path
        self.trust_remote_code = trust_remote_code
        self.scores_only = scores_only
        self.template = template or ChatTemplate()
        if config is not None:
            self.config = config
        if tokenizer is not None:
            self.tokenizer = tokenizer

    def __str__(self) -> str:
        return self.name_or_path

    @property
    def location(self) -> dict[str, str]:
        """The keyword arguments with which `from_pretrained` finds the model."""
        path = Path(self.name_or_path)
        if path.suffix != ".gguf":
            return {"pretrained_model_name_or_path": self.name_or_path}
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's config as it is on disk.

        Raises:
            UserError: there is no config, or transformers cannot read it.
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
        """The model's tokenizer, with a pad token that differs from its EOS token.

        If the pad token were EOS, EOS would be masked out of every loss and the model would never
        learn to stop. If there is no separate pad token, `<pad>` is added (`load_policy` grows the
        embeddings).

        Raises:
            UserError: there is no tokenizer, it has no EOS token, or the template is faulty.
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
        self.template.apply(tokenizer, str(self))
        return tokenizer

    @property
    def learned_end(self) -> int | None:
        """The token with which stage 2 ended the responses that this reward model learned.

        None if stage 2 did not train it.
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

    @property
    def learned_link(self) -> str | None:
        """The link g with which stage 2 trained this reward model.

        None if stage 2 did not train it.
        """
        # Before there were others, stage 2 trained with the exponential link and did not say so.
        known = "exponential" if hasattr(self.config, RESPONSE_END) else None
        link: str | None = getattr(self.config, LINK, known)
        return link

    @cached_property
    def has_linear_score(self) -> bool:
        """Whether the classification model gives a value after every token, as a critic must."""
        return has_linear_score(self.on_meta(AutoModelForSequenceClassification))

    def on_meta(self, build: type, config: PretrainedConfig | None = None) -> PreTrainedModel:
        """Build the model with the Auto class `build`, without any weights.

        Args:
            config: used in place of the model's own config.

        Raises:
            UserError: transformers has no such model for this architecture.
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
    """Whether the tokenizer joins two texts as BERT does: [CLS] prompt [SEP] response [SEP]."""
    return tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None


def has_linear_score(model: PreTrainedModel) -> bool:
    """Whether a linear layer named `score` computes the scalar from the last hidden states."""
    return isinstance(getattr(model, "score", None), nn.Linear)
