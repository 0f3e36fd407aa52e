"""Means and their 95 % confidence intervals."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean over independent prompts."""

    mean: float
    ci95: float
    """Half the width of the normal 95 % confidence interval: 1.96 · standard error."""
    count: int


def estimate(values: Tensor) -> Estimate:
    """Mean of [n] values with its confidence interval (infinite for a single value)."""
    values = values.double()
    n = values.numel()
    spread = values.std(unbiased=True).item() if n > 1 else float("inf")
    return Estimate(values.mean().item(), 1.96 * spread / n**0.5, n)


def mean_ci95(values: Tensor, prompts: Tensor) -> float | None:
    """Half the width of the 95 % confidence interval of a mean over pairs.

    Prompts are independent; the pairs of one prompt (of a ranking, or of several comparisons) are
    not. The mean is the ratio of two sums over the G prompts, of values and of pairs, so with e_g
    the sum of a prompt's residuals x − x̄ it is 1.96 · sqrt(G/(G − 1) · Σ_g e_g²) / n (Cochran
    1977, section 6.5). With one pair to a prompt this is 1.96 · s/√n.

    Args:
        values: [n].
        prompts: [n] long, the number of the prompt that each pair belongs to.

    Returns:
        None where there is a single prompt, which says nothing about others.
    """
    _, group = prompts.unique(return_inverse=True)
    count = int(group.max()) + 1
    if count < 2:
        return None
    residuals = values.double() - values.double().mean()
    sums = torch.zeros(count, dtype=torch.float64).index_add(0, group, residuals)
    deviation = (count / (count - 1) * sums.square().sum()).sqrt() / len(values)
    return (1.96 * deviation).item()
