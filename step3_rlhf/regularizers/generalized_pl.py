"""The regularizer of the generalized Plackett–Luce model (Theorem 3)."""

from typing import Literal

from pydantic import model_validator

from step3_rlhf.regularizers.base import (
    Marginal,
    Regularizer,
    ResponseSet,
    on_last_token,
    response_sum,
    unbound,
)
from step3_rlhf.regularizers.links import Link, link
from training.config import Positive
from training.deferred import Tensor


class GeneralizedPL(Regularizer):
    """Theorem 3, R = β·eq. (3.14) with C_1 = C_2 = 0; link functions g in links.py.

    objective  E[r − β g^{-1}(π) + β G(g^{-1}(π))/π]
    marginal   −β g^{-1}(π(y|x)) on the last token
    optimum    π_i = g((r_i + λ)/β), λ from Σπ = 1

    The proof of Theorem 3 uses r_i = g^{-1}(π_i) + c. This holds for the shifted optimum above but
    not for π_i = g(r_i)/Σg, unless g is exponential. Only then is the generalized preference
    matched, and R is that of pm plus the constant β. `power` gives probability exactly 0 to
    responses with r + λ ≤ 0. The marginal of `sigmoid` tends to −∞ as π → 1. If π is tiny, as it is
    for long responses, softplus and sigmoid cannot be told from pm, and the marginal of power
    vanishes.
    """

    name: Literal["generalized_pl"] = "generalized_pl"
    g: Literal["exponential", "softplus", "power", "sigmoid"]
    """The link function g of the generalized Plackett–Luce model."""
    exponent: Positive | None = None
    """Exponent k of the power link g(r) = r^k; only there."""
    max_marginal: Positive = 20.0
    """Bound on −marginal, in units of reward, for `sigmoid`, whose marginal diverges as π → 1. The
    optimum stays where it is unless a response exceeds π = 1/(1 + e^{−max_marginal/β}) there."""

    @model_validator(mode="after")
    def _exponent_where_it_belongs(self) -> "GeneralizedPL":
        if (self.g == "power") != (self.exponent is not None):
            raise ValueError("exponent: the power link's; set it there only")
        return self

    @property
    def link(self) -> Link:
        return link(self.g, self.exponent)

    @property
    def is_log_linear(self) -> bool:
        return self.g == "exponential"

    def value(self, logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
        log_pi = response_sum(logp, mask)
        return self.beta * (self.link.integral_ratio(log_pi) - self.link.inverse(log_pi))

    def marginal(self, logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Marginal:
        marginal = -self.beta * self.link.inverse(response_sum(logp, mask))
        bound = unbound(mask)
        if self.g == "sigmoid":
            bound = marginal < -self.max_marginal
            marginal = marginal.clamp(min=-self.max_marginal)
        return Marginal(on_last_token(marginal, mask), bound)

    def log_optimum(self, responses: ResponseSet) -> Tensor:
        return self.link.optimum(responses.rewards / self.beta)
