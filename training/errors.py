"""Errors that are the user's to mend: one message, no traceback, exit code 2."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A fault in what the user gave: a config, a data file, a path, a reward function."""

    def __init__(self, faults: str | Iterable[str], heading: str = "") -> None:
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        self.heading = heading
        lines = ([heading] if heading else []) + [f"  - {fault}" for fault in self.faults]
        super().__init__(self.faults[0] if len(lines) == 1 and not heading else "\n".join(lines))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known name, or the known names themselves."""
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if nearest:
        return f"; did you mean {nearest[0]!r}?"
    return f"; known here: {', '.join(known)}"
