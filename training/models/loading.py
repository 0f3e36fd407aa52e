"""Load models from disk or the Hub: checked, complete, ready to be trained or to score."""

import copy

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
from training.models.checks import check_head, check_policy, check_scalar
from training.models.lora import add_adapter
from training.models.options import PLAIN, LoadOptions
from training.models.packing import refuse_unpackable
from training.models.policy import Policy
from training.models.pretrained import UNREADABLE, Pretrained
from training.models.scalar import Classifier, Float32Head, ScalarModel
from training.runtime.faults import remedy
from training.runtime.tracking import say

DROPOUT_FIELDS = (
    "dropout attention_dropout hidden_dropout activation_dropout embd_pdrop attn_pdrop resid_pdrop "
    "hidden_dropout_prob attention_probs_dropout_prob layerdrop classifier_dropout"
).split()


def load_policy(
    pretrained: Pretrained,
    tokenizer: PreTrainedTokenizerBase,
    options: LoadOptions = PLAIN,
) -> Policy:
    """Load a causal language model as a Policy, with an embedding for the tokenizer's pad token.

    Raises:
        UserError: it is not a causal language model, lacks weights, or cannot be packed.
    """
    check_policy(pretrained)
    if options.packing:
        refuse_unpackable(pretrained.config, str(pretrained))
    model = _load(AutoModelForCausalLM, pretrained, pretrained.config, options)
    return Policy(_ready(model, tokenizer, options), options.packing)


def load_scalar_model(
    pretrained: Pretrained,
    tokenizer: PreTrainedTokenizerBase,
    options: LoadOptions = PLAIN,
    new_head: bool = False,
) -> ScalarModel:
    """Load a sequence-classification model with one label and a linear head.

    Args:
        new_head: also accept a causal language model, and give it a head of zeros.

    Raises:
        UserError: it has several labels, or has no trained head and `new_head` is false.
    """
    trained = check_scalar(pretrained, new_head)
    if options.packing:
        refuse_unpackable(pretrained.config, str(pretrained))
    model = _load(
        AutoModelForSequenceClassification,
        pretrained,
        _with_one_label(pretrained.config),
        options,
        new=() if trained else ("score.weight",),
    )
    check_head(model, str(pretrained))
    if not trained:
        # A random head would start with arbitrary preferences; 0 means p(y1 ≻ y2) = 1/2.
        nn.init.zeros_(model.score.weight)
    return ScalarModel(_ready(model, tokenizer, options), options.packing)


def load_reward_model(pretrained: Pretrained, options: LoadOptions) -> ScalarModel | Classifier:
    """Load a trained sequence-classification model with one label and any kind of head.

    Args:
        options: packing applies only to models with a linear head; others compute padded rows.

    Raises:
        UserError: it has no trained head, has several labels, or cannot be packed.
    """
    check_scalar(pretrained, new_head=False)
    if pretrained.has_linear_score:
        return load_scalar_model(pretrained, pretrained.tokenizer, options)
    model = _load(
        AutoModelForSequenceClassification,
        pretrained,
        _with_one_label(pretrained.config),
        options,
    )
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module.out_features == 1:
            model.set_submodule(name, Float32Head.like(module))
    return Classifier(_ready(model, pretrained.tokenizer, options))


def _with_one_label(config: PretrainedConfig) -> PretrainedConfig:
    config = copy.deepcopy(config)
    config.num_labels = 1
    return config


def _load(
    auto_class: type,
    pretrained: Pretrained,
    config: PretrainedConfig,
    options: LoadOptions,
    new: tuple[str, ...] = (),
) -> PreTrainedModel:
    """Load the model with all of its weights, except those that `new` names."""
    config = copy.deepcopy(config)
    if not options.dropout:
        for field in DROPOUT_FIELDS:
            if isinstance(getattr(config, field, None), float):
                setattr(config, field, 0.0)
    gguf = "gguf_file" in pretrained.location
    verbosity = transformers_logging.get_verbosity()
    # Silences the warning about a missing classification head, which load_scalar_model sets to 0.
    transformers_logging.set_verbosity_error()
    try:
        model, found = auto_class.from_pretrained(  # type: ignore[attr-defined]  # an Auto class
            **pretrained.location,
            **({"quantization_config": GgufConfig(dequantize=True)} if gguf else {}),
            config=config,
            dtype=options.dtype,
            use_safetensors=True,  # nothing pickled is ever loaded
            trust_remote_code=pretrained.trust_remote_code,
            output_loading_info=True,
        )
    except (*UNREADABLE, SafetensorError, RuntimeError) as error:
        if remedy(error):  # a lack of memory is not the model's fault
            raise
        raise UserError(f"no model could be loaded from {pretrained}: {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if missing := sorted(set(found["missing_keys"]) - set(new)):
        raise UserError(
            f"{pretrained} lacks weights, which would be random: {', '.join(missing[:5])}"
            + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        )
    # A scalar model that starts from a language model drops the language model's head.
    unexpected = sorted(set(found["unexpected_keys"]) - {"lm_head.weight"})
    if unexpected:
        names = ", ".join(unexpected[:5]) + (" …" if len(unexpected) > 5 else "")
        say(f"{pretrained}: {len(unexpected)} weights have no place in the model: {names}")
    if gguf and hasattr(model, "hf_quantizer"):  # the weights are plain now and can be saved
        model.hf_quantizer.remove_quantization_config(model)
    if not options.dropout:  # whatever name the config gives it
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    loaded: PreTrainedModel = model
    return loaded


def _ready(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: LoadOptions
) -> PreTrainedModel:
    """Give the model a pad token embedding, a float32 head and, if asked for, an adapter."""
    known = model.get_input_embeddings().num_embeddings
    if known < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        # Not random: actor, reference and the replicas on all ranks must be the same model.
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:
                layer.weight.data[known:] = layer.weight.data[:known].mean(0)
    model.config.pad_token_id = tokenizer.pad_token_id
    # The embedding at padding_idx gets no gradient; in a model with pad = EOS that would be EOS.
    model.get_input_embeddings().padding_idx = tokenizer.pad_token_id
    if isinstance(getattr(model, "score", None), nn.Linear):
        model.score = Float32Head.like(model.score)
    if options.lora is not None:
        add_adapter(model, options.lora)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model
