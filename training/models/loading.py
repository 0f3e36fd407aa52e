"""Models and tokenizers from disk or Hub, checked, whole, ready to be trained or asked."""

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from training.errors import UserError
from training.models.lora import add_adapter
from training.models.packing import refuse_unpackable
from training.models.policy import Policy
from training.models.pretrained import (
    UNREADABLE,
    _source,
    check_head,
    check_policy_config,
    check_scalar_config,
    has_linear_score,
    load_model_config,
)
from training.models.scalar import Classifier, Float32Head, ScalarModel
from training.runtime.faults import remedy
from training.runtime.tracking import say
from training.stage_config import LoraSettings

DROPOUT_FIELDS = (
    "dropout attention_dropout hidden_dropout activation_dropout embd_pdrop attn_pdrop resid_pdrop "
    "hidden_dropout_prob attention_probs_dropout_prob layerdrop classifier_dropout"
).split()


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
