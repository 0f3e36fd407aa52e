"""How often people call responses tied: the prevalences δ_n of the Davidson–Luce model.

They are learned together with the rewards (training/preferences/davidson_luce.py) and are of no use
afterwards: what a policy has to match are the choices of those who decide.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from datasets import Dataset
from torch import Tensor, nn

from training.data import Split
from training.errors import UserError

STEP = 0.01
"""By how much a log δ changes in an optimizer step of AdamW, at most, at the full learning rate."""


class WithTies(nn.Module):
    """A scalar model together with log δ_n for n = 2 … D."""

    def __init__(self, scalar: nn.Module, start: Tensor, learning_rate: float) -> None:
        """
        Args:
            start: [D − 1] log δ_n before the first step.
            learning_rate: of the scalar model, which is far too small for δ.
        """
        super().__init__()
        self.scalar = scalar
        self.moved = nn.Parameter(torch.zeros_like(start))
        self._start = start
        self._scale = STEP / learning_rate

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the values [batch, length] and log δ_n [D − 1], float32."""
        moved = self.moved.float()
        # The gradient is that of log δ, so that clipping of gradients does not notice the scale.
        log_ties = self._start.to(moved.device) + moved + (self._scale - 1) * moved.detach()
        return self.scalar(input_ids, attention_mask), log_ties


def first_prevalences(data: Dataset) -> Tensor:
    """[D − 1] log δ_n, float32, as they would be if all responses were equally good.

    Of a choice among m responses δ_n C(m, n)/m is then the odds of a tie of n to a single one. For
    pairs this is the maximum of the likelihood at equal rewards; longer rankings are pooled.

    Args:
        data: columns `levels`, `unranked` and `largest_tie`; D is the largest of the latter.
    """
    largest = max(data["largest_tie"][:], default=1)
    if largest == 1:
        return torch.zeros(0)
    choices: Counter[tuple[int, int]] = Counter()
    for row in data.select_columns(["levels", "unranked", "largest_tie"]):
        if row["largest_tie"] > 1:
            choices.update(choices_of(row["levels"], row["unranked"]))
    singles = sum(count for (_, n), count in choices.items() if n == 1)
    sets_of_one = sum(m * count for (m, _), count in choices.items())
    found = []
    for size in range(2, largest + 1):
        ties = sum(count for (_, n), count in choices.items() if n == size)
        sets = sum(math.comb(m, size) * count for (m, _), count in choices.items())
        # half a choice more of each kind, so that one that never occurs is rare, not impossible
        found.append(math.log((ties + 0.5) * sets_of_one / ((singles + 0.5) * max(sets, 1))))
    return torch.tensor(found)


def require_decided(held_out: Mapping[Split, Dataset]) -> None:
    """Refuse held-out data in which nobody preferred one response to another.

    Raises:
        UserError: names the split.
    """
    for split, data in held_out.items():
        levels, unranked = data["levels"][:], data["unranked"][:]
        decided = any(
            behind > 0 or len(set(of)) > 1 for of, behind in zip(levels, unranked, strict=True)
        )
        if len(data) and not decided:
            raise UserError(
                f"None of the {split} prompts' comparisons is decided, all are ties: accuracy and "
                "calibration are of decided ones; raise data.eval_fraction or data.max_eval_samples"
            )


def choices_of(levels: Iterable[int], unranked: int) -> list[tuple[int, int]]:
    """Among how many responses each choice of a ranking was, and how many it names.

    A single response that is left is no choice.
    """
    places = list(levels)
    left, found = len(places), []
    for size in Counter(places[: len(places) - unranked]).values():
        if left > 1:
            found.append((left, size))
        left -= size
    return found
