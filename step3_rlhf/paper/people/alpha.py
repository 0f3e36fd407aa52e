"""Chooses conditional PM's threshold on validation questions, without training for any α.

The optimum of sequence-level conditional PM is known in closed form: ∝ w(y) e^{r(y)/β} with
w(y) = 1 where π_ref(y) ≥ α and π_ref(y) elsewhere. On the board it is computed exactly. Its mass
outside is estimated by importance sampling from the reference:

    Z_outside = E_{y ~ π_ref} [ 1{y not on the board} · w(y)/π_ref(y) · e^{r(y)/β} ]

A low α matches the reward model on the whole board but also counts much that is not on it as
natural. The α that is chosen is the largest one whose total variation on the board to softmax(r/β)
is the smallest, up to `TOLERANCE`. No collapsed policy passes for good here, because it is far from
softmax(r/β). Where policies are aligned on their own draws, the optimum's mass outside is what
they arrive at. Then only those α are considered whose optimum exceeds the reference's mass outside
by at most `OUTSIDE_MARGIN` and leaves at least half of the reference's mass on the board. Direct
optimization does not determine the mass outside; its anchor does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from step3_rlhf.paper.people.boards import Board
from step3_rlhf.paper.people.measure import total_variation

ALPHAS = (1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Candidates: probabilities of whole responses."""

TOLERANCE = 0.01

OUTSIDE_MARGIN = 0.05

LEAST_KEPT = 0.5
"""Share of the reference's mass on the board that the optimum has to leave there."""


@dataclass(frozen=True)
class Drawn:
    """A response that the reference drew and that is not on the board."""

    ref_logp: float
    reward: float


@dataclass(frozen=True)
class Candidate:
    """What the optimum under one α would be, in the mean over validation questions."""

    alpha: float
    tv_to_reward: float
    outside_mass: float
    natural: float
    """Share of the board's answers that count as natural."""


@dataclass(frozen=True)
class Choice:
    """The chosen α and what it was chosen by."""

    alpha: float
    reference_outside_mass: float
    candidates: list[Candidate]


def choose(
    evaluation: dict[str, Any], boards: Sequence[Board], instances: Any, outside_matters: bool
) -> Choice:
    """The choice from an evaluation of the reference itself on validation questions.

    Args:
        evaluation: evaluation.json, for β.
        instances: the lines of instances.jsonl, with the reference's draws.
        outside_matters: whether the mass outside of the optimum limits the choice.
    """
    beta = evaluation["preference_temperature"]
    drawn = {line["prompt"]: line["responses"] for line in instances}
    known = [board for board in boards if board.prompt in drawn]
    candidates = [
        candidate(
            alpha,
            [(board, drawn[board.prompt]) for board in known],
            beta,
        )
        for alpha in ALPHAS
    ]
    outside = math.fsum(board.outside or 0.0 for board in known) / len(known)
    bound = min(outside + OUTSIDE_MARGIN, 1 - LEAST_KEPT * (1 - outside))
    allowed = [c for c in candidates if c.outside_mass <= bound or not outside_matters]
    if not allowed:
        best = min(candidates, key=lambda c: c.outside_mass)
    else:
        nearest = min(c.tv_to_reward for c in allowed)
        matching = [c for c in allowed if c.tv_to_reward <= nearest + TOLERANCE]
        best = max(matching, key=lambda c: c.alpha)
    return Choice(best.alpha, outside, candidates)


def candidate(
    alpha: float, questions: Sequence[tuple[Board, list[dict[str, Any]]]], beta: float
) -> Candidate:
    """The means over questions, each a board with the reference's draws."""
    found = []
    for board, responses in questions:
        ref_logp = (board.reference * (1 - (board.outside or 0.0))).clamp_min(1e-300).log()
        inside = log_weight(ref_logp, alpha) + board.rewards / beta
        off = [
            Drawn(response["ref_logp"], response["reward"])
            for response in responses
            if response["text"].strip() not in board.answers
        ]
        outside = outside_log_mass(off, len(responses), alpha, beta)
        log_inside = inside.logsumexp(0).item()
        found.append(
            (
                total_variation(inside.softmax(0), board.reward),
                1 / (1 + math.exp(min(700.0, log_inside - outside))),
                (ref_logp >= math.log(alpha)).double().mean().item(),
            )
        )
    means = [math.fsum(values) / len(found) for values in zip(*found, strict=True)]
    return Candidate(alpha, *means)


def log_weight(ref_logp: Tensor, alpha: float) -> Tensor:
    """log w: 0 where π_ref ≥ α, log π_ref elsewhere (Def. 4.1)."""
    return torch.where(ref_logp >= math.log(alpha), 0.0, ref_logp)


def outside_log_mass(off: Sequence[Drawn], draws: int, alpha: float, beta: float) -> float:
    """log of the estimated Σ w(y) e^{r(y)/β} outside the board; −inf without a draw there.

    Args:
        off: those of the reference's `draws` that are not on the board.
    """
    if not off:
        return -math.inf
    ref_logp = torch.tensor([y.ref_logp for y in off], dtype=torch.float64)
    rewards = torch.tensor([y.reward for y in off], dtype=torch.float64)
    terms = log_weight(ref_logp, alpha) - ref_logp + rewards / beta
    return (terms.logsumexp(0) - math.log(draws)).item()
