"""Reads JSONL files of our own formats, all of whose lines must be sound."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from training.errors import UserError

Parsed = TypeVar("Parsed")


def parsed_lines(path: str, parse: Callable[[Any], Parsed]) -> list[Parsed]:
    """`parse` of each line's value; empty lines are left out.

    Args:
        parse: raises ValueError, KeyError or TypeError where a value is not as it should be.

    Raises:
        UserError: the file cannot be read; or lists every faulty line with its number.
    """
    found, faults = [], []
    try:
        # Not splitlines: it would also split a text at line separators such as U+2028.
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: unreadable: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(parse(json.loads(line)))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            faults.append(f"{path}:{number}: {error}")
    if faults:
        raise UserError(faults, f"{len(faults)} faulty lines:")
    return found
