"""A pretrained model by name or path, before its weights are loaded."""

import copy
import struct
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
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
UNREADABLE = (
    *(OSError, ValueError, LookupError, struct.error),
    *(AttributeError, TypeError, AssertionError, ArithmeticError),
)
"""What transformers raises for a model that is missing, truncated or of another kind, or whose
config.json has values that it does not expect."""


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
        labels: dict[str, float] | None = None,
    ) -> None:
        """
        Args:
            scores_only: the model never generates, so its tokenizer may lack an EOS token if it
                joins two texts with its own tokens (`reads_pairs`).
            labels: the weights of a classifier's labels in its reward, by their names.
            config, tokenizer: these objects, if they have been read already.
            template: the chat template to give to the tokenizer that is read.
        """
        self.name_or_path = name_or_path
        self.trust_remote_code = trust_remote_code
        self.scores_only = scores_only
        self.template = template or ChatTemplate()
        self.labels = labels or {}
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
        if Path(self.name_or_path, "adapter_config.json").is_file():
            # transformers would load the adapter's base model in place of any weights beside it.
            raise UserError(
                f"{self} holds an adapter (adapter_config.json); name a model into which it has "
                "been merged (merge_and_unload of peft)"
            )
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(
                **self.location, trust_remote_code=self.trust_remote_code
            )
        except UNREADABLE as error:
            raise UserError(f"no model config could be loaded from {self}: {error}") from error
        # The pad token is the tokenizer's; some configs name one beyond the embeddings.
        for part in (config, config.get_text_config()):
            pad, size = getattr(part, "pad_token_id", None), getattr(part, "vocab_size", None)
            if pad is not None and size is not None and not 0 <= pad < size:
                part.pad_token_id = None
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

    @property
    def brings_classifier(self) -> bool:
        """Whether code that comes with the model, and is trusted, makes its rewards (ArmoRM)."""
        return self.trust_remote_code and bool(self._own_classifiers)

    @property
    def _own_classifiers(self) -> list[str]:
        """The Auto classes for which code that comes with the model has a reward model."""
        built = [name.rpartition(".")[2] for name in self.config.architectures or []]
        own = getattr(self.config, "auto_map", None) or {}
        return [
            name
            for name in ("AutoModelForSequenceClassification", "AutoModel")
            if str(own.get(name, "")).rpartition(".")[2] in built
        ]

    @property
    def classifier(self) -> type:
        """The Auto class that builds the model as a classifier."""
        if self.brings_classifier and self._own_classifiers[0] == "AutoModel":
            return AutoModel
        return AutoModelForSequenceClassification

    @property
    def untrusted_code(self) -> str:
        """What to do about code that comes with the model and is not run; "" if there is none."""
        if not self._own_classifiers or self.trust_remote_code:
            return ""
        return "; it comes with code of its own, which trust_remote_code=true runs"

    @cached_property
    def has_linear_score(self) -> bool:
        """Whether the classification model gives a value after every token, as a critic must."""
        return has_linear_score(self.on_meta(self.classifier))

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
        except UNREADABLE as error:
            lacks = f"a {config.model_type} model has no {build.__name__}"
            known = isinstance(error, ValueError)
            what = lacks if known else f"no model can be built from the config of {self}"
            raise UserError(f"{what}: {error}") from error
        return model


def reads_pairs(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer joins two texts as BERT does: [CLS] prompt [SEP] response [SEP]."""
    return tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None


def has_linear_score(model: PreTrainedModel) -> bool:
    """Whether a linear layer named `score` computes the scalar from the last hidden states."""
    return isinstance(getattr(model, "score", None), nn.Linear)
