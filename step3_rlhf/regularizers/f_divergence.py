"""The f-divergence regularizer of section 5.1."""

from typing import Literal

from pydantic import model_validator

from step3_rlhf.regularizers.base import (
    LARGEST_EXPONENT,
    Marginal,
    NoOptimumError,
    Regularizer,
    ResponseSet,
    on_last_token,
    unbound,
)
from step3_rlhf.regularizers.divergences import Divergence, ReverseKL, divergence
from step3_rlhf.regularizers.solvers import backward_induction
from training.config import Fraction, Positive
from training.deferred import Tensor, torch


class FDivergence(Regularizer):
    """−β D_f(π ‖ π_ref) of section 5.1, u = π(y|x)/π_ref(y|x); generators in divergences.py.

    objective  E_π[r − β f(u)/u] = E_π[r] − β D_f(π ‖ π_ref)
    marginal   −β (f'(u) − f'(1)) on the last token
    optimum    π_ref·(f')^{-1}((r − λ)/β), λ from Σπ = 1. Eq. (5.3) omits λ, which cancels only
               for reverse KL. π_ref is taken conditional on the response set, so that λ is the
               set's: except for reverse KL, this is not the optimum over all responses, taken
               conditional on the set.

    level "token" is an approximation: u is the ratio of one token's probabilities, and the terms
    are summed over the tokens, so that the value is a sum of per-step divergences. The marginal
    −βf'(u_t) is exact for token t itself. Earlier tokens, too, are credited with it, whereas the
    summed divergence would credit them with −βf(u_t)/u_t; no function of the sampled token gives
    both. `log_optimum` is therefore the distribution at which policy gradients with this marginal
    come to rest. Except for reverse KL, it does not maximize the expected value.
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
    """The generator f."""
    alpha: Fraction | None = None
    """Coefficient of alpha_divergence: 0 is reverse KL, 1 forward KL."""
    level: Literal["sequence", "token"] = "sequence"
    """Whether the divergence is that of whole responses or, as an approximation, the sum over
    tokens."""
    max_marginal: Positive = 20.0
    """Bound on |marginal|, in units of reward, where f' grows as a power of u: forward_kl,
    alpha_divergence, hellinger (u → 0) and chi_squared (u → ∞). Above the spread of the rewards
    it leaves the optimum untouched. The others are never bounded. The reported value takes
    |log u| as 80 nats where it is more, so that it stays finite in float32."""

    @property
    def optimum_formula(self) -> str:
        return f"π_ref·(f′)⁻¹((r − λ)/β), f of {self.divergence}, β = {self.beta:g} (eq. 5.3)"

    @model_validator(mode="after")
    def _alpha_where_it_belongs(self) -> "FDivergence":
        if (self.divergence == "alpha_divergence") != (self.alpha is not None):
            raise ValueError("alpha: the coefficient of alpha_divergence; set it there only")
        return self

    @property
    def generator(self) -> Divergence:
        return divergence(self.divergence, self.alpha)

    @property
    def levels_credit(self) -> bool:
        """Not by total variation, whose f' is any number in [−½, ½] at u = 1; nor by token."""
        by_response = self.level == "sequence" and self.divergence != "total_variation"
        return by_response or self.is_log_linear

    @property
    def is_flat(self) -> bool:
        """Total variation's marginal is a step at u = 1 and constant elsewhere."""
        return self.divergence == "total_variation"

    @property
    def is_log_linear(self) -> bool:
        return isinstance(self.generator, ReverseKL)

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
        """log u in nats: [batch, 1] of responses or [batch, length] of tokens, 0 where masked.

        `per_sample` and `slope` are 0 at log u = 0, so masked tokens add nothing.
        """
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
