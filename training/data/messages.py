r"""Messages, the turns of a dialogue: read from the shapes that people write them in, and as text.

A list of messages is {"role", "content"} (OpenAI) or {"from", "value"} (ShareGPT). A text is a
`\n\nHuman:` / `\n\nAssistant:` dialogue, or a single turn of the user. A dialogue travels as
messages to the very end; nothing parses the text that `dialogue_text` shows to people.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from training.data.fields import RecordFault, Unusable

Message = Mapping[str, Any]
"""`role` (system, user, assistant or tool), `content` (a text), and any of `FOR_TEMPLATES`."""

Dialogue = tuple[Message, ...]

ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name of it
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""The roles, by the names that data sets give them."""

FOR_TEMPLATES = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")
"""Further keys of a message that chat templates write."""

UNLEARNED = "weight"
"""Key of an assistant's turn that is not to be learned; its value is 0 (OpenAI's name)."""

NOT_LEARNED = ("train", "loss")
"""Keys whose value false says the same, in data for axolotl and for LLaMA-Factory."""

SYSTEM = "System: "
_LABELS = {"user": "Human", "assistant": "Assistant", "system": "System", "tool": "Tool"}
_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def message_list(value: Any, name: str) -> Dialogue:
    """The messages in the field `name`: a list, one alone, or the JSON text of a list.

    Raises:
        RecordFault: it is no list of messages.
        Unusable: it is empty.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RecordFault(f"{name!r} is a text that is no JSON list of messages") from None
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list):
        raise RecordFault(f"{name!r} is {type(value).__name__}, a list of messages was expected")
    if not items:
        raise Unusable("dropped: an empty prompt")
    return tuple(_message(item, name) for item in items)


def _message(item: Any, name: str) -> Message:
    given = without_nulls(item) if isinstance(item, dict) else {}
    speaker = given.get("role", given.get("from"))
    if speaker is None or not {"role", "from"} & given.keys():
        raise RecordFault(f"{name!r} is a list, but not of {{'role', 'content'}}")
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise RecordFault(f"{name!r}: the role {speaker!r} is not system, user, assistant or tool")
    if speaker == "function_call":
        return {"role": role, "content": "", "tool_calls": [_call(given.get("value"), name)]}
    content = given.get("content", given.get("value"))
    if content is None and "tool_calls" not in given:
        if "content" in item or "value" in item:
            raise RecordFault(f"{name!r}: 'content' is null, not a text")
        raise RecordFault(f"{name!r} is a list, but not of {{'role', 'content'}}")
    message: dict[str, Any] = {"role": role, "content": _content(content, name).strip()}
    message |= {key: given[key] for key in FOR_TEMPLATES if given.get(key)}
    if given.get(UNLEARNED) == 0 or any(given.get(mark) is False for mark in NOT_LEARNED):
        message[UNLEARNED] = 0
    try:
        json.dumps(message)
    except (TypeError, ValueError) as error:
        raise RecordFault(f"{name!r}: {error}") from None
    return message


def _call(value: Any, name: str) -> dict[str, Any]:
    """ShareGPT's function_call, a JSON text, as OpenAI's tool call."""
    try:
        call = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        call = None
    if not isinstance(call, dict) or "name" not in call:
        raise RecordFault(f"{name!r}: the value of 'function_call' is not JSON with a 'name'")
    function = {"name": call["name"], "arguments": call.get("arguments", {})}
    return {"type": "function", "function": function}


def _content(value: Any, name: str) -> str:
    """A text, or a list of parts of type text, joined."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RecordFault(f"{name!r}: 'content' is {type(value).__name__}, not a text")
    texts = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise RecordFault(f"{name!r}: a part of 'content' is of type {kind!r}, not text")
        if not isinstance(part.get("text"), str):
            raise RecordFault(f"{name!r}: a part of 'content' has no 'text'")
        texts.append(part["text"])
    return "".join(texts)


def without_nulls(value: Any) -> Any:
    """The same without keys whose value is null: Arrow gives every row the keys of all rows."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [without_nulls(part) for part in value]
    return value


def is_learnable(message: Message) -> bool:
    """Whether an assistant's turn is a text that a model may learn.

    Tool calls and thoughts are written by the chat template, each in its own way.
    """
    unlearned = {UNLEARNED, "tool_calls", "reasoning_content", "thinking"} & message.keys()
    return message["role"] == "assistant" and not unlearned and bool(message["content"])


def prompt_messages(text: str) -> Dialogue:
    r"""Read a prompt that a user wrote as text: a single turn, or a `\n\nHuman:` dialogue."""
    text = text.strip()
    if text.startswith(SYSTEM) and (start := text.find("\n\nHuman:")) > 0:
        system = {"role": "system", "content": text[len(SYSTEM) : start]}
        return (system, *_asked(text[start:].strip()))
    if not is_transcript(text):
        return ({"role": "user", "content": text},)
    return _asked(text)


def as_dialogue(prompt: Dialogue | str) -> Dialogue:
    """A dialogue as it is, or read from the text in which a user wrote it."""
    return prompt_messages(prompt) if isinstance(prompt, str) else prompt


def is_transcript(text: str) -> bool:
    """Whether a prompt's text is a dialogue."""
    return text.startswith("Human:") and "\n\nAssistant:" in text


def _asked(text: str) -> Dialogue:
    turns = transcript_turns(text)
    # A final "\n\nAssistant:" asks for the answer; the template adds it again.
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def has_turns(text: str) -> bool:
    """Whether a text holds a label of a turn."""
    return bool(_TURN.search("\n\n" + text.lstrip()))


def transcript_turns(text: str) -> Dialogue:
    r"""Read the turns of a `\n\nHuman: …\n\nAssistant: …` text.

    Raises:
        Unusable: something stands before the first turn.
    """
    parts = _TURN.split("\n\n" + text.strip())
    if parts[0].strip():
        raise Unusable("dropped: text before the first turn")
    return tuple(
        {"role": _SPEAKERS[name], "content": content.strip()}
        for name, content in zip(parts[1::2], parts[2::2], strict=True)
    )


def transcript(messages: Sequence[Message]) -> str:
    r"""Write a dialogue as `\n\nHuman: …\n\nAssistant: …`; a first system turn has no label."""
    written = []
    for place, message in enumerate(messages):
        bare = place == 0 and message["role"] == "system"
        label = "" if bare else f"\n\n{_LABELS[message['role']]}: "
        calls = message.get("tool_calls")
        calls = f" {json.dumps(calls, ensure_ascii=False)}" if calls else ""
        written.append(label + message["content"] + calls)
    return "".join(written)


def dialogue_text(messages: Sequence[Message]) -> str:
    """What people and reward functions read: a single turn's text, or the dialogue's transcript."""
    if len(messages) == 1:
        content: str = messages[0]["content"]
        return content
    start = SYSTEM if messages[0]["role"] == "system" else ""
    return start + transcript(messages).strip()
