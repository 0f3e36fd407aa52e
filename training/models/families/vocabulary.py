"""Which token ids exist, and which of them end a response."""

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training.data import response_end


def ids_needed(tokenizer: PreTrainedTokenizerBase) -> int:
    """Embeddings that the tokenizer's ids need; more than it has tokens where ids are left out."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))


def absent_ids(tokenizer: PreTrainedTokenizerBase, size: int) -> Tensor | None:
    """[size] bool, true where no token has the id; None where every id has one.

    Embeddings are often padded beyond the tokenizer, and some tokenizers leave ids out.
    """
    known = set(tokenizer.get_vocab().values())
    absent = [i for i in range(size) if i not in known and not _has_token(tokenizer, i)]
    if not absent:
        return None
    mask = torch.zeros(size, dtype=torch.bool)
    mask[absent] = True
    return mask


def _has_token(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    """Also where several ids are spelt alike, of which `get_vocab` knows one."""
    try:
        token = tokenizer.convert_ids_to_tokens(token_id)
    except (IndexError, KeyError, ValueError, OverflowError):
        return False
    return token not in (None, "", tokenizer.unk_token)


def response_ends(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, absent: Tensor | None
) -> tuple[int, ...]:
    """The ids that end a response, the one that training data ends with first.

    They are the end of a turn in the chat template, the tokenizer's EOS, and those that the model's
    generation config lists. One that does not list them, but was made from the model's config,
    says nothing: there a single id may be the default of its class, which nobody chose.

    Args:
        absent: ids that do not exist, from `absent_ids`.
    """
    config = model.generation_config
    listed = None if config is None else config.eos_token_id
    if isinstance(listed, int):
        listed = [] if getattr(config, "_from_model_config", False) else [listed]
    own = [end for end in listed or [] if end < ids_needed(tokenizer)]
    if absent is not None:
        own = [end for end in own if not absent[end]]
    return tuple(dict.fromkeys([response_end(tokenizer), tokenizer.eos_token_id, *own]))


def named_tokens(ids: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """As they are spelt, for a message."""
    return [repr(tokenizer.convert_ids_to_tokens(token)) for token in ids]
