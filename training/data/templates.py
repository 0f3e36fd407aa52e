r"""Prompts and responses as the model sees them.

Prompts are written with the tokenizer's chat template or, if it has none, as
`\n\nHuman: ...\n\nAssistant:`. Prompt and response are encoded separately, so the ids of a response
are the same after every prompt, and rollouts produce exactly what training scores. A response ends
with EOS, which is learned.
"""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from training.data.cutting import shortened
from training.data.messages import UNLEARNED, Dialogue, Message, transcript

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TemplateRefusal(Exception):
    """A chat template does not take a dialogue: a system turn, or roles that do not alternate."""


# Some templates print today's date unless given one; the same data must give the same ids.
_FIXED_DATE = "26 Jul 2024"
_ANSWER = "ThisIsTheAnswer"


def render_prompt(messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase") -> str:
    """Render the prompt up to where the response begins.

    Raises:
        TemplateRefusal: the chat template does not take the dialogue.
    """
    if tokenizer.chat_template:
        return _rendered(messages, tokenizer, add_generation_prompt=True)
    if any(message["role"] == "tool" or "tool_calls" in message for message in messages):
        raise TemplateRefusal("without a chat template there is no way to write turns of tools")
    return transcript(list(messages)) + "\n\nAssistant:"


def _rendered(
    messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", **options: bool
) -> str:
    from jinja2 import TemplateError

    dialogue = [{k: v for k, v in message.items() if k != UNLEARNED} for message in messages]
    try:
        written: Any = tokenizer.apply_chat_template(
            dialogue, tokenize=False, date_string=_FIXED_DATE, **options
        )
    # Templates are programs: what they do not expect can raise nearly anything.
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise TemplateRefusal(" ".join(str(error).split()) or type(error).__name__) from error
    rendered: str = written
    return rendered


def response_text(response: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text to append to the rendered prompt; the plain format needs a space before it."""
    return response if tokenizer.chat_template else f" {response}"


def response_frame(
    messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[str, str]:
    """What the chat template writes before and after the answer to `messages`.

    If the template refuses system messages, the system message joins the first user message.

    Raises:
        TemplateRefusal: the chat template does not take the dialogue.
    """

    def rendered(prompt: Sequence[Message]) -> tuple[str, str]:
        whole = _rendered([*prompt, {"role": "assistant", "content": _ANSWER}], tokenizer)
        before, _, after = whole.rpartition(_ANSWER)
        return before, after

    try:
        return rendered(messages)
    except TemplateRefusal:
        if len(messages) < 2 or messages[0]["role"] != "system":
            raise
        system, user, *rest = messages
        joined = {**user, "content": f"{system['content']}\n\n{user['content']}"}
        return rendered([joined, *rest])


def response_end(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id that ends a response in training data.

    It is the special token with which the chat template ends an assistant's turn; EOS where there
    is no template, or where it writes no such token.
    """
    eos: int = tokenizer.eos_token_id
    if not tokenizer.chat_template:
        return eos
    try:
        before, after = response_frame([{"role": "user", "content": "Hi"}], tokenizer)
    except TemplateRefusal:  # one that takes other dialogues only
        return eos
    # Before the answer there is nothing where the template does not show it as it is.
    if not before or not after.strip():
        return eos
    found = _special_tokens(tokenizer).match(after.lstrip())
    if not found:
        return eos
    end: int = tokenizer.convert_tokens_to_ids(found.group())
    return end


def encode_dialogues(
    prompts: Sequence[Sequence[Message]],
    responses: Sequence[str],
    ended: Sequence[bool],
    tokenizer: "PreTrainedTokenizerBase",
) -> list[list[int]]:
    """Encode whole dialogues as the tokenizer's chat template writes them.

    Nothing follows a response that was cut off. Text in a response that spells a special token is
    removed, since it would be encoded as that token.
    """
    special = _special_tokens(tokenizer)
    texts = []
    for messages, response, whole in zip(prompts, responses, ended, strict=True):
        before, after = response_frame(messages, tokenizer)
        texts.append(before + special.sub("", response) + (after if whole else ""))
    return _encode(texts, tokenizer)


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    known = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    spelt = sorted({*known, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, spelt)) or r"(?!)")


def encode_prompts(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Encode rendered prompts, with exactly one BOS if the tokenizer has one."""
    bos = tokenizer.bos_token_id
    encoded = _encode(texts, tokenizer)
    if bos is None:
        return encoded
    return [ids if ids[:1] == [bos] else [bos, *ids] for ids in encoded]


def encode_responses(
    responses: Sequence[str], tokenizer: "PreTrainedTokenizerBase", end: int | None = None
) -> list[list[int]]:
    """Encode responses, each with `end` (by default `response_end`) at the end.

    Text that spells a special token is encoded as text, so that a response has exactly one end.
    """
    # Sentencepiece tokenizers already put a space before any text.
    adds_space = "".join(tokenizer.tokenize("a")).startswith("\u2581")
    texts = [text if adds_space else response_text(text, tokenizer) for text in responses]
    end = response_end(tokenizer) if end is None else end
    return [[*ids, end] for ids in _encode(texts, tokenizer, split_special_tokens=True)]


def decode_responses(
    response_ids: Sequence[Sequence[int]], tokenizer: "PreTrainedTokenizerBase"
) -> list[str]:
    """Decode responses, without special tokens and without the plain format's space."""
    decoded: Any = [
        tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in response_ids
    ]
    return decoded if tokenizer.chat_template else [text.removeprefix(" ") for text in decoded]


def fitting_prompt(
    messages: Dialogue,
    limit: int,
    tokenizer: "PreTrainedTokenizerBase",
    length: Callable[[Dialogue], int] | None = None,
) -> Dialogue | None:
    """The dialogue without its oldest turns, so that it has at most `limit` tokens.

    Args:
        length: the tokens of a dialogue; None counts those of the prompt as it is rendered.

    Returns:
        None if the system turn and the headers alone are longer.
    """

    def tokens(dialogue: Dialogue) -> int:
        try:
            return len(encode_prompts([render_prompt(dialogue, tokenizer)], tokenizer)[0])
        except TemplateRefusal:  # it takes the whole, but not what is left of it
            return UNWRITABLE

    def starts(text: str) -> Sequence[int]:
        if not getattr(tokenizer, "is_fast", False):
            return range(len(text))
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        # Several tokens of one character begin at the same place.
        return sorted({0, *(begin for begin, _ in encoded["offset_mapping"])})

    return shortened(messages, limit, length or tokens, starts)


UNWRITABLE = 10**9
"""The length of what a template refuses."""


def truncate_prompt(ids: list[int], max_length: int, bos_token_id: int | None) -> list[int]:
    """Keep the last `max_length` ids and a BOS at the front."""
    if len(ids) <= max_length:
        return ids
    if bos_token_id is not None and ids[0] == bos_token_id:
        return [bos_token_id, *ids[len(ids) - max_length + 1 :]]
    return ids[len(ids) - max_length :]


def _encode(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", split_special_tokens: bool = False
) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=split_special_tokens,
        return_attention_mask=False,
        verbose=False,
    )
    return [list(ids) for ids in encoded["input_ids"]]
