r"""Raw records in any of the formats of preference data -> one typed Record.

    preference        {"prompt", "chosen", "rejected"}, Dahoas/full-hh-rlhf among them
    ranking           {"prompt", "responses", "ranking"}; `ranking` lists every index of
                      `responses` once, best first
    completion        {"prompt", "response"} or {"prompt", "completion"}: SFT only
    transcript        {"chosen", "rejected"}: two whole dialogues that differ in their last turn,
                      as \n\nHuman: / \n\nAssistant: texts (Anthropic) or lists of messages
    tldr_comparison   {"info", "summaries", "choice"} (openai/summarize_from_feedback)
    tldr_post         {"subreddit", "title", "post", "summary"}: SFT only

A prompt is a text, a `\n\nHuman:` dialogue, or a list of {"role", "content"}. PPO needs prompts
only, so its records need no other field.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.data.settings import SourceFormat, Stage
from training.errors import did_you_mean

Message = Mapping[str, str]

ROLES = {"Human": "user", "Assistant": "assistant"}
SYSTEM = "System: "
_TURN = re.compile(r"\n\n(Human|Assistant):")


class RecordFault(Exception):
    """A record that violates its format; the user has to fix it."""


class Unusable(Exception):
    """A well-formed record that cannot be learned from; it is counted and dropped."""


@dataclass(frozen=True)
class Record:
    """A prompt and its responses.

    prompt: messages {"role": "system" | "user" | "assistant", "content"}; the last is the user's.
    responses: best first; two for a comparison, one for an SFT text, none for a bare prompt.
    origin: "file:line".
    group: what the record shares with others that are not independent of it; empty is its prompt.
    """

    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    origin: str
    group: str = ""

    @property
    def prompt_text(self) -> str:
        """The text of a single turn, or the transcript of a dialogue (a system message first)."""
        if len(self.prompt) == 1:
            return self.prompt[0]["content"]
        start = SYSTEM if self.prompt[0]["role"] == "system" else ""
        return start + transcript(self.prompt).strip()


def transcript(messages: tuple[Message, ...] | list[Message]) -> str:
    r"""Write a dialogue as `\n\nHuman: ...\n\nAssistant: ...`, a system message without a label."""
    names = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": ""}
    return "".join(names[message["role"]] + message["content"] for message in messages)


def prompt_messages(text: str) -> tuple[Message, ...]:
    r"""Parse a prompt given as text: a single user turn, or a `\n\nHuman:` dialogue.

    The inverse of `Record.prompt_text`.
    """
    text = text.strip()
    if text.startswith(SYSTEM) and (start := text.find("\n\nHuman:")) > 0:
        system = {"role": "system", "content": text[len(SYSTEM) : start]}
        return (system, *_asked(text[start:].strip()))
    if not (text.startswith("Human:") and "\n\nAssistant:" in text):
        return ({"role": "user", "content": text},)
    return _asked(text)


def _asked(text: str) -> tuple[Message, ...]:
    turns = _turns(text)
    # A final "\n\nAssistant:" asks for the answer; the template adds it again.
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def parse_record(
    raw: Mapping[str, Any], origin: str, stage: Stage, source_format: SourceFormat = "auto"
) -> Record:
    """Parse a raw record.

    Raises:
        RecordFault: a required field is missing, or a field has the wrong type.
        Unusable: the record is well-formed, but the stage cannot learn from it.
    """
    found = _format_of(raw, stage) if source_format == "auto" else source_format
    if stage == "ppo" and "prompt" in raw:
        return Record(_prompt(raw), (), origin)
    if found == "transcript":
        return _from_transcripts(raw, origin)
    if found == "tldr_comparison":
        return _from_tldr_comparison(raw, origin)
    if found == "tldr_post":
        return Record(_tldr_prompt(raw), (_text(raw, "summary"),), origin)
    prompt = _prompt(raw)
    if found == "ranking":
        return Record(prompt, _ranked(raw), origin)
    if found == "preference":
        responses = tuple(_last_answer(raw, field, prompt) for field in ("chosen", "rejected"))
        return Record(prompt, responses, origin)
    field = "completion" if "completion" in raw else "response"
    return Record(prompt, (_last_answer(raw, field, prompt),), origin)


def group_of(raw: Mapping[str, Any]) -> str:
    """The optional field `group` of a record in any format; empty if it has none.

    Raises:
        RecordFault: it is not a text.
    """
    return _text(raw, "group") if raw.get("group") is not None else ""


def check_usable(record: Record, stage: Stage) -> Record:
    """Reduce a record to what `stage` uses: SFT keeps the best response, PPO none.

    Raises:
        Unusable: the stage cannot learn from the record; the message is the reason.
    """
    if not all(
        message["content"].strip() for message in record.prompt if message["role"] == "user"
    ):
        raise Unusable("dropped: an empty prompt")
    if record.prompt[-1]["role"] != "user":
        raise Unusable("dropped: the prompt does not end with the user's turn")
    if stage == "ppo":
        return Record(record.prompt, (), record.origin)
    if stage == "sft":
        if not record.responses[0]:
            raise Unusable("dropped: an empty response")
        return Record(record.prompt, record.responses[:1], record.origin)
    if len(record.responses) == 1:
        raise Unusable("skipped: a text for SFT only, nothing to compare")
    if not all(record.responses):
        raise Unusable("dropped: an empty response")
    if len(set(record.responses)) < len(record.responses):
        raise Unusable("dropped: identical responses")
    return record


def _format_of(raw: Mapping[str, Any], stage: Stage) -> SourceFormat:
    if {"summaries", "choice"} & raw.keys() and "prompt" not in raw:
        return "tldr_comparison"
    if {"responses", "ranking"} & raw.keys():
        return "ranking"
    if {"chosen", "rejected"} & raw.keys():
        if "prompt" in raw or _is_plain_text(raw.get("chosen") or raw.get("rejected")):
            return "preference"
        return "transcript"
    if {"response", "completion"} & raw.keys():
        return "completion"
    if "summary" in raw and "prompt" not in raw:
        return "tldr_post"
    if "prompt" in raw and stage == "ppo":
        return "completion"
    known = ("chosen", "rejected", "response", "responses", "ranking")
    near = [hint for key in raw if (hint := did_you_mean(key, known)).startswith("; did")]
    if "prompt" not in raw:
        raise RecordFault(f"no 'prompt'{did_you_mean('prompt', raw) if raw else ''}")
    raise RecordFault(
        "a prompt without 'chosen' and 'rejected', 'responses' and 'ranking', or 'response'"
        + (near[0] if near else "")
    )


def _is_plain_text(value: Any) -> bool:
    return isinstance(value, str) and not _TURN.search("\n\n" + value.lstrip())


def _field(raw: Mapping[str, Any], name: str) -> Any:
    if raw.get(name) is None:
        others = [key for key in raw if key != name]
        hint = did_you_mean(name, others) if others else ""
        raise RecordFault(f"no {name!r}{hint}")
    return raw[name]


def _text(raw: Mapping[str, Any], name: str) -> str:
    value = _field(raw, name)
    if not isinstance(value, str):
        raise RecordFault(f"{name!r} is {type(value).__name__}, a text was expected")
    return value.strip()


def _response(raw: Mapping[str, Any], name: str) -> Any:
    """A response, which may be empty; Arrow turns a missing field into null."""
    value = _field(raw, name)
    if value == "":
        raise Unusable("dropped: an empty response")
    return value


def _prompt(raw: Mapping[str, Any]) -> tuple[Message, ...]:
    value = _field(raw, "prompt")
    if isinstance(value, list):
        return _messages(value, "prompt")
    return prompt_messages(_text(raw, "prompt"))


def _messages(value: list[Any], name: str) -> tuple[Message, ...]:
    messages = []
    for item in value:
        if not isinstance(item, dict) or not {"role", "content"} <= item.keys():
            raise RecordFault(f"{name!r} is a list, but not of {{'role', 'content'}}")
        role, content = item["role"], item["content"]
        if role not in ("system", "user", "assistant"):
            raise RecordFault(f"{name!r}: the role {role!r} is not system, user or assistant")
        if not isinstance(content, str):
            raise RecordFault(f"{name!r}: 'content' is {type(content).__name__}, not a text")
        messages.append({"role": role, "content": content.strip()})
    if not messages:
        raise Unusable("dropped: an empty prompt")
    return tuple(messages)


def _turns(text: str) -> tuple[Message, ...]:
    parts = _TURN.split("\n\n" + text.strip())
    if parts[0].strip():
        raise Unusable("dropped: text before the first turn")
    return tuple(
        {"role": ROLES[name], "content": content.strip()}
        for name, content in zip(parts[1::2], parts[2::2], strict=True)
    )


def _dialogue(raw: Mapping[str, Any], name: str) -> tuple[tuple[Message, ...], str]:
    """The turns before the last answer, and the answer."""
    value = _response(raw, name)
    turns = _messages(value, name) if isinstance(value, list) else _turns(_text(raw, name))
    if not turns or turns[-1]["role"] != "assistant":
        raise Unusable("dropped: the dialogue does not end with the assistant's turn")
    if len(turns) == 1:
        raise Unusable("dropped: an empty prompt")
    return turns[:-1], turns[-1]["content"]


def _from_transcripts(raw: Mapping[str, Any], origin: str) -> Record:
    prompt, chosen = _dialogue(raw, "chosen")
    other_prompt, rejected = _dialogue(raw, "rejected")
    if prompt != other_prompt:
        raise Unusable("dropped: the prompts of chosen and rejected differ")
    return Record(prompt, (chosen, rejected), origin)


def _last_answer(raw: Mapping[str, Any], name: str, prompt: tuple[Message, ...]) -> str:
    """The response, given as a text or as messages that may repeat the prompt."""
    value = _response(raw, name)
    if not isinstance(value, list):
        return _text(raw, name)
    turns = _messages(value, name)
    if turns[-1]["role"] != "assistant":
        raise Unusable("dropped: the dialogue does not end with the assistant's turn")
    if turns[:-1] and turns[:-1] != prompt:
        raise Unusable("dropped: the prompts of chosen and rejected differ")
    return turns[-1]["content"]


def _ranked(raw: Mapping[str, Any]) -> tuple[str, ...]:
    responses, ranking = _field(raw, "responses"), _field(raw, "ranking")
    if not isinstance(responses, list) or not all(isinstance(text, str) for text in responses):
        raise RecordFault("'responses' is not a list of texts")
    if len(responses) < 2:
        raise RecordFault("'responses' holds fewer than two texts")
    if not isinstance(ranking, list) or any(type(index) is not int for index in ranking):
        raise RecordFault("'ranking' is not a list of indices")
    if sorted(ranking) != list(range(len(responses))):
        raise RecordFault(
            f"'ranking' {ranking} does not list the indices 0 to {len(responses) - 1}, "
            "best first, each once"
        )
    return tuple(responses[index].strip() for index in ranking)


def _from_tldr_comparison(raw: Mapping[str, Any], origin: str) -> Record:
    info, summaries, choice = (_field(raw, name) for name in ("info", "summaries", "choice"))
    if not isinstance(info, dict):
        raise RecordFault("'info' is not an object")
    if (
        not isinstance(summaries, list)
        or len(summaries) != 2
        or not all(isinstance(summary, dict) for summary in summaries)
    ):
        raise RecordFault("'summaries' is not a list of two objects")
    if type(choice) is not int or choice not in (0, 1):
        raise RecordFault(f"'choice' is {choice!r}, not 0 or 1")
    texts = [_text(summary, "text") for summary in summaries]
    return Record(_tldr_prompt(info), (texts[choice], texts[1 - choice]), origin)


def _tldr_prompt(info: Mapping[str, Any]) -> tuple[Message, ...]:
    """The prompt in the format of trl-lib/tldr, so that the data sets share their prompts."""
    if info.get("post") is None and info.get("article") is not None:
        return ({"role": "user", "content": f"ARTICLE: {_text(info, 'article')}\n\nTL;DR:"},)
    subreddit, title, post = (_text(info, name) for name in ("subreddit", "title", "post"))
    if not post:
        raise Unusable("dropped: an empty prompt")
    subreddit = subreddit.removeprefix("r/")
    content = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    return ({"role": "user", "content": content},)
