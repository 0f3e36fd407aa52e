"""Checks of whether a model suits its role, made before its weights are loaded."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training.errors import UserError
from training.models.families.score_head import label_weights, stored_head
from training.models.pretrained import Pretrained, has_linear_score


def check_positions(model: Pretrained, needs: dict[str, int]) -> None:
    """Refuse sequences that are longer than the model's number of positions.

    Args:
        needs: maps the settings that allow sequences to the longest length in tokens.

    Raises:
        UserError: a setting allows too long a sequence; the message lists every such setting.
    """
    known = getattr(model.config, "max_position_embeddings", None)
    faults = [f"{what} is {need} tokens" for what, need in needs.items() if known and need > known]
    if faults:
        raise UserError(faults, f"{model} knows {known} positions:")


def check_policy(model: Pretrained) -> None:
    """Refuse anything but a causal language model.

    Raises:
        UserError: the model is a sequence-classification model, or quantized.
    """
    refuse_quantized(model)
    if any("SequenceClassification" in name for name in model.config.architectures or []):
        raise UserError(f"{model} is a sequence-classification model, not a language model")


def check_scalar(model: Pretrained, new_head: bool) -> bool:
    """Whether the model has a trained classification head.

    Args:
        new_head: also accept a language model, which will be given a new head.

    Raises:
        UserError: the model cannot give one scalar per sequence.
    """
    refuse_quantized(model)
    config = model.config
    head = stored_head(model)
    trained = (
        any("SequenceClassification" in name for name in config.architectures or [])
        or model.brings_classifier
        or head is not None
    )
    if model.brings_classifier and model.labels:
        raise UserError(f"reward.labels: the code of {model} gives one number already")
    if trained and not model.brings_classifier:
        label_weights(model, head.rows if head else config.num_labels)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{model} is an encoder-decoder; reward models read one sequence")
    if not trained and not new_head:
        raise UserError(
            f"{model} is not a sequence-classification model, so its rewards would be "
            f"arbitrary; stage 2 makes one from it{model.untrusted_code}"
        )
    return trained


def refuse_quantized(model: Pretrained) -> None:
    """Refuse quantized weights, of the Hub too: they have no gradients, and cannot change dtype.

    Raises:
        UserError: the model's config says that it is quantized.
    """
    quantized = getattr(model.config, "quantization_config", None)
    if quantized:
        method = dict(quantized).get("quant_method", "an unnamed method")
        raise UserError(f"{model} is quantized ({method}); name the model that it was made from")


def check_head(model: PreTrainedModel, name_or_path: str) -> None:
    """Refuse a classification model without a linear head on its last hidden states."""
    if not has_linear_score(model):
        raise UserError(f"{name_or_path}: {type(model).__name__} has no linear head named 'score'")


def require_same_tokens(model: Pretrained, policy: Pretrained, setting: str) -> set[str]:
    """Refuse a model that would read the policy's token ids as different words.

    Special tokens (reserved ones, padding) may have different names, since both models are given
    the same ids. BOS, EOS and the tokens that both models know must have the same ids.

    Args:
        setting: the setting that names the model.

    Returns:
        The policy's tokens that the model knows by another name or not at all.

    Raises:
        UserError: the vocabularies differ in words, or in BOS or EOS.
    """
    tokenizers = (policy.tokenizer, model.tokenizer)
    own, known = (tokenizer.get_vocab() for tokenizer in tokenizers)
    differing = {token for token, _ in own.items() ^ known.items()}
    words = differing - (_special(tokenizers[0]) | _special(tokenizers[1]))
    # The same word with another id; padding is never attended to.
    words |= (differing & own.keys() & known.keys()) - {t.pad_token for t in tokenizers}
    ends = [(tokenizer.bos_token_id, tokenizer.eos_token_id) for tokenizer in tokenizers]
    if words or ends[0] != ends[1]:
        example = f"; {sorted(words)[0]!r} is one difference" if words else ": its BOS or EOS"
        raise UserError(f"{setting}: {model} has another vocabulary than {policy}{example}")
    return differing & own.keys()


def _special(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
