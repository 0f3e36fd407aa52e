"""Load models from disk or the Hub: checked, complete, ready to be trained or to score."""

import copy

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from training.errors import UserError
from training.models.checks import check_head, check_policy, check_scalar
from training.models.comparison import (
    Text,
    own_logits,
    require_own_draws,
    require_own_log_probs,
    require_own_rewards,
)
from training.models.families.float32_logits import Float32Logits
from training.models.families.score_head import (
    SCORE,
    StoredHead,
    head_name,
    label_weights,
    other_shapes,
    stored_head,
    weighted,
)
from training.models.families.vocabulary import absent_ids, ids_needed, named_tokens, response_ends
from training.models.lora import add_adapter
from training.models.options import PLAIN, LoadOptions
from training.models.packing import refuse_unpackable
from training.models.policy import Policy
from training.models.pretrained import UNREADABLE, Pretrained, has_linear_score
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
    ends: tuple[int, ...] | None = None,
) -> Policy:
    """Load a causal language model as a Policy, with an embedding for the tokenizer's pad token.

    Args:
        ends: the ids that end a response; None finds them. A reference gets the actor's.

    Raises:
        UserError: it is not a causal language model, lacks weights, cannot be packed, or gives
            other log-probabilities here than in its own forward.
    """
    check_policy(pretrained)
    if options.packing:
        refuse_unpackable(pretrained.config, str(pretrained))
    model = _load(AutoModelForCausalLM, pretrained, pretrained.config, options)
    return as_policy(model, str(pretrained), tokenizer, options, ends)


def as_policy(
    model: PreTrainedModel,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    options: LoadOptions = PLAIN,
    ends: tuple[int, ...] | None = None,
) -> Policy:
    """The same of a causal language model that has been read from disk.

    Args:
        name: the model's, for messages.
    """
    model = _ready(model, tokenizer, options)
    text = _text(model, tokenizer)
    own = own_logits(model, text.ids, name)
    if own.shape[-1] < ids_needed(tokenizer):
        raise UserError(
            f"{name} has logits for {own.shape[-1]} token ids, and its tokenizer has "
            f"{ids_needed(tokenizer)}"
        )
    absent = absent_ids(tokenizer, own.shape[-1])
    if ends is None:
        ends = response_ends(model, tokenizer, absent)
        _say_what_is_unusual(name, tokenizer, absent, ends)
    if model.generation_config is not None:  # exported with the model
        _keep_what_can_be_saved(model, name)
        model.generation_config.eos_token_id = list(ends) if len(ends) > 1 else ends[0]
    policy = Policy(model, options.packing, absent, ends)
    require_own_log_probs(policy, own, text, name, options.noise_is_wanted)
    require_own_draws(policy, own, text, name)
    return policy


def _keep_what_can_be_saved(model: PreTrainedModel, name: str) -> None:
    """Drop settings of generation that contradict one another: transformers refuses to save them.

    It would do so at the end of the run, when the trained model is exported.
    """
    own = model.generation_config
    try:
        own.validate(strict=True)
    except ValueError as error:
        first = str(error).splitlines()[0]
        say(f"{name}: its generation_config.json is left out of exports: {first}")
        model.generation_config = GenerationConfig(
            bos_token_id=own.bos_token_id, pad_token_id=own.pad_token_id
        )


def _say_what_is_unusual(
    name: str, tokenizer: PreTrainedTokenizerBase, absent: Tensor | None, ends: tuple[int, ...]
) -> None:
    if absent is not None:
        say(
            f"{name}: {int(absent.sum())} of its {len(absent)} token ids have no token; they are "
            "neither drawn nor scored"
        )
    if len(ends) > 1:
        first, *others = named_tokens(ends, tokenizer)
        say(
            f"{name}: a response ends with {first}, as in training data, or with "
            + " or ".join(others)
        )


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
    model = _load_classifier(pretrained, options, trained)
    check_head(model, str(pretrained))
    scalar = ScalarModel(_ready(model, tokenizer, options), options.packing)
    require_own_rewards(scalar, _text(model, tokenizer), str(pretrained), options.noise_is_wanted)
    if not trained:
        # A random head would start with arbitrary preferences; 0 means p(y1 ≻ y2) = 1/2.
        nn.init.zeros_(model.score.weight)
    return scalar


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
    model = _load_classifier(pretrained, options, trained=True)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module.out_features == 1:
            model.set_submodule(name, Float32Head.like(module))
    classifier = Classifier(_ready(model, pretrained.tokenizer, options))
    require_own_rewards(classifier, _text(model, pretrained.tokenizer), str(pretrained))
    return classifier


def _text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Text:
    return Text.of(tokenizer, getattr(model.config, "max_position_embeddings", None))


def _load_classifier(
    pretrained: Pretrained, options: LoadOptions, trained: bool
) -> PreTrainedModel:
    """Load a classification model, whose head then has one row.

    Args:
        trained: it has a head; otherwise `score` gets a new one.
    """
    if pretrained.brings_classifier:
        return _load(pretrained.classifier, pretrained, pretrained.config, options)
    head = stored_head(pretrained) if trained else None
    config = copy.deepcopy(pretrained.config)
    stated = config.num_labels if trained else 1
    config.num_labels = rows = head.rows if head else stated
    elsewhere = head is not None and not head.is_read_by_transformers
    model = _load(
        AutoModelForSequenceClassification,
        pretrained,
        config,
        options,
        new=() if trained and not elsewhere else (f"{SCORE}.weight",),
        head=head,
    )
    if head is not None and elsewhere and has_linear_score(model):
        model.score = head.read(pretrained, like=model.score.weight)
    weights = label_weights(pretrained, rows) if trained else None
    if weights is not None and (name := head_name(model)):
        model.set_submodule(name, weighted(model.get_submodule(name), weights))
        model.config.num_labels = model.num_labels = 1
    return model


def _load(
    auto_class: type,
    pretrained: Pretrained,
    config: PretrainedConfig,
    options: LoadOptions,
    new: tuple[str, ...] = (),
    head: StoredHead | None = None,
) -> PreTrainedModel:
    """Load the model with all of its weights, except those that `new` names.

    Args:
        head: its weights may have names that transformers does not know.
    """
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
        if other := other_shapes(pretrained, auto_class, config):
            raise UserError(f"no model could be loaded from {pretrained}: {other}") from error
        raise UserError(f"no model could be loaded from {pretrained}: {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if missing := sorted(set(found["missing_keys"]) - set(new)):
        raise UserError(
            f"{pretrained} lacks weights, which would be random: {', '.join(missing[:5])}"
            + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        )
    # A scalar model that starts from a language model drops the language model's head.
    known = {"lm_head.weight", *(head.weights if head else ())}
    unexpected = sorted(set(found["unexpected_keys"]) - known)
    if unexpected:
        names = ", ".join(unexpected[:5]) + (" …" if len(unexpected) > 5 else "")
        say(f"{pretrained}: {len(unexpected)} weights have no place in the model: {names}")
    if gguf and hasattr(model, "hf_quantizer"):  # the weights are plain now and can be saved
        model.hf_quantizer.remove_quantization_config(model)
    if not options.dropout:  # whatever name the config gives it
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    # Some families keep a few parameters in float32; DeepSpeed trains all of them in one type, and
    # a frozen model must compute as the trained one does. Buffers stay as they are in both.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(options.dtype)
    loaded: PreTrainedModel = model
    return loaded


def _ready(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: LoadOptions
) -> PreTrainedModel:
    """Give the model a pad token embedding, a float32 head and, if asked for, an adapter."""
    known = model.get_input_embeddings().num_embeddings
    if known < (needed := ids_needed(tokenizer)):
        model.resize_token_embeddings(needed, mean_resizing=False)
        # Not random: actor, reference and the replicas on all ranks must be the same model.
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:
                layer.weight.data[known:] = layer.weight.data[:known].mean(0)
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id
    # The embedding at padding_idx gets no gradient; in a model with pad = EOS that would be EOS.
    model.get_input_embeddings().padding_idx = tokenizer.pad_token_id
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and head.weight.dtype != torch.float32:
        model.set_output_embeddings(Float32Logits.like(head))
    if isinstance(getattr(model, "score", None), nn.Linear):
        model.score = Float32Head.like(model.score)
    if options.lora is not None:
        add_adapter(model, options.lora)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model
