"""Solvers for the exact optima."""

from __future__ import annotations

from collections.abc import Callable

from step3_rlhf.regularizers.base import NoOptimumError, ResponseSet
from training.deferred import Tensor, torch


def decreasing_root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a decreasing function changes its sign in [low, high], to float64 precision."""
    for _ in range(64):  # each halves the bracket, and a float64 has 53 binary digits
        middle = low + (high - low) / 2.0
        if function(middle) > 0.0:
            low = middle
        else:
            high = middle
    return low if abs(function(low)) < abs(function(high)) else high


def backward_induction(
    responses: ResponseSet, step: Callable[[Tensor, Tensor], tuple[Tensor, float]]
) -> Tensor:
    """Solve a per-token problem backward, from the ends of the responses to the empty prefix.

    Args:
        step: solves one prefix. From the values [C] of the C tokens that may follow and their
            reference log-probabilities [C], normalized over these tokens, it returns their log π
            [C] and the value of the prefix. The reference is taken conditional on the set: the
            weight of a token is that of all responses through it.

    Returns:
        [K] log π(y) = Σ_t log π_t.
    """
    log_pi = torch.zeros_like(responses.rewards)
    positions = [row.nonzero().flatten().tolist() for row in responses.mask]

    def value_and_mass(rows: list[int], depth: int) -> tuple[float, float]:
        """Value of the prefix that `rows` share, and log of its reference mass within the set."""
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
