"""The regularizer of the generalized Plackett–Luce model (Theorem 3)."""

import math
from typing import Literal

from pydantic import model_validator

from step3_rlhf.regularizers.base import (
    Marginal,
    NoOptimumError,
    Regularizer,
    ResponseSet,
    on_last_token,
    response_sum,
    unbound,
)
from step3_rlhf.regularizers.links import Link, link
from training.config import Positive
from training.deferred import Tensor, torch


class GeneralizedPL(Regularizer):
    """Theorem 3, as printed (target "shifted"), or with the optimum that it speaks of ("luce").

    Link functions g are in links.py.

    target "shifted", R = β·eq. (3.14) with C_1 = C_2 = 0:
        objective  E[r − β g^{-1}(π) + β G(g^{-1}(π))/π]
        marginal   −β g^{-1}(π(y|x)) on the last token
        optimum    π_i = g((r_i + λ)/β), λ from Σπ = 1
    target "luce":
        objective  E[β log g(r/β) − β log π]
        marginal   −β log π_t on token t
        optimum    π_i = g(r_i/β)/Σ_j g(r_j/β), the generalized preference itself

    The proof of Theorem 3 uses r_i = g^{-1}(π_i) + c. This holds for the shifted optimum but not
    for π_i = g(r_i)/Σg, unless g is exponential. Only then do both targets match the generalized
    preference, and R is that of pm, plus the constant β if it is shifted. "luce" gets there by
    taking β log g(r/β) as the reward. g(r)/Σg changes if a constant is added to r: rewards from a
    model that is known up to a constant do not determine it.

    Shifted: `power` gives probability exactly 0 to responses with r + λ ≤ 0. The marginal of
    `sigmoid` tends to −∞ as π → 1. If π is tiny, as it is for long responses, softplus and sigmoid
    cannot be told from pm, and the marginal of power vanishes. Luce: `power` is defined for
    positive rewards only; others end a run before a step is taken.
    """

    name: Literal["generalized_pl"] = "generalized_pl"
    g: Literal["exponential", "softplus", "power", "sigmoid"]
    """The link function g of the generalized Plackett–Luce model."""
    exponent: Positive | None = None
    """Exponent k of the power link g(r) = r^k; only there."""
    target: Literal["shifted", "luce"] = "shifted"
    """Which optimum: g((r + λ)/β), that of eq. (3.14) as printed, or the preference g(r/β)/Σg."""
    max_marginal: Positive = 20.0
    """Bound on −marginal, in units of reward, for the shifted `sigmoid`, whose marginal diverges as
    π → 1. The optimum stays where it is unless a response exceeds π = 1/(1 + e^{−max_marginal/β})
    there."""

    @property
    def optimum_formula(self) -> str:
        if self.target == "luce":
            return f"g(r/β)/Σ g(r/β), g = {self.g}, β = {self.beta:g}"
        return f"g((r + λ)/β), g = {self.g}, β = {self.beta:g}, λ from Σπ = 1 (Theorem 3)"

    @model_validator(mode="after")
    def _exponent_where_it_belongs(self) -> "GeneralizedPL":
        if (self.g == "power") != (self.exponent is not None):
            raise ValueError("exponent: the power link's; set it there only")
        return self

    @property
    def link(self) -> Link:
        return link(self.g, self.exponent)

    @property
    def assumed_link(self) -> str:
        return self.g

    @property
    def is_log_linear(self) -> bool:
        return self.g == "exponential" or self.target == "luce"

    def effective_reward(self, rewards: Tensor, class_logp: Tensor | None = None) -> Tensor:
        """Luce: β log g(r/β), −∞ where g is not positive."""
        if self.target == "shifted":
            return rewards
        return self.beta * self.link.log_link(rewards / self.beta)

    @property
    def effective_reward_name(self) -> str:
        if self.target == "shifted":
            return "rewards"
        where = " (power: only positive rewards have it)" if self.g == "power" else ""
        return f"β log g(r/β){where}"

    def log_choice(self, rewards: Tensor) -> Tensor | None:
        """log g(r_i/β)/Σ_j g(r_j/β); None if g is positive at none of the rewards."""
        log_g = self.link.log_link(rewards / self.beta)
        return log_g.log_softmax(0) if (log_g > -math.inf).any() else None

    def value(self, logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
        log_pi = response_sum(logp, mask)
        if self.target == "luce":
            return -self.beta * log_pi
        return self.beta * (self.link.integral_ratio(log_pi) - self.link.inverse(log_pi))

    def marginal(self, logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Marginal:
        bound = unbound(mask)
        if self.target == "luce":
            return Marginal(-self.beta * torch.where(mask, logp, 0.0), bound)
        marginal = -self.beta * self.link.inverse(response_sum(logp, mask))
        if self.g == "sigmoid":
            bound = marginal < -self.max_marginal
            marginal = marginal.clamp(min=-self.max_marginal)
        return Marginal(on_last_token(marginal, mask), bound)

    def log_optimum(self, responses: ResponseSet) -> Tensor:
        if self.target == "shifted":
            return self.link.optimum(responses.rewards / self.beta)
        log_pi = self.log_choice(responses.rewards)
        if log_pi is None:
            raise NoOptimumError(f"{self.name}: g is positive at none of the rewards")
        return log_pi
