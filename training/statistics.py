"""Means, ratios of sums, and their 95 % confidence intervals: pure functions."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Z95 = 1.96
"""Half the width of a 95 % confidence interval, in standard errors of a normal distribution."""


@dataclass(frozen=True)
class Estimate:
    """A mean over independent prompts."""

    mean: float
    ci95: float
    """Half the width of the normal 95 % confidence interval: 1.96 · standard error."""
    count: int


def estimate(values: Tensor) -> Estimate:
    """The mean of [n] independent values with its interval, which is infinite for a single one.

    One value per cluster and denominators of 1 turn `ratio_standard_error` into s/√n, with
    s² = Σ (x − x̄)² / (n − 1).
    """
    values = values.double()
    error = ratio_standard_error(values, torch.ones_like(values))
    return Estimate(values.mean().item(), Z95 * error, values.numel())


def mean_ci95(values: Tensor, prompts: Tensor) -> float | None:
    """Half the width of the 95 % confidence interval of a mean over pairs.

    Prompts are independent; the pairs of one prompt (those of a ranking, or several comparisons)
    are not, so each prompt is one cluster. The mean is a ratio of sums over prompts: of the values
    and of the numbers of pairs. With one pair per prompt the result is 1.96 · s/√n.

    Args:
        values: [n].
        prompts: [n] long, the number of the prompt that each pair belongs to.

    Returns:
        None for a single prompt, which says nothing about other prompts.
    """
    error = ratio_standard_error(values, torch.ones_like(values), clusters=prompts)
    return None if error == math.inf else Z95 * error


def ratio_standard_error(
    numerators: Tensor, denominators: Tensor, clusters: Tensor | None = None
) -> float:
    """Standard error of the ratio R = Σ y_i / Σ x_i over independent clusters of items.

    With the residuals z_i = y_i − R x_i and their sum e_g over each of the G clusters:

        SE(R) = sqrt(G/(G − 1) · Σ_g e_g²) / Σ_i x_i        (Cochran 1977, section 6.5)

    Args:
        numerators: [n], the y_i.
        denominators: [n], the x_i; their sum is not 0.
        clusters: [n] long, the cluster of each item; without it every item is its own cluster.

    Returns:
        The standard error; infinity for a single cluster.
    """
    y, x = numerators.double(), denominators.double()
    total = x.sum()
    sums = y - y.sum() / total * x
    if clusters is not None:
        present, group = clusters.unique(return_inverse=True)
        sums = sums.new_zeros(len(present)).index_add(0, group, sums)
    count = len(sums)
    if count < 2:
        return math.inf
    return ((count / (count - 1) * sums.square().sum()).sqrt() / total).item()
