"""The temperature that calibrates a reward model of any link g (section 3.4): pure functions.

Under the exponential link only the margin r_w − r_l counts, and temperature.py has its likelihood,
which is convex in 1/T. Under another one the log-odds are log g(r_w/T) − log g(r_l/T), of which the
loss may have several minima: the lowest one is looked for on a grid of log T, and refined there.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from step2_reward.calibrate.temperature import (
    ESTIMAND,
    NoTemperatureError,
    calibrated_temperature,
    halves,
    held_out_margins,
    with_interval,
)
from training.preferences.links import LOG_LINKS, LinkName
from training.statistics import Estimate, cluster_sum_error

DECADES = 6.0
"""How far log T is looked for on either side of the size of the rewards, in powers of e."""
STEPS = 120
"""Intervals of the grid."""


def estimand(link: LinkName) -> str:
    """What the temperature estimates, in words."""
    if link == "exponential":
        return ESTIMAND
    odds = f"g(r_w/T)/(g(r_w/T) + g(r_l/T)), g = {link},"
    return ESTIMAND.replace("sigma((r_w - r_l)/T)", odds)


def tempered(pairs: Tensor, link: LinkName, log_t: Tensor) -> Tensor:
    """[pairs] log g(r_w/T) − log g(r_l/T) of rewards [pairs, 2], log T being [pairs] or []."""
    log_g = LOG_LINKS[link]
    inverse = (-log_t).exp()
    return log_g(pairs[:, 0] * inverse) - log_g(pairs[:, 1] * inverse)


def linked_temperature(pairs: Tensor, clusters: Tensor, link: LinkName) -> Estimate:
    """T̂ = argmin_T Σ −log σ(log g(r_w/T) − log g(r_l/T)) with its cluster-robust interval.

    The interval is the sandwich of temperature.py, in log T, with derivatives by autograd.

    Args:
        pairs: [pairs, 2] rewards of the chosen and the rejected response.
        clusters: [pairs] long, the group of each pair.

    Raises:
        NoTemperatureError: the likelihood has no maximum at a positive, finite temperature.
    """
    pairs = pairs.double()
    if link == "exponential":
        return calibrated_temperature(pairs[:, 0] - pairs[:, 1], clusters)

    def losses(log_t: Tensor) -> Tensor:
        return -logsigmoid(tempered(pairs, link, log_t))

    log_t = _lowest(lambda at: losses(at).sum(), pairs.abs().max().clamp(min=1e-300).log().item())
    own = torch.full((len(pairs),), log_t, dtype=torch.float64, requires_grad=True)
    (scores,) = torch.autograd.grad(losses(own).sum(), own, create_graph=True)
    (curvature,) = torch.autograd.grad(scores.sum(), own)
    count = len(clusters.unique())
    error = None
    if count > 1:
        spread = cluster_sum_error(scores.detach(), clusters)
        error = (spread / curvature.sum()).item()
    return with_interval(math.exp(log_t), error, len(pairs), count)


def _lowest(loss: Callable[[Tensor], Tensor], middle: float) -> float:
    """The log T of the lowest minimum, by a grid and then bisection of the slope.

    Raises:
        NoTemperatureError: it lies at an end of the grid.
    """
    grid = torch.linspace(middle - DECADES, middle + DECADES, STEPS + 1, dtype=torch.float64)
    best = int(torch.stack([loss(at) for at in grid]).argmin())
    if best == STEPS:
        raise NoTemperatureError(
            "The reward model predicts these choices no better than chance under its link, so no "
            "temperature calibrates it: train it further, or check that the data are its own"
        )
    if best == 0:
        raise NoTemperatureError(
            "Too few choices contradict the reward model, so no temperature above 0 calibrates it: "
            "more held-out comparisons are needed"
        )
    low, high = grid[best - 1].item(), grid[best + 1].item()
    for _ in range(60):
        at = torch.tensor((low + high) / 2, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(loss(at), at)
        low, high = (at.item(), high) if slope < 0 else (low, at.item())
    return (low + high) / 2


def held_out_log_odds(pairs: Tensor, clusters: Tensor, link: LinkName) -> Tensor:
    """[pairs] log-odds, each at the T of the other half of the clusters (cross-fitting).

    Raises:
        NoTemperatureError: one of the halves has no temperature, or there is a single cluster.
    """
    pairs = pairs.double()
    if link == "exponential":
        return held_out_margins(pairs[:, 0] - pairs[:, 1], clusters)
    found = torch.empty(len(pairs), dtype=torch.float64)
    first = halves(clusters)
    for part in (first, ~first):
        at = linked_temperature(pairs[~part], clusters[~part], link).mean
        found[part] = tempered(pairs[part], link, torch.tensor(at, dtype=torch.float64).log())
    return found
