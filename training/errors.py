"""Errors that end a program with one message and no traceback."""

import difflib
import signal
from collections.abc import Iterable


class UserError(Exception):
    """A fault in the user's input: config, data file, path, reward function. Exit code 2."""

    def __init__(self, faults: str | Iterable[str], heading: str = "") -> None:
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        self.heading = heading
        lines = ([heading] if heading else []) + [f"  - {fault}" for fault in self.faults]
        super().__init__(self.faults[0] if len(lines) == 1 and not heading else "\n".join(lines))


class UnreachableError(UserError):
    """Something named on the Hub could not be checked, because the Hub cannot be reached."""


class RunError(Exception):
    """A valid run cannot continue: out of memory or disk, or a value is not finite. Exit code 1.

    everywhere: all ranks raise the error, so only rank 0 prints it; otherwise the rank that found
        it does.
    """

    def __init__(self, message: str, everywhere: bool = True) -> None:
        super().__init__(message)
        self.everywhere = everywhere


class Stopped(Exception):
    """The run ended early on request; `code` is the exit code that shells expect."""

    def __init__(self, number: int, step: int | None = None) -> None:
        """`step`: the step of the checkpoint; None if all steps were done and models written."""
        name = signal.Signals(number).name
        super().__init__(
            f"Stopped by {name} after the training; its models are written"
            if step is None
            else f"Stopped by {name} after step {step}, with a checkpoint; "
            "resume_from_checkpoint=latest resumes from it"
        )
        self.code = 128 + number


class NotFiniteError(Exception):
    """A loss, reward or gradient is NaN or infinite; found before it reached the weights."""


KNOWN = "; known here: "


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known name; if none is near, all known names."""
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if nearest:
        return f"; did you mean {nearest[0]!r}?"
    return f"{KNOWN}{', '.join(known)}"
