"""The exact optimum of a regularized objective on a finite set of responses.

    π* = argmax_π E_{y~π}[r(y) + R(π(y))],   π a distribution over the set

On a finite set the optimum exists for every sequence-level regularizer of this package: the
objective is concave and the set of distributions compact. A token-level f-divergence, which is an
approximation, has the distribution at which PPO with its marginal comes to rest in place of the
argmax (divergences.py). Everything here is float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from training.errors import UserError

if TYPE_CHECKING:
    from step3_rlhf.regularization import Regularizer

TOLERANCE = 1e-10
"""Largest |Σπ − 1| with which a solution is accepted."""


class NoOptimumError(UserError):
    """The optimum does not exist, is not known, or was not found to the stated precision."""


@dataclass(frozen=True)
class ResponseSet:
    """All responses to one prompt that count, K of them, right-padded to T tokens.

    tokens    [K, T] int64    token ids; anything where mask is false
    ref_logp  [K, T] float64  log π_ref(token | prefix), nats; anything where mask is false
    mask      [K, T] bool     the response's tokens, its end-of-sequence token included
    rewards   [K]    float64  r(x, y)

    Example, "a" and "b" as one token each: tokens [[7], [9]], ref_logp [[-0.1], [-2.4]],
    mask [[True], [True]], rewards [0.0, 1.0].
    """

    tokens: Tensor
    ref_logp: Tensor
    mask: Tensor
    rewards: Tensor

    def __post_init__(self) -> None:
        count = len(self.rewards)
        shape = self.tokens.shape
        if count == 0 or len(shape) != 2 or shape[0] != count:
            raise ValueError(
                f"tokens {tuple(shape)} and rewards [{count}]: expected [K, T] and [K]"
            )
        if self.ref_logp.shape != shape or self.mask.shape != shape:
            raise ValueError("tokens, ref_logp and mask must have one shape, [K, T]")
        if not torch.isfinite(self.rewards).all():
            raise NoOptimumError("rewards: all must be finite for an optimum to exist")
        object.__setattr__(self, "mask", self.mask.bool())
        object.__setattr__(self, "rewards", self.rewards.detach().double())
        object.__setattr__(self, "ref_logp", self.ref_logp.detach().double())

    @property
    def sequence_ref_logp(self) -> Tensor:
        """[K] log π_ref(y|x), nats."""
        return torch.where(self.mask, self.ref_logp, 0.0).sum(-1)


def optimum(regularizer: Regularizer, responses: ResponseSet) -> Tensor:
    """The optimal distribution over the set.

    Returns:
        [K] float64 log-probabilities (nats), normalized over the set; −inf where π* is zero.

    Raises:
        NoOptimumError: if it is not known or its equations were not solved to |Σπ − 1| ≤ 1e-10.
    """
    log_pi = regularizer.log_optimum(responses)
    residual = torch.logsumexp(log_pi, 0).expm1().abs().item()
    if not residual <= TOLERANCE:
        raise NoOptimumError(f"{regularizer.name}: no optimum found; Σπ misses 1 by {residual:.1e}")
    return torch.log_softmax(log_pi, 0)


def optimum_of(regularizer: Regularizer, rewards: Tensor, ref_logp: Tensor) -> Tensor:
    """`optimum` for plain vectors [K]: each response is one token."""
    count = len(rewards)
    return optimum(
        regularizer,
        ResponseSet(
            tokens=torch.arange(count)[:, None],
            ref_logp=ref_logp[:, None],
            mask=torch.ones(count, 1, dtype=torch.bool),
            rewards=rewards,
        ),
    )


def decreasing_root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a decreasing function changes its sign in [low, high], as exactly as float64 says."""
    for _ in range(64):  # each halves the bracket; 64 are more than a float64 has digits
        middle = low + (high - low) / 2.0
        if function(middle) > 0.0:
            low = middle
        else:
            high = middle
    return low if abs(function(low)) < abs(function(high)) else high


def backward_induction(
    responses: ResponseSet, step: Callable[[Tensor, Tensor], tuple[Tensor, float]]
) -> Tensor:
    """Solve a per-token problem from the ends of the responses to their common beginning.

    Args:
        step: from the values [C] of the tokens that may follow a prefix and their reference
            log-probabilities [C], normalized over them, to their log π [C] and the prefix's value.
            The reference is taken conditional on the set: a token weighs what the responses
            through it weigh together.

    Returns:
        [K] log π(y) = Σ_t log π_t.
    """
    log_pi = torch.zeros_like(responses.rewards)
    positions = [row.nonzero().flatten().tolist() for row in responses.mask]

    def value_and_mass(rows: list[int], depth: int) -> tuple[float, float]:
        """Of the prefix that `rows` share: its value; log of its reference mass in the set."""
        ended = [row for row in rows if len(positions[row]) == depth]
        if ended:
            if len(rows) > 1:
                raise NoOptimumError(
                    "responses: one of them is a prefix of (or the same as) another, so that "
                    "ending there is no token's choice; include the end-of-sequence token"
                )
            return responses.rewards[rows[0]].item(), 0.0
        branches: dict[int, list[int]] = {}
        for row in rows:
            branches.setdefault(int(responses.tokens[row, positions[row][depth]]), []).append(row)
        further = [value_and_mass(branch, depth + 1) for branch in branches.values()]
        values, masses = log_pi.new_tensor(further).unbind(-1)
        firsts = [branch[0] for branch in branches.values()]
        ref = torch.stack([responses.ref_logp[row, positions[row][depth]] for row in firsts])
        mass = torch.logsumexp(ref + masses, 0)
        step_logp, prefix_value = step(values, ref + masses - mass)
        for branch, logp in zip(branches.values(), step_logp, strict=True):
            log_pi[branch] += logp
        return prefix_value, mass.item()

    value_and_mass(list(range(len(positions))), 0)
    return log_pi
