"""What is measured on a board, exactly: pure functions, one number for each question."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from step3_rlhf.paper.people.boards import Board
from training.statistics import Estimate, estimate, numbered

MINORITY = 0.1
"""An answer that a smaller share of people gave is a minority's."""

SAMPLED_PEOPLE = 94
"""How many other people are asked in the reference row: about as many as stand behind a board."""

SAMPLES = 200
"""Draws of so many people by which the row is estimated, for each question."""


def total_variation(p: Tensor, q: Tensor) -> float:
    """½ Σ |p − q| of two distributions [K]."""
    return 0.5 * (p - q).abs().sum().item()


def entropy(p: Tensor) -> float:
    """−Σ p log p in nats."""
    return torch.special.entr(p).sum().item()


def minority_share(p: Tensor, people: Tensor) -> float | None:
    """What p gives the answers of minorities together; None if there are none."""
    rare = people < MINORITY
    return p[rare].sum().item() if rare.any() else None


def top_share(p: Tensor, people: Tensor) -> float:
    """What p gives the answer that most people gave."""
    return p[people.argmax()].item()


def pm_divergence(
    policy: Tensor, rewards: Tensor, drawn: Tensor, unequal: bool, beta: float = 1.0
) -> float | None:
    """The expected PM divergence (section 6.1) of two independent draws from `drawn`.

    E KL(σ(log π(y₁) − log π(y₂)) ‖ σ((r₁ − r₂)/β)), in nats; equal responses have 0.

    Args:
        policy, rewards, drawn: [K].
        unequal: given that the two differ; None if they never do.
    """
    logits = _differences(policy.clamp_min(1e-300).log())
    targets = _differences(rewards / beta)
    p = logits.sigmoid()
    divergence = p * (_log_sigmoid(logits) - _log_sigmoid(targets)) + (1 - p) * (
        _log_sigmoid(-logits) - _log_sigmoid(-targets)
    )
    weights = drawn[:, None] * drawn[None, :]
    if not unequal:
        return (weights * divergence).sum().item()
    weights = weights - weights.diag().diag()
    total = weights.sum().item()
    return (weights * divergence).sum().item() / total if total > 0 else None


def _differences(values: Tensor) -> Tensor:
    return values[:, None] - values[None, :]


def _log_sigmoid(values: Tensor) -> Tensor:
    return torch.nn.functional.logsigmoid(values)


Figure = Callable[[Board], float | None]

FIGURES: dict[str, Figure] = {
    "tv_to_people": lambda b: total_variation(b.policy, b.people),
    "tv_to_reward": lambda b: total_variation(b.policy, b.reward),
    "tv_to_optimum": lambda b: None if b.optimum is None else total_variation(b.policy, b.optimum),
    "reward_to_people": lambda b: total_variation(b.reward, b.people),
    "outside_mass": lambda b: b.outside,
    "other_answers": lambda b: b.other_answers,
    "pm_divergence": lambda b: pm_divergence(b.policy, b.rewards, b.policy, unequal=False),
    "pm_divergence_unequal": lambda b: pm_divergence(b.policy, b.rewards, b.policy, unequal=True),
    "pm_divergence_reference": lambda b: pm_divergence(
        b.policy, b.rewards, b.reference, unequal=True
    ),
    "entropy": lambda b: entropy(b.policy),
    "top_share": lambda b: top_share(b.policy, b.people),
    "minority_share": lambda b: minority_share(b.policy, b.people),
}
"""Each figure of a board, under its name in report.json. PM divergences are at β = 1."""


def measure(runs: Sequence[Sequence[Board]], figure: Figure) -> Estimate | None:
    """The mean over questions, with an interval over questions; None if no question has one.

    Args:
        runs: the boards of several seeds, whose figures are averaged question by question.
    """
    values: dict[str, list[float]] = {}
    for boards in runs:
        for board in boards:
            value = figure(board)
            if value is not None:
                values.setdefault(board.id, []).append(value)
    if not values:
        return None
    means = [math.fsum(found) / len(found) for found in values.values()]
    return estimate(torch.tensor(means, dtype=torch.float64), numbered(list(values)))


# Reference rows


def uniform(people: Tensor) -> Tensor:
    """Every answer on the board equally often."""
    return torch.full_like(people, 1 / len(people))


def majority(people: Tensor) -> Tensor:
    """Only the answer that most people gave."""
    return torch.zeros_like(people).index_fill(0, people.argmax(), 1.0)


def squared(people: Tensor) -> Tensor:
    """KL's optimum at β = 1 where reference and e^r are both people's shares: ∝ s²."""
    return people.square() / people.square().sum()


def sampling_distance(people: Tensor, seed: int = 0) -> float:
    """Expected total variation between people's shares and those of a fresh sample of people."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.multinomial(
        people.expand(SAMPLES, -1), SAMPLED_PEOPLE, replacement=True, generator=generator
    )
    shares = torch.stack([(draws == answer).double().mean(1) for answer in range(len(people))], 1)
    return (0.5 * (shares - people).abs().sum(1)).mean().item()
