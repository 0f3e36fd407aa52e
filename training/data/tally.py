"""Counts of what happened to the data: no record is dropped or changed silently."""

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
