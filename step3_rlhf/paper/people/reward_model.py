"""How well the reward model foretells what people say, exactly over the boards' pairs of answers.

A person who said a prefers it to b. Of those who said one of the two, s_a/(s_a + s_b) prefer a; the
best prediction is that share itself, whose accuracy and log-loss are the ceilings.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from step3_rlhf.paper.people.boards import Board
from training.plotting import ReliabilityBin
from training.statistics import Estimate, ratio_estimate

BINS = 10


@dataclass(frozen=True)
class RewardModel:
    """Figures over people's choices between pairs, with intervals over questions."""

    questions: int
    accuracy: Estimate
    log_loss: Estimate
    best_accuracy: float
    best_log_loss: float
    ece: float
    reliability: list[ReliabilityBin]


@dataclass(frozen=True)
class Pairs:
    """The pairs of one board's answers, each [pairs] float64."""

    weight: Tensor
    """s_a + s_b: how many people's choices a pair stands for, of those who answered."""
    share: Tensor
    """s_a/(s_a + s_b)."""
    margin: Tensor
    """r(a) − r(b)."""


def pairs_of(people: Tensor, rewards: Tensor) -> Pairs:
    """All pairs of different answers, each once."""
    a, b = torch.triu_indices(len(people), len(people), offset=1)
    weight = people[a] + people[b]
    return Pairs(weight, people[a] / weight, rewards[a] - rewards[b])


def measure_reward_model(boards: Sequence[Board]) -> RewardModel:
    """The figures over several questions.

    Raises:
        ValueError: there is no question.
    """
    if not boards:
        raise ValueError("no questions")
    pairs = [pairs_of(board.people, board.rewards) for board in boards]
    weights = torch.stack([p.weight.sum() for p in pairs])

    def mean(values: list[Tensor]) -> Estimate:
        sums = [(p.weight * v).sum() for p, v in zip(pairs, values, strict=True)]
        return ratio_estimate(torch.stack(sums), weights)

    bins = reliability(pairs)
    return RewardModel(
        len(boards),
        mean([accuracy(p.share, p.margin) for p in pairs]),
        mean([log_loss(p.share, p.margin) for p in pairs]),
        mean([accuracy(p.share, p.share.logit()) for p in pairs]).mean,
        mean([log_loss(p.share, p.share.logit()) for p in pairs]).mean,
        sum(b["pairs"] / 1e6 * abs(b["accuracy"] - b["confidence"]) for b in bins),
        bins,
    )


def accuracy(share: Tensor, margin: Tensor) -> Tensor:
    """The share of people whose choice has the higher reward; a tie is half right."""
    return torch.where(margin == 0, 0.5, torch.where(margin > 0, share, 1 - share))


def log_loss(share: Tensor, margin: Tensor) -> Tensor:
    """The mean of −log σ(margin) over people's choices, in nats; of 0 · ∞, 0."""
    return -(
        torch.where(share > 0, share * logsigmoid(margin), 0.0)
        + torch.where(share < 1, (1 - share) * logsigmoid(-margin), 0.0)
    )


def reliability(pairs: Sequence[Pairs]) -> list[ReliabilityBin]:
    """Choices by predicted probability of the answer that the model prefers; empty bins left out.

    `pairs` of a bin is its share of all choices in millionths, a whole number.
    """
    weight, share, margin = (
        torch.cat([getattr(p, name) for p in pairs]) for name in ("weight", "share", "margin")
    )
    weight = weight / weight.sum()
    confidence, right = margin.abs().sigmoid(), accuracy(share, margin)
    index = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    found: list[ReliabilityBin] = []
    for number in range(BINS):
        inside = index == number
        total = weight[inside].sum()
        if total > 0:
            found.append(
                {
                    "low": 0.5 + number * 0.5 / BINS,
                    "high": 0.5 + (number + 1) * 0.5 / BINS,
                    "pairs": round(total.item() * 1e6),
                    "confidence": ((weight * confidence)[inside].sum() / total).item(),
                    "accuracy": ((weight * right)[inside].sum() / total).item(),
                }
            )
    return found
