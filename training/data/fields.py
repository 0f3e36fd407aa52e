"""Fields of raw records, each with the type that its format asks for."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from training.errors import did_you_mean

Raw = Mapping[str, Any]

RESPONSES = ("completion", "response", "output")
"""Names of a single response."""
SCORES = ("score", "helpfulness")
LABELS = ("label", "kto_tag")
SHAREGPT = ("conversations", "conversation")
FIELDS = (
    *"prompt system chosen rejected tie responses ranking unranked scores completions".split(),
    *"instruction input context history messages info summaries choice".split(),
    *"subreddit title post summary".split(),
    *(*RESPONSES, *SCORES, *LABELS, *SHAREGPT),
)
"""Names of all fields that some format reads."""


class RecordFault(Exception):
    """A record that violates its format; the user has to fix it or to have it skipped."""


class Unusable(Exception):
    """A well-formed record that cannot be learned from; it is counted and dropped."""


def has(raw: Raw, *names: str) -> bool:
    """Whether any of the fields is there; null is absent."""
    return any(raw.get(name) is not None for name in names)


def first_of(raw: Raw, names: Iterable[str], otherwise: str) -> str:
    """The first of the names that the record has."""
    return next((name for name in names if has(raw, name)), otherwise)


def required(raw: Raw, name: str) -> Any:
    """The value of a field that must be there; null counts as absent."""
    if raw.get(name) is None:
        if name in raw:
            raise RecordFault(f"{name!r} is null")
        others = [key for key in raw if key != name]
        raise RecordFault(f"no {name!r}{did_you_mean(name, others) if others else ''}")
    return raw[name]


def text(raw: Raw, name: str) -> str:
    """A text without white space around it."""
    value = required(raw, name)
    if not isinstance(value, str):
        raise RecordFault(f"{name!r} is {type(value).__name__}, a text was expected")
    return value.strip()


def optional_text(raw: Raw, name: str) -> str:
    """A text, empty if the field is absent."""
    return text(raw, name) if has(raw, name) else ""


def number(raw: Raw, name: str) -> float:
    """A finite number."""
    value = required(raw, name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecordFault(f"{name!r} is {type(value).__name__}, a number was expected")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise RecordFault(f"{name!r} is not finite")
    return found


def texts(raw: Raw, name: str) -> list[str]:
    """A list of at least two texts."""
    value = required(raw, name)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise RecordFault(f"{name!r} is not a list of texts")
    if len(value) < 2:
        raise RecordFault(f"{name!r} holds fewer than two texts")
    return [item.strip() for item in value]


def truth(raw: Raw, name: str) -> bool:
    """True or false; also 1 or 0."""
    value = required(raw, name)
    if value not in (True, False):  # 1 and 0 are equal to them
        raise RecordFault(f"{name!r} is {value!r}, true or false was expected")
    return bool(value)
