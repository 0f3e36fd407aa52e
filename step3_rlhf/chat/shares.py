"""How often each answer is given, among independent draws: pure functions."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from training.statistics import share_interval


@dataclass(frozen=True)
class Share:
    """An answer's part of all draws, with its 95 % interval (`share_interval`)."""

    count: int
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:6.1%} [{self.low:.1%}, {self.high:.1%}]"


class Distribution:
    """What one model answered in `total` independent draws; at least one."""

    def __init__(self, answers: Iterable[str]) -> None:
        self.counts = Counter(grouped(answer) for answer in answers)
        self.total = self.counts.total()

    @property
    def distinct(self) -> int:
        """Number of different answers."""
        return len(self.counts)

    def __str__(self) -> str:
        return f"{self.total} answers, {self.distinct} different, entropy {self.entropy:.2f} nats"

    @property
    def entropy(self) -> float:
        """−Σ p log p of the drawn shares, nats.

        It is at most log(total), and below the policy's own entropy on average, by about
        (distinct − 1)/(2 · total).
        """
        parts = [count / self.total for count in self.counts.values()]
        return 0.0 - sum(part * math.log(part) for part in parts)

    def share(self, answer: str) -> Share:
        return self._share_of(self.counts[answer])

    def outside(self, answers: Sequence[str]) -> Share:
        """The share of all other answers."""
        return self._share_of(self.total - sum(self.counts[answer] for answer in answers))

    def _share_of(self, count: int) -> Share:
        return Share(count, count / self.total, *share_interval(count, self.total))


@dataclass(frozen=True)
class Row:
    """One answer, or all that are not shown one by one, and its share among each model's."""

    label: str
    shares: tuple[Share, ...]


def rows_of(distributions: Sequence[Distribution], top: int) -> list[Row]:
    """The `most_common` answers, then all others together."""
    answers = most_common(distributions, top)
    rows = [
        Row(answer or "(no text)", tuple(each.share(answer) for each in distributions))
        for answer in answers
    ]
    kinds = len({answer for each in distributions for answer in each.counts} - set(answers))
    if kinds:
        outside = tuple(each.outside(answers) for each in distributions)
        rows.append(Row(f"other ({kinds} different)", outside))
    return rows


def grouped(answer: str) -> str:
    """The text that an answer is counted under: runs of white space become one space.

    Case and punctuation count. They are part of the response, whose distribution is aligned.
    """
    return " ".join(answer.split())


def most_common(distributions: Sequence[Distribution], top: int) -> list[str]:
    """The `top` answers with the largest mean share over the models, the largest first."""
    mean: dict[str, float] = defaultdict(float)
    for distribution in distributions:
        for answer, count in distribution.counts.items():
            mean[answer] += count / distribution.total
    return sorted(mean, key=lambda answer: (-mean[answer], answer))[:top]
