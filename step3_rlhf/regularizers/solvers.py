"""Solvers behind the exact optima."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from step3_rlhf.regularizers.base import NoOptimumError, ResponseSet


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
