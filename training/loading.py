"""Models and tokenizers from disk or Hub, checked, whole, ready to be trained or asked."""

import struct
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from training.errors import UserError
from training.faults import remedy
from training.lora import add_adapter
from training.models import Classifier, Float32Head, Policy, ScalarModel
from training.packing import refuse_unpackable
from training.stage_config import LoraSettings
from training.tracking import say

PAD_TOKEN = "<pad>"
RESPONSE_END = "response_end"
"""In a reward model's config.json: what it learned to see after a whole response."""
UNREADABLE = (OSError, ValueError, KeyError, struct.error)
"""What transformers raises for a model that is missing, of another kind, or cut off."""
DROPOUT_FIELDS = (
    "dropout attention_dropout hidden_dropout activation_dropout embd_pdrop attn_pdrop resid_pdrop "
    "hidden_dropout_prob attention_probs_dropout_prob layerdrop classifier_dropout"
).split()


def _source(name_or_path: str) -> dict[str, str]:
    """Where `from_pretrained` looks: a Hub name, a directory, or one GGUF file."""
    path = Path(name_or_path)
    if path.suffix != ".gguf":
        return {"pretrained_model_name_or_path": name_or_path}
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def load_tokenizer(
    name_or_path: str, trust_remote_code: bool = False, of_pairs: bool = False
) -> PreTrainedTokenizerBase:
    """The model's tokenizer with a pad token that is never its EOS.

    A model whose pad is its EOS masks EOS out of every loss and never learns to stop; where there
    is no pad token of its own, `<pad>` is added (the embeddings grow in `load_policy`).

    Args:
        of_pairs: one that joins two texts by tokens of its own (`reads_pairs`) needs no EOS.

    Raises:
        UserError: there is none, or it cannot end a response.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            **_source(name_or_path), trust_remote_code=trust_remote_code
        )
    except UNREADABLE as error:
        raise UserError(f"no tokenizer could be loaded from {name_or_path}: {error}") from error
    if tokenizer.eos_token_id is None and not (of_pairs and reads_pairs(tokenizer)):
        raise UserError(f"the tokenizer of {name_or_path} has no EOS token; responses need an end")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer


def reads_pairs(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether two texts are read as BERT and its kin do: [CLS] prompt [SEP] response [SEP]."""
    return tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None


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


def require_same_tokens(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    setting: str,
    policy: str,
    trust_remote_code: bool = False,
) -> set[str]:
    """Refuse a model that would read the policy's token ids as other words.

    Special tokens (reserved ones, padding) may have other names, since the same ids reach both
    models; BOS, EOS and tokens that both know may not be elsewhere.

    Args:
        tokenizer: the policy's; `policy` is its name for the message.
        setting: that names the model.

    Returns:
        The policy's tokens that the model has under another name or not at all.

    Raises:
        UserError: for other words.
    """
    other = load_tokenizer(path, trust_remote_code)
    own, known = tokenizer.get_vocab(), other.get_vocab()
    differing = {token for token, _ in own.items() ^ known.items()}
    words = differing - (_special(tokenizer) | _special(other))
    # The same word in another place; padding is never looked at.
    words |= (differing & own.keys() & known.keys()) - {tokenizer.pad_token, other.pad_token}
    ends = [(t.bos_token_id, t.eos_token_id) for t in (tokenizer, other)]
    if words or ends[0] != ends[1]:
        example = f"; {sorted(words)[0]!r} is one difference" if words else ": its BOS or EOS"
        raise UserError(f"{setting}: {path} has another vocabulary than {policy}{example}")
    return differing & own.keys()


def _special(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def load_policy(
    name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype = torch.float32,
    dropout: bool = False,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    packing: bool = False,
    lora: LoraSettings | None = None,
) -> Policy:
    """A causal language model as a Policy, its embeddings grown to hold the tokenizer's pad token.

    Args:
        dropout: keep the model's own dropout; off wherever log-probabilities must be reproducible.
        packing: compute several short sequences in one row.
        lora: train an adapter of this kind and nothing else.
    """
    config = load_model_config(name_or_path, trust_remote_code)
    check_policy_config(config, name_or_path)
    if packing:
        refuse_unpackable(config, name_or_path)
    model = _load(AutoModelForCausalLM, name_or_path, config, dtype, dropout, trust_remote_code)
    return Policy(_ready(model, tokenizer, gradient_checkpointing, lora), packing)


def load_scalar_model(
    name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype = torch.float32,
    dropout: bool = False,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    new_head: bool = False,
    packing: bool = False,
    lora: LoraSettings | None = None,
) -> ScalarModel:
    """A one-label sequence-classification model.

    Args:
        new_head: take a causal language model as well and give it a head, at 0.
        packing: compute several short sequences in one row.
        lora: train an adapter of this kind, and the head.

    Raises:
        UserError: another number of labels, or no trained head where `new_head` is false.
    """
    config = load_model_config(name_or_path, trust_remote_code)
    trained = check_scalar_config(config, name_or_path, new_head)
    if packing:
        refuse_unpackable(config, name_or_path)
    config.num_labels = 1
    model = _load(
        AutoModelForSequenceClassification,
        name_or_path,
        config,
        dtype,
        dropout,
        trust_remote_code,
        new=() if trained else ("score.weight",),
    )
    check_head(model, name_or_path)
    if not trained:
        # A random head would start from arbitrary preferences; 0 says p(y1 ≻ y2) = 1/2.
        nn.init.zeros_(model.score.weight)
    return ScalarModel(_ready(model, tokenizer, gradient_checkpointing, lora), packing)


def load_reward_model(
    name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    packing: bool = False,
) -> ScalarModel | Classifier:
    """A trained one-label sequence-classification model of any build, only to be asked.

    Args:
        packing: of models that can be trained; others compute padded rows.

    Raises:
        UserError: it has no trained head, another number of labels, or cannot be packed.
    """
    config = load_model_config(name_or_path, trust_remote_code)
    check_scalar_config(config, name_or_path, new_head=False)
    config.num_labels = 1
    if has_linear_score(config, trust_remote_code):
        return load_scalar_model(
            name_or_path, tokenizer, dtype, trust_remote_code=trust_remote_code, packing=packing
        )
    model = _load(
        AutoModelForSequenceClassification, name_or_path, config, dtype, False, trust_remote_code
    )
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module.out_features == 1:
            model.set_submodule(name, Float32Head.like(module))
    return Classifier(_ready(model, tokenizer, gradient_checkpointing=False, lora=None))


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


def _load(
    auto_class: type,
    name_or_path: str,
    config: PretrainedConfig,
    dtype: torch.dtype,
    dropout: bool,
    trust_remote_code: bool,
    new: tuple[str, ...] = (),
) -> PreTrainedModel:
    """The model with all of its weights from disk, but for those that `new` names."""
    if not dropout:
        for field in DROPOUT_FIELDS:
            if isinstance(getattr(config, field, None), float):
                setattr(config, field, 0.0)
    gguf = "gguf_file" in _source(name_or_path)
    verbosity = transformers_logging.get_verbosity()
    # A causal model's missing classification head is expected, and said in `load_scalar_model`.
    transformers_logging.set_verbosity_error()
    try:
        model, found = auto_class.from_pretrained(
            **_source(name_or_path),
            **({"quantization_config": GgufConfig(dequantize=True)} if gguf else {}),
            config=config,
            dtype=dtype,
            use_safetensors=True,  # nothing pickled is ever loaded
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (*UNREADABLE, SafetensorError, RuntimeError) as error:
        if remedy(error):  # memory, not the model
            raise
        raise UserError(f"no model could be loaded from {name_or_path}: {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if missing := sorted(set(found["missing_keys"]) - set(new)):
        raise UserError(
            f"{name_or_path} lacks weights, which would be random: {', '.join(missing[:5])}"
            + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        )
    # A scalar model that starts from a language model has no place for its head.
    unexpected = sorted(set(found["unexpected_keys"]) - {"lm_head.weight"})
    if unexpected:
        names = ", ".join(unexpected[:5]) + (" …" if len(unexpected) > 5 else "")
        say(f"{name_or_path}: {len(unexpected)} weights have no place in the model: {names}")
    if gguf and hasattr(model, "hf_quantizer"):  # plain weights now, which can be saved
        model.hf_quantizer.remove_quantization_config(model)
    if not dropout:  # also where a config names it in a way of its own
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return model


def _ready(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    gradient_checkpointing: bool,
    lora: LoraSettings | None,
) -> PreTrainedModel:
    known = model.get_input_embeddings().num_embeddings
    if known < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        # Not random: actor, reference and all ranks' copies must be the same model.
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:
                layer.weight.data[known:] = layer.weight.data[:known].mean(0)
    model.config.pad_token_id = tokenizer.pad_token_id
    # The padding row gets no gradient: left at a model's own pad = EOS, EOS would learn nothing.
    model.get_input_embeddings().padding_idx = tokenizer.pad_token_id
    if isinstance(getattr(model, "score", None), nn.Linear):
        model.score = Float32Head.like(model.score)
    if lora is not None:
        add_adapter(model, lora)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


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
