"""Tokenizers from disk or Hub, checked."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from training.errors import UserError
from training.models.pretrained import UNREADABLE, _source

PAD_TOKEN = "<pad>"


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
