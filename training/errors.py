"""Errors that end in one message, without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A fault in what the user gave: a config, a data file, a path, a reward function. Exit 2."""

    def __init__(self, faults: str | Iterable[str], heading: str = "") -> None:
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        self.heading = heading
        lines = ([heading] if heading else []) + [f"  - {fault}" for fault in self.faults]
        super().__init__(self.faults[0] if len(lines) == 1 and not heading else "\n".join(lines))


class UnreachableError(UserError):
    """The Hub has what was named, or does not; it cannot be asked from here."""


class RunError(Exception):
    """A sound run that cannot go on: no memory, no disk, figures that are not finite. Exit 1.

    everywhere: all ranks raise it, so rank 0 says it; otherwise the one that found it does.
    """

    def __init__(self, message: str, everywhere: bool = True) -> None:
        super().__init__(message)
        self.everywhere = everywhere


class NotFiniteError(Exception):
    """A loss, reward or gradient that is NaN or infinite, found before it reached the weights."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known name, or the known names themselves."""
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if nearest:
        return f"; did you mean {nearest[0]!r}?"
    return f"; known here: {', '.join(known)}"
