"""The temperature that calibrates a reward model, by maximum likelihood: pure functions."""

import math

import torch
from torch import Tensor

from training.errors import UserError
from training.statistics import Estimate, cluster_sum_error, t_quantile

ESTIMAND = (
    "the T at which sigma((r_w - r_l)/T) has the highest likelihood in the population of pairs; "
    "the 95 % interval, for other groups of pairs drawn like these, is cluster-robust (sandwich), "
    "made for log T with Student's t and G - 1 degrees of freedom, G the number of groups"
)


class NoTemperatureError(UserError):
    """The likelihood has no maximum at a positive, finite temperature."""


def calibrated_temperature(margins: Tensor, clusters: Tensor) -> Estimate:
    """β̂ = argmin_T Σ_i −log σ(m_i/T) with its cluster-robust interval.

    In a = 1/T the loss is convex. With σ̄_i = σ(−a m_i), the scores are s_i = m_i σ̄_i, which add up
    to 0 at the optimum, and the Hessian is H = Σ m_i² σ̄_i (1 − σ̄_i). The sandwich
    (Huber 1967; Liang and Zeger 1986), with e_g the sum of the scores of cluster g:

        SE(a) = sqrt(G/(G − 1) · Σ_g e_g²) / H,    SE(log T) = SE(a)/a

    Args:
        margins: [pairs] m = r(x, y_w) − r(x, y_l) of the recorded choices.
        clusters: [pairs] long, the group of each pair.

    Returns:
        T with the interval exp(log T ± t · SE(log T)); without one for a single cluster.

    Raises:
        NoTemperatureError: the margins are on average not positive (T would be infinite), or no
            recorded choice contradicts them (T would be 0).
    """
    m = margins.double()
    if m.sum() <= 0:
        raise NoTemperatureError(
            "The reward model predicts these choices no better than chance, so no temperature "
            "calibrates it: train it further, or check that the data are its own"
        )
    if (m >= 0).all():
        raise NoTemperatureError(
            f"None of the {len(m)} choices contradicts the reward model, so no temperature above 0 "
            "calibrates it: more held-out comparisons are needed"
        )
    inverse = inverse_temperature(m)
    wrong = (-inverse * m).sigmoid()
    hessian = (m.square() * wrong * (1 - wrong)).sum()
    count = len(clusters.unique())
    error = None
    if count > 1:
        error = (cluster_sum_error(m * wrong, clusters) / hessian).item() / inverse
    return with_interval(1 / inverse, error, len(m), count)


def with_interval(temperature: float, error: float | None, pairs: int, clusters: int) -> Estimate:
    """T with exp(log T ± t · SE(log T)); without an interval if there is no `error`, SE(log T)."""
    if error is None:
        return Estimate(temperature, None, pairs, clusters, method="log t")
    factor = math.exp(t_quantile(clusters - 1) * error)
    low, high = temperature / factor, temperature * factor
    return Estimate(temperature, (high - low) / 2, pairs, clusters, low, high, "log t")


def inverse_temperature(margins: Tensor) -> float:
    """The a > 0 at which Σ m σ(−a m) = 0, by bisection of its logarithm."""
    scale = margins.abs().max().item()
    unit = margins / scale
    low, high = -60.0, 60.0
    for _ in range(60):  # 120/2^60 is less than the last digit
        middle = (low + high) / 2
        if (unit * (-math.exp(middle) * unit).sigmoid()).sum() > 0:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2) / scale


def held_out_margins(margins: Tensor, clusters: Tensor, seed: int = 0) -> Tensor:
    """[pairs] m/T, each with the T of the other half of the clusters (cross-fitting).

    So what is shown "after" calibration is not measured on the pairs that calibrated.

    Raises:
        NoTemperatureError: one of the halves has no temperature, or there is a single cluster.
    """
    inside = halves(clusters, seed)
    found = margins.double().clone()
    for part in (inside, ~inside):
        found[part] /= calibrated_temperature(margins[~part], clusters[~part]).mean
    return found


def halves(clusters: Tensor, seed: int = 0) -> Tensor:
    """[pairs] bool: which pairs are in the first half of the clusters, divided at random.

    Raises:
        NoTemperatureError: there is a single cluster.
    """
    present, group = clusters.unique(return_inverse=True)
    if len(present) < 2:
        raise NoTemperatureError("Cross-fitting needs at least two groups of comparisons")
    order = torch.randperm(len(present), generator=torch.Generator().manual_seed(seed))
    first = torch.zeros(len(present), dtype=torch.bool)
    first[order[: len(present) // 2]] = True
    return first[group]
