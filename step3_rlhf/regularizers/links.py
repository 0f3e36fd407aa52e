"""Link functions g of the generalized Plackett–Luce model, P(y) ∝ g(r(y)) (Theorem 3).

Each g is positive and increasing. Arguments are log π (nats, any shape), so that the probability
of a long response does not underflow.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction

from step3_rlhf.regularizers.solvers import decreasing_root
from training.deferred import Tensor, torch
from training.preferences.links import log_sigmoid, log_softplus


class Link(ABC):
    """One g and its integral G from the start of its domain: from −∞, or from 0 for a power."""

    @abstractmethod
    def inverse(self, log_pi: Tensor) -> Tensor:
        """g^{-1}(π)."""

    @abstractmethod
    def integral_ratio(self, log_pi: Tensor) -> Tensor:
        """G(g^{-1}(π))/π of eq. (3.14)."""

    @abstractmethod
    def log_link(self, score: Tensor) -> Tensor:
        """log g(score), −inf where the score is outside the domain of g."""

    def optimum(self, scores: Tensor) -> Tensor:
        """[K] log π_i of π_i = g(scores_i + λ), λ such that Σπ = 1; `scores` is [K] float64 r/β."""
        if len(scores) == 1:
            return torch.zeros_like(scores)
        gap = scores.max() - scores
        # The largest score + λ lies between `equal`, where every response has at most 1/K, and
        # `equal + gap.max()`, where every response has at least 1/K.
        equal = self.inverse(torch.tensor(-math.log(len(scores)), dtype=scores.dtype)).item()

        def deficit(shift: float) -> float:
            return -torch.logsumexp(self.log_link(shift - gap), 0).item()

        return self.log_link(decreasing_root(deficit, equal, equal + gap.max().item()) - gap)


class Exponential(Link):
    """g(r) = e^r: the Plackett–Luce model itself."""

    def inverse(self, log_pi: Tensor) -> Tensor:
        return log_pi

    def integral_ratio(self, log_pi: Tensor) -> Tensor:
        return torch.ones_like(log_pi)

    def log_link(self, score: Tensor) -> Tensor:
        return score


def _softplus_coefficients(terms: int = 12) -> list[float]:
    """Taylor coefficients in π of (1/π)∫_0^π p/(1 − e^{−p}) dp: Bernoulli numbers B⁺_n/(n + 1)!."""
    bernoulli = [Fraction(1)]
    for n in range(1, terms):
        total = sum((math.comb(n + 1, k) * bernoulli[k] for k in range(n)), Fraction(0))
        bernoulli.append(-total / (n + 1))
    bernoulli[1] = Fraction(1, 2)
    return [float(b / math.factorial(n) / (n + 1)) for n, b in enumerate(bernoulli)]


class Softplus(Link):
    """g(r) = log(1 + e^r). Close to e^r, and so to preference matching, where π is small."""

    coefficients = _softplus_coefficients(20)

    def inverse(self, log_pi: Tensor) -> Tensor:
        pi = torch.exp(log_pi)
        tiny = pi < 1e-6
        safe = torch.where(tiny, torch.ones_like(pi), pi)
        return log_pi + torch.where(tiny, pi / 2.0, torch.log(torch.expm1(safe) / safe))

    def integral_ratio(self, log_pi: Tensor) -> Tensor:
        # G(g^{-1}(π)) = −Li₂(1 − e^π); its series converges on [0, 1] like (π/6.28)^n.
        pi = torch.exp(log_pi)
        total = torch.zeros_like(pi)
        for coefficient in reversed(self.coefficients):
            total = total * pi + coefficient
        return total

    def log_link(self, score: Tensor) -> Tensor:
        return log_softplus(score)


@dataclass(frozen=True)
class Power(Link):
    """g(r) = r^k for r > 0. Its optimum max(0, r + λ)^k is exactly zero for bad responses."""

    exponent: float

    def inverse(self, log_pi: Tensor) -> Tensor:
        return torch.exp(log_pi / self.exponent)

    def integral_ratio(self, log_pi: Tensor) -> Tensor:
        return torch.exp(log_pi / self.exponent) / (self.exponent + 1.0)

    def log_link(self, score: Tensor) -> Tensor:
        return self.exponent * torch.log(score.clamp(min=0.0))


class Sigmoid(Link):
    """g(r) = 1/(1 + e^{−r}), bounded by 1: g^{-1}(π) diverges as π → 1."""

    def inverse(self, log_pi: Tensor) -> Tensor:
        return log_pi - _log_complement(log_pi)

    def integral_ratio(self, log_pi: Tensor) -> Tensor:
        pi = torch.exp(log_pi)
        tiny = pi < 1e-6
        safe = torch.where(tiny, torch.full_like(log_pi, -1.0), log_pi)
        return torch.where(tiny, 1.0 + pi / 2.0, -_log_complement(safe) * torch.exp(-safe))

    def log_link(self, score: Tensor) -> Tensor:
        return log_sigmoid(score)


def _log_complement(log_pi: Tensor) -> Tensor:
    """log(1 − π), finite even where π rounds to 1."""
    log_pi = log_pi.clamp(max=-torch.finfo(log_pi.dtype).tiny)
    near_one = log_pi > -math.log(2.0)
    high = torch.where(near_one, log_pi, torch.full_like(log_pi, -1.0))
    low = torch.where(near_one, torch.full_like(log_pi, -1.0), log_pi)
    return torch.where(near_one, torch.log(-torch.expm1(high)), torch.log1p(-torch.exp(low)))


LINKS: dict[str, type[Link]] = {
    "exponential": Exponential,
    "softplus": Softplus,
    "power": Power,
    "sigmoid": Sigmoid,
}


def link(name: str, exponent: float | None = None) -> Link:
    """The link of that name; `exponent` is k of the power link."""
    if name != "power":
        return LINKS[name]()
    if exponent is None:
        raise ValueError("the power link needs its exponent")
    return Power(exponent)
