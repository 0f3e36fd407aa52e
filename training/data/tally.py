"""Counts of what happened to the data: no record is dropped or changed silently."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

CountUp = Callable[..., None]
"""Adds to a tally under one heading; called with what is counted and, unless 1, how many."""


class Tally:
    """Ordered counts under headings (sources, stages), printable as one line per heading."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}

    def add(self, heading: str, what: str, count: int = 1) -> None:
        """Add `count` to `what`; zero adds no entry."""
        if count:
            self._counts.setdefault(heading, Counter())[what] += count

    def under(self, heading: str) -> CountUp:
        """`add` with the heading filled in."""
        return partial(self.add, heading)

    def count(self, what: str) -> int:
        """The count of `what` over all headings."""
        return sum(counts[what] for counts in self._counts.values())

    @property
    def counts(self) -> Mapping[str, Mapping[str, int]]:
        """heading -> what -> how many."""
        return {heading: dict(counts) for heading, counts in self._counts.items()}

    def lines(self) -> list[str]:
        """One line per heading: `hh.jsonl: 2312 read; 5 dropped: their prompts differ`."""
        return [
            f"{heading}: " + "; ".join(f"{count} {what}" for what, count in counts.items())
            for heading, counts in self._counts.items()
        ]

    def __str__(self) -> str:
        return "\n".join(self.lines())


PLACES = 3
"""Places that are named of each kind of mistake."""


class Mistakes:
    """Faults of records; those of one kind are told once, with their number and first places."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str], list[tuple[str, str]]] = {}

    def add(self, origin: str, message: str) -> None:
        """Add a fault of the record at `origin`, "file:line"."""
        source = origin.rpartition(":")[0]
        # Numbers in a message are the record's own.
        kind = re.sub(r"(#, )+#", "#", re.sub(r"-?\d+(\.\d+)?", "#", message))
        self._kinds.setdefault((source, kind), []).append((origin, message))

    def lines(self) -> list[str]:
        """One line for each kind: `a.jsonl:1: no 'prompt' (30 such records: 1, 2, 3, …)`."""
        return [
            f"{found[0][0]}: {found[0][1]}"
            + (f" ({len(found)} such records: {_numbers(found)})" if len(found) > 1 else "")
            for found in self._kinds.values()
        ]

    def left_out(self) -> list[tuple[str, int]]:
        """For a tally: what was left out and where first, and how many."""
        return [
            (f"left out: {found[0][1]} (at {_numbers(found)})", len(found))
            for found in self._kinds.values()
        ]

    def __len__(self) -> int:
        return sum(map(len, self._kinds.values()))


def _numbers(found: list[tuple[str, str]]) -> str:
    numbers = [origin.rpartition(":")[2] for origin, _ in found[:PLACES]]
    return ", ".join(numbers) + (", …" if len(found) > PLACES else "")
