"""Means, ratios of sums, and their 95 % confidence intervals: pure functions.

Items that share a cluster (the pairs of one prompt, the phrasings of one question) are not
independent; clusters are. Every interval is therefore over clusters: it says where the figure would
lie for other clusters drawn like these, not for other items of the same ones.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Method = Literal["t", "log t"]
"""How an interval is made; see `estimate`, `log_estimate` and `log_ratio_estimate`."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % confidence interval over clusters.

    For a single cluster there is no interval: `ci95`, `low` and `high` are None. `ci95` is half the
    interval's width; the interval is symmetric about `mean` only if `method` is "t".
    """

    mean: float
    ci95: float | None
    count: int
    """Number of items."""
    clusters: int
    """Number of independent clusters of items, G."""
    low: float | None = None
    high: float | None = None
    method: Method = "t"


def numbered(groups: Sequence[Hashable]) -> Tensor:
    """[n] long, the number of each item's group, in the order of first occurrence."""
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(group, len(numbers)) for group in groups]).long()


def estimate(values: Tensor, clusters: Tensor | None = None) -> Estimate:
    """The mean of [n] values with the interval mean ± t · SE.

    SE is cluster-robust (`ratio_standard_error` with denominators of 1), and t the 97.5 % quantile
    of Student's distribution with G − 1 degrees of freedom.

    Args:
        clusters: [n] long, the cluster of each value; without it every value is its own cluster.
    """
    return ratio_estimate(values, torch.ones_like(values, dtype=torch.float64), clusters)


def ratio_estimate(
    numerators: Tensor, denominators: Tensor, clusters: Tensor | None = None
) -> Estimate:
    """Σ y_i / Σ x_i with the interval ratio ± t · SE; arguments as in `ratio_standard_error`."""
    y, x = numerators.double(), denominators.double()
    ratio = (y.sum() / x.sum()).item()
    groups = count_clusters(y, clusters)
    half = half_width(ratio_standard_error(y, x, clusters), groups)
    low, high = (None, None) if half is None else (ratio - half, ratio + half)
    return Estimate(ratio, half, y.numel(), groups, low, high)


def log_ratio_estimate(
    numerators: Tensor, denominators: Tensor, clusters: Tensor | None = None
) -> Estimate:
    """exp(Σ y_i / Σ x_i), such as a perplexity, with the interval of the exponent.

    A perplexity's own distribution is skewed, and an interval that is symmetric about it may reach
    below 1. That of its logarithm cannot: exp(R ± t · SE(R)).
    """
    log = ratio_estimate(numerators, denominators, clusters)
    mean, low, high = (_exponential(part) for part in (log.mean, log.low, log.high))
    half = None if low is None or high is None else (high - low) / 2
    assert mean is not None
    return Estimate(mean, half, log.count, log.clusters, low, high, "log t")


def log_estimate(values: Tensor, clusters: Tensor | None = None) -> Estimate:
    """The mean m of [n] positive, skewed values with the interval of log m: exp(log m ± t · SE/m).

    SE/m is the standard error of log m to first order (the delta method). Intervals of the mean of
    1 + 2 e^{σ z}, z standard normal, over 16 clusters cover it in 94, 88 and 80 % of cases at σ of
    0.5, 1 and 1.5, those of `estimate` in 94, 85 and 75 %, and a percentile bootstrap over clusters
    in 91, 83 and 74 %.
    """
    plain = estimate(values, clusters)
    if plain.ci95 is None or plain.mean <= 0:
        return replace(plain, method="log t")
    factor = math.exp(min(plain.ci95 / plain.mean, 700.0))
    low, high = plain.mean / factor, plain.mean * factor
    return replace(plain, ci95=(high - low) / 2, low=low, high=high, method="log t")


def _exponential(value: float | None) -> float | None:
    return None if value is None else math.exp(min(value, 700.0))


def mean_ci95(values: Tensor, clusters: Tensor) -> float | None:
    """Half the width of `estimate`'s interval; None for a single cluster."""
    return estimate(values, clusters).ci95


def half_width(error: float, clusters: int) -> float | None:
    """t · SE with G − 1 degrees of freedom; None for a single cluster, which shows no spread."""
    return None if clusters < 2 else t_quantile(clusters - 1) * error


def count_clusters(values: Tensor, clusters: Tensor | None) -> int:
    """G; without `clusters`, every value is its own."""
    return values.numel() if clusters is None else len(clusters.unique())


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
    residuals = y - y.sum() / total * x
    return (cluster_sum_error(residuals, clusters) / total).item()


def cluster_sum_error(scores: Tensor, clusters: Tensor | None = None) -> Tensor:
    """sqrt(G/(G − 1) · Σ_g e_g²), the standard error of a sum of scores that add up to 0.

    Args:
        scores: [n] float64.
        clusters: [n] long; without it every score is its own cluster.

    Returns:
        A scalar; infinity for a single cluster.
    """
    sums = scores
    if clusters is not None:
        present, group = clusters.unique(return_inverse=True)
        sums = scores.new_zeros(len(present)).index_add(0, group, scores)
    count = len(sums)
    if count < 2:
        return scores.new_tensor(math.inf)
    return (count / (count - 1) * sums.square().sum()).sqrt()


def share_interval(count: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share of independent draws, `count` of `total` (Clopper and Pearson).

    low solves P(X ≥ count | low) = 0.025 for a binomial X, and high P(X ≤ count | high) = 0.025.
    The interval covers the true share with at least 95 % for any number of draws. Mean ± t · SE
    would be a single point where all draws are equal.

    Args:
        count: 0 … total.
    """
    return _smallest_share(count, total), 1.0 - _smallest_share(total - count, total)


@lru_cache(maxsize=1024)
def _smallest_share(count: int, total: int) -> float:
    """p with P(X ≥ count | p) = 0.025, by bisection; 0 if count is 0."""
    if count == 0:
        return 0.0
    k = np.arange(count, total + 1)
    lgamma = np.vectorize(math.lgamma)
    log_choices = math.lgamma(total + 1) - lgamma(k + 1.0) - lgamma(total - k + 1.0)
    low, high = 0.0, count / total
    while high - low > 1e-12:
        p = (low + high) / 2
        above = np.exp(log_choices + k * math.log(p) + (total - k) * math.log1p(-p)).sum()
        low, high = (p, high) if above < 0.025 else (low, p)
    return (low + high) / 2


@lru_cache(maxsize=1024)
def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t distribution, by bisection on its integral.

    With x = √ν tan θ, P(0 < T < x) = c ∫_0^θ cos^(ν−1), c = Γ((ν + 1)/2) / (√π Γ(ν/2)).
    """
    nodes, weights = np.polynomial.legendre.leggauss(200)
    constant = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2))

    def above_zero(x: float) -> float:
        theta = math.atan(x / math.sqrt(degrees))
        integral = weights @ np.cos(theta * (nodes + 1) / 2) ** (degrees - 1) * theta / 2
        return float(constant / math.sqrt(math.pi) * integral)

    low, high = 1.9, 13.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if above_zero(middle) < 0.475 else (low, middle)
    return (low + high) / 2
