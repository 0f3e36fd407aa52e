"""f-divergences D_f(π ‖ π_ref) = E_{y~π_ref} f(u), u = π/π_ref, in log space (section 5.1).

Each class is one convex generator f of Wang et al. (2023). It has three functions of log u (nats,
any shape): `per_sample` = f(u)/u, whose mean under π is D_f; `slope` = f'(u), shifted so that
f'(1) = 0; and `log_ratio`, the inverse of the slope.

Because f'(1) = 0, the multiplier λ of the optimum π_ref·(f')^{-1}((r − λ)/β) lies between the
smallest and the largest reward. At the optimum, β|f'(u)| = |r − λ| is thus at most the spread of
the rewards, and a bound above the spread does not change the optimum.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from step3_rlhf.regularizers.base import NoOptimumError, log1p_exp
from step3_rlhf.regularizers.solvers import decreasing_root
from training.deferred import Tensor, torch


class Divergence(ABC):
    """One generator f.

    ceiling  sup f' = f'(∞)
    grows    |f'| diverges as a power of u (u → ∞) or of 1/u (u → 0)
    """

    ceiling: float = math.inf
    grows: bool = False

    @abstractmethod
    def per_sample(self, log_u: Tensor) -> Tensor:
        """f(u)/u, same shape as `log_u`."""

    @abstractmethod
    def slope(self, log_u: Tensor) -> Tensor:
        """f'(u) − f'(1), same shape as `log_u`."""

    @abstractmethod
    def log_ratio(self, slack: Tensor) -> Tensor:
        """log u with f'(u) − f'(1) = ceiling − slack, or −slack where the ceiling is infinite.

        The argument is the distance to the ceiling because the slope itself, rounded, no longer
        determines u near the ceiling, where u tends to infinity.
        """

    def optimum(self, scores: Tensor, log_ref: Tensor) -> tuple[Tensor, float]:
        """The distribution π that maximizes Σ π·scores − D_f(π ‖ π_ref): eq. (5.3) with its λ.

        Args:
            scores: [K] float64 rewards over β.
            log_ref: [K] float64 reference log-probabilities, normalized over the set.

        Returns:
            [K] log π (nats; −inf where π is zero) and λ/β.
        """
        best = scores.max()
        if len(scores) == 1:
            return torch.zeros_like(scores), best.item()
        gap = best - scores

        def log_pi(slack: float) -> Tensor:
            return log_ref + self.log_ratio(slack + gap)

        def excess(slack: float) -> float:
            return torch.logsumexp(log_pi(slack), 0).item()

        if math.isinf(self.ceiling):
            slack = decreasing_root(excess, -gap.max().item(), 0.0)
            return log_pi(slack), best.item() + slack
        exponent = decreasing_root(lambda e: excess(math.exp(e)), -700.0, math.log(self.ceiling))
        slack = math.exp(exponent)
        return log_pi(slack), best.item() + slack - self.ceiling


class ReverseKL(Divergence):
    """f(u) = u log u: the KL divergence of eq. (2.3)."""

    def per_sample(self, log_u: Tensor) -> Tensor:
        return log_u

    def slope(self, log_u: Tensor) -> Tensor:
        return log_u

    def log_ratio(self, slack: Tensor) -> Tensor:
        return -slack


class ForwardKL(Divergence):
    """f(u) = −log u. Its slope 1 − 1/u diverges as u → 0."""

    ceiling = 1.0
    grows = True

    def per_sample(self, log_u: Tensor) -> Tensor:
        return -log_u * torch.exp(-log_u)

    def slope(self, log_u: Tensor) -> Tensor:
        return -torch.expm1(-log_u)

    def log_ratio(self, slack: Tensor) -> Tensor:
        return -torch.log(slack)


class JensenShannon(Divergence):
    """f(u) = u log u − (u + 1) log((u + 1)/2): twice the Jensen–Shannon divergence."""

    ceiling = math.log(2.0)

    def per_sample(self, log_u: Tensor) -> Tensor:
        return log_u - (1.0 + torch.exp(-log_u)) * (log1p_exp(log_u) - math.log(2.0))

    def slope(self, log_u: Tensor) -> Tensor:
        return math.log(2.0) - log1p_exp(-log_u)

    def log_ratio(self, slack: Tensor) -> Tensor:
        return -slack - torch.log(-torch.expm1(-slack))


@dataclass(frozen=True)
class Alpha(Divergence):
    """f(u) = (u^{1−α} − (1 − α)u − α)/(α(α − 1)), 0 < α < 1; reverse KL at 0, forward KL at 1.

    Its slope (1 − u^{−α})/α diverges as u → 0.
    """

    coefficient: float
    grows = True

    @property
    def ceiling(self) -> float:  # type: ignore[override]
        # If the ceiling is far away, the slope itself keeps more digits than the distance to it.
        return 1.0 / self.coefficient if self.coefficient > 0.05 else math.inf

    def per_sample(self, log_u: Tensor) -> Tensor:
        # Two forms of one function, so that digits are lost neither at α → 0 nor at α → 1.
        alpha = self.coefficient
        inverse = torch.exp(-log_u)
        if alpha < 0.5:
            return (torch.expm1(-alpha * log_u) / alpha + 1.0 - inverse) / (alpha - 1.0)
        power = torch.expm1((1.0 - alpha) * log_u) / (1.0 - alpha)
        return (1.0 - inverse - inverse * power) / alpha

    def slope(self, log_u: Tensor) -> Tensor:
        return -torch.expm1(-self.coefficient * log_u) / self.coefficient

    def log_ratio(self, slack: Tensor) -> Tensor:
        alpha = self.coefficient
        if math.isinf(self.ceiling):
            return -torch.log1p((alpha * slack).clamp(min=-1.0)) / alpha
        return -torch.log(alpha * slack) / alpha


class ChiSquared(Divergence):
    """f(u) = (u − 1)². Its slope 2(u − 1) diverges as u → ∞; the optimum can be zero."""

    grows = True

    def per_sample(self, log_u: Tensor) -> Tensor:
        return 4.0 * torch.sinh(log_u / 2.0).square()  # (√u − 1/√u)²

    def slope(self, log_u: Tensor) -> Tensor:
        return 2.0 * torch.expm1(log_u)

    def log_ratio(self, slack: Tensor) -> Tensor:
        return torch.log((1.0 - slack / 2.0).clamp(min=0.0))


class TotalVariation(Divergence):
    """f(u) = |u − 1|/2. Its slope is ±1/2, a step that does not grow with the distance.

    Moving a unit of mass from a response to the best one costs β. The optimum therefore empties
    every response that is worse than the best by more than β and leaves the others at π_ref.
    Several best responses share the moved mass in the reference's proportions, which is one choice
    of many.
    """

    def per_sample(self, log_u: Tensor) -> Tensor:
        return torch.expm1(-log_u).abs() / 2.0

    def slope(self, log_u: Tensor) -> Tensor:
        return torch.sign(log_u) / 2.0

    def log_ratio(self, slack: Tensor) -> Tensor:
        raise NoOptimumError("total_variation: its slope is a step function and has no inverse")

    def optimum(self, scores: Tensor, log_ref: Tensor) -> tuple[Tensor, float]:
        """The closed form in the class docstring; λ/β is that of the responses that gain."""
        gap = scores.max() - scores
        moved = log_ref.exp()[gap > 1.0].sum()
        best = torch.logsumexp(log_ref[gap == 0.0], 0)
        gain = torch.log1p(moved * torch.exp(-best))
        log_pi = torch.where(gap == 0.0, log_ref + gain, log_ref)
        return log_pi.masked_fill(gap > 1.0, -math.inf), scores.max().item() - 0.5


class Hellinger(Divergence):
    """f(u) = (√u − 1)², twice the squared Hellinger distance. Its slope diverges as u → 0."""

    ceiling = 1.0
    grows = True

    def per_sample(self, log_u: Tensor) -> Tensor:
        return torch.expm1(-log_u / 2.0).square()

    def slope(self, log_u: Tensor) -> Tensor:
        return -torch.expm1(-log_u / 2.0)

    def log_ratio(self, slack: Tensor) -> Tensor:
        return -2.0 * torch.log(slack)


DIVERGENCES: dict[str, type[Divergence]] = {
    "reverse_kl": ReverseKL,
    "forward_kl": ForwardKL,
    "js_divergence": JensenShannon,
    "alpha_divergence": Alpha,
    "chi_squared": ChiSquared,
    "total_variation": TotalVariation,
    "hellinger": Hellinger,
}


def divergence(name: str, coefficient: float | None = None) -> Divergence:
    """The generator of that name; `coefficient` is α of the α-divergence, in [0, 1]."""
    if name != "alpha_divergence":
        return DIVERGENCES[name]()
    if coefficient is None:
        raise ValueError("alpha_divergence needs its coefficient")
    limits = {0.0: ReverseKL, 1.0: ForwardKL}
    return limits[coefficient]() if coefficient in limits else Alpha(coefficient)
