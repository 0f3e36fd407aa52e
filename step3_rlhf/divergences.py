"""f-divergences D_f(π ‖ π_ref) = E_{y~π_ref} f(u), u = π/π_ref, in log space (section 5.1).

Each class is one convex generator f, given by three functions of log u (nats, any shape):
`per_sample` = f(u)/u, whose mean under π is D_f; `slope` = f'(u), shifted so that f'(1) = 0;
`log_ratio`, the inverse of the slope. The generators are those of Wang et al. (2023).

Because f'(1) = 0, the multiplier λ of the optimum π_ref·(f')^{-1}((r − λ)/β) lies between the
smallest and the largest reward. At the optimum β|f'(u)| = |r − λ| is therefore never larger than
the spread of the rewards: a bound on it that exceeds the spread leaves the optimum untouched.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from step3_rlhf.optimum import NoOptimumError, ResponseSet, backward_induction, decreasing_root
from step3_rlhf.regularization import (
    LARGEST_EXPONENT,
    Marginal,
    Regularizer,
    log1p_exp,
    on_last_token,
    unbound,
)
from training.config import Fraction, Positive


class Divergence(ABC):
    """One generator f. `ceiling` is sup f' = f'(∞); `grows` says that f' grows as a power of u."""

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

        The distance to the ceiling, not the slope itself, is the argument: near the ceiling
        u runs to infinity, and the slope has no digits left to say how far.
        """

    def optimum(self, scores: Tensor, log_ref: Tensor) -> tuple[Tensor, float]:
        """Maximizer of Σ π·scores − D_f(π ‖ π_ref) over distributions, eq. (5.3) with its λ.

        Args:
            scores: [K] float64 rewards over β.
            log_ref: [K] float64 reference log-probabilities, normalized over the set.

        Returns:
            [K] log π (nats; −inf where the optimum is zero) and λ/β.
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
        # Far from a distant ceiling the slope itself is the better argument.
        return 1.0 / self.coefficient if self.coefficient > 0.05 else math.inf

    def per_sample(self, log_u: Tensor) -> Tensor:
        # Two forms of one function, so that neither limit loses its digits.
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
    """f(u) = |u − 1|/2. Its slope is ±1/2: a step, not a pull of the right size.

    Moving mass from a response to the best one costs β, so the optimum empties every response
    that is worse than the best by more than β, and leaves the others at π_ref. Where the
    optimum is not unique (several best responses), they keep the reference's proportions.
    """

    def per_sample(self, log_u: Tensor) -> Tensor:
        return torch.expm1(-log_u).abs() / 2.0

    def slope(self, log_u: Tensor) -> Tensor:
        return torch.sign(log_u) / 2.0

    def log_ratio(self, slack: Tensor) -> Tensor:
        raise NoOptimumError("total_variation: its slope is a step function and has no inverse")

    def optimum(self, scores: Tensor, log_ref: Tensor) -> tuple[Tensor, float]:
        """The closed form of the class's docstring; λ/β is that of the responses that gain."""
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


class FDivergence(Regularizer):
    """−β D_f(π ‖ π_ref) of section 5.1, u = π(y|x)/π_ref(y|x); generators above.

    objective  E_π[r − β f(u)/u] = E_π[r] − β D_f(π ‖ π_ref)
    marginal   −β (f'(u) − f'(1)) on the last token
    optimum    π_ref·(f')^{-1}((r − λ)/β), λ from Σπ = 1. Eq. (5.3) omits λ, which only cancels
               for reverse KL. π_ref is taken conditional on the response set.

    level "token" is an approximation: the sum over steps of the same terms, u being the ratio of
    one token's probabilities. Its value is the sum of the per-step divergences. Its marginal is
    exact for the token on which it stands; to earlier tokens it credits −βf'(u_t) where the
    summed divergence would have −βf(u_t)/u_t, which no function of the sampled token can do at
    once. `log_optimum` is where policy gradients with this marginal come to rest, which is not
    where the expected value is largest, except for reverse KL.
    """

    name: Literal["f_divergence"] = "f_divergence"
    divergence: Literal[
        "reverse_kl",
        "forward_kl",
        "js_divergence",
        "alpha_divergence",
        "chi_squared",
        "total_variation",
        "hellinger",
    ]
    alpha: Fraction | None = None
    """Coefficient of alpha_divergence: 0 is reverse KL, 1 forward KL."""
    level: Literal["sequence", "token"] = "sequence"
    max_marginal: Positive = 20.0
    """Bound on |marginal|, in units of reward, where f' grows as a power of u: forward_kl,
    alpha_divergence, hellinger (u → 0) and chi_squared (u → ∞). Above the spread of the rewards
    it leaves the optimum untouched. The others are never bounded. The reported value takes
    |log u| as 80 nats where it is more, so that it stays finite in float32."""

    @model_validator(mode="after")
    def _alpha_where_it_belongs(self) -> "FDivergence":
        if (self.divergence == "alpha_divergence") != (self.alpha is not None):
            raise ValueError("alpha: the coefficient of alpha_divergence, there and only there")
        return self

    @property
    def generator(self) -> Divergence:
        return divergence(self.divergence, self.alpha)

    def value(self, logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
        log_u = self._log_ratio(logp, ref_logp, mask)
        if self.divergence != "reverse_kl":
            log_u = log_u.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
        return -self.beta * self.generator.per_sample(log_u).sum(-1)

    def marginal(self, logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Marginal:
        marginal = -self.beta * self.generator.slope(self._log_ratio(logp, ref_logp, mask))
        bound = unbound(mask)
        if self.generator.grows:
            bound = (marginal.abs() > self.max_marginal).any(-1)
            marginal = marginal.clamp(-self.max_marginal, self.max_marginal)
        if self.level == "sequence":
            marginal = on_last_token(marginal[:, 0], mask)
        return Marginal(marginal, bound)

    def _log_ratio(self, logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
        """log u, [batch, 1] of responses or [batch, length] of tokens; a masked 0 adds no term."""
        log_u = torch.where(mask, logp - ref_logp, 0.0)
        return log_u if self.level == "token" else log_u.sum(-1, keepdim=True)

    def log_optimum(self, responses: ResponseSet) -> Tensor:
        log_ref = responses.sequence_ref_logp
        if not torch.isfinite(log_ref).all():
            raise NoOptimumError(f"{self.divergence}: every response needs a positive reference")
        if self.level == "sequence":
            return self.generator.optimum(responses.rewards / self.beta, log_ref.log_softmax(0))[0]
        if self.divergence == "total_variation":
            raise NoOptimumError(
                "total_variation: at token level its marginal, a step, never rests"
            )

        def step(values: Tensor, log_ref: Tensor) -> tuple[Tensor, float]:
            log_pi, multiplier = self.generator.optimum(values / self.beta, log_ref)
            return log_pi, self.beta * multiplier

        return backward_induction(responses, step)
