"""Finds the token ids that exist, and those that end a response."""

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training.data import response_end


def ids_needed(tokenizer: PreTrainedTokenizerBase) -> int:
    """The embeddings that the tokenizer needs: more than its tokens if it leaves ids out."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))


def absent_ids(tokenizer: PreTrainedTokenizerBase, size: int) -> Tensor | None:
    """[size] bool, true for ids that no token has; None if there are none.

    Embeddings are often padded beyond the tokenizer's ids, and some tokenizers leave ids out.
    """
    known = set(tokenizer.get_vocab().values())
    absent = [i for i in range(size) if i not in known and not _has_token(tokenizer, i)]
    if not absent:
        return None
    mask = torch.zeros(size, dtype=torch.bool)
    mask[absent] = True
    return mask


def _has_token(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    """Finds the token of an id even if `get_vocab` lists another id with the same spelling."""
    try:
        token = tokenizer.convert_ids_to_tokens(token_id)
    except (IndexError, KeyError, ValueError, OverflowError):
        return False
    return token not in (None, "", tokenizer.unk_token)


def response_ends(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, absent: Tensor | None
) -> tuple[int, ...]:
    """List the ids that end a response; the first is the one that training data ends with.

    They are the chat template's end of an assistant's turn, the tokenizer's EOS, and the ends in
    the model's generation config. A single id in a generation config that was derived from the
    model's config does not count: it may be the default of its class.

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
    """The tokens' spellings, for a message."""
    return [repr(tokenizer.convert_ids_to_tokens(token)) for token in ids]
