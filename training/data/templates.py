r"""Prompts and responses as the model sees them.

The tokenizer's chat template where it has one, `\n\nHuman: ...\n\nAssistant:` otherwise. Prompt and
response are encoded apart, so the ids of a response are the same after every prompt, and what was
scored in training is what a rollout produces. A response ends with EOS, and it is learned.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from training.data.formats import Message, transcript

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Some templates print today's date unless one is given: the same data must give the same ids.
_FIXED_DATE = "26 Jul 2024"
_ANSWER = "ThisIsTheAnswer"


def render_prompt(messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase") -> str:
    """The prompt's text up to the place where the response begins."""
    if not tokenizer.chat_template:
        return transcript(list(messages)) + "\n\nAssistant:"
    rendered: Any = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tokenize=False,
        add_generation_prompt=True,
        date_string=_FIXED_DATE,
    )
    return rendered


def response_text(response: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """What is appended to the rendered prompt; the plain template wants a space before it."""
    return response if tokenizer.chat_template else f" {response}"


def response_frame(
    messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[str, str]:
    """What the chat template puts before and after the answer to `messages`.

    A template that knows no system message gets it with the first user's.
    """
    from jinja2 import TemplateError

    def rendered(prompt: Sequence[Message]) -> tuple[str, str]:
        dialogue = [dict(message) for message in prompt]
        whole: Any = tokenizer.apply_chat_template(
            [*dialogue, {"role": "assistant", "content": _ANSWER}],
            tokenize=False,
            date_string=_FIXED_DATE,
        )
        before, _, after = whole.rpartition(_ANSWER)
        return before, after

    try:
        return rendered(messages)
    except TemplateError:
        if messages[0]["role"] != "system":
            raise
        system, user, *rest = messages
        joined = {**user, "content": f"{system['content']}\n\n{user['content']}"}
        return rendered([joined, *rest])


def response_end(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id that ends a response in training data.

    It is the special token with which the chat template ends an assistant's turn; EOS where there
    is no template, or where it writes no such token.
    """
    from jinja2 import TemplateError

    eos: int = tokenizer.eos_token_id
    if not tokenizer.chat_template:
        return eos
    try:
        before, after = response_frame([{"role": "user", "content": "Hi"}], tokenizer)
    except TemplateError:  # one that takes other dialogues only
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
    """Token ids of whole dialogues as the tokenizer's chat template writes them.

    A response that was cut has nothing after it. What spells a special token in a response is left
    out: it would be one.
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
    """Token ids of rendered prompts, with BOS exactly once where the tokenizer has one."""
    bos = tokenizer.bos_token_id
    encoded = _encode(texts, tokenizer)
    if bos is None:
        return encoded
    return [ids if ids[:1] == [bos] else [bos, *ids] for ids in encoded]


def encode_responses(
    responses: Sequence[str], tokenizer: "PreTrainedTokenizerBase", end: int | None = None
) -> list[list[int]]:
    """Token ids of responses, `end` (by default `response_end`) at the end.

    Text that looks like a special token stays text: a response has one end.
    """
    # Sentencepiece tokenizers put a space before any text; one is enough.
    adds_space = "".join(tokenizer.tokenize("a")).startswith("\u2581")
    texts = [text if adds_space else response_text(text, tokenizer) for text in responses]
    end = response_end(tokenizer) if end is None else end
    return [[*ids, end] for ids in _encode(texts, tokenizer, split_special_tokens=True)]


def decode_responses(
    response_ids: Sequence[Sequence[int]], tokenizer: "PreTrainedTokenizerBase"
) -> list[str]:
    """The responses' texts, without special tokens and without the template's space."""
    decoded: Any = [
        tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in response_ids
    ]
    return decoded if tokenizer.chat_template else [text.removeprefix(" ") for text in decoded]


def truncate_prompt(ids: list[int], max_length: int, bos_token_id: int | None) -> list[int]:
    """The last `max_length` ids; BOS stays in front."""
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
