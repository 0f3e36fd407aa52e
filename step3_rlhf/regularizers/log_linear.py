"""Regularizers of the form −β Σ_t (log π_t − log w_t), which differ in the weight w.

Their optimum is proportional to w(y|x)·e^{r/β}: w is the bias that the policy keeps.
"""

import math
from abc import abstractmethod
from typing import Literal

from pydantic import model_validator

from step3_rlhf.regularizers.base import (
    LARGEST_EXPONENT,
    Marginal,
    Regularizer,
    ResponseSet,
    on_last_token,
    response_sum,
    unbound,
)
from step3_rlhf.regularizers.classes import ClassSettings
from training.config import Fraction, NonNegative, Positive
from training.deferred import Tensor, torch


class LogLinear(Regularizer):
    """R = −β Σ_t (log π_t − log w_t); a subclass defines w, which must not depend on π.

    objective  E[r − β Σ_t (log π_t − log w_t)]
    marginal   −β (log π_t − log w_t) on token t
    optimum    π* ∝ w(y|x)·e^{r/β}, w(y|x) = Π_t w_t
    """

    @property
    def weighs_tokens(self) -> bool:
        """Whether log w_t is a function of log π_ref,t alone, whatever the shape of the arguments.

        A run can then tell how many responses its optimum cuts (truncation.py).
        """
        return False

    @abstractmethod
    def log_weights(self, ref_logp: Tensor, mask: Tensor) -> Tensor:
        """[batch, length] log w_t in nats, zero where the mask is false."""

    @property
    def is_log_linear(self) -> bool:
        return True

    def value(self, logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
        return self.marginal(logp, ref_logp, mask).per_token.sum(-1)

    def marginal(self, logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Marginal:
        penalty = torch.where(mask, logp, 0.0) - self.log_weights(ref_logp, mask)
        return Marginal(-self.coefficient * penalty, unbound(mask))

    def log_optimum(self, responses: ResponseSet) -> Tensor:
        log_w = self.log_weights(responses.ref_logp, responses.mask).sum(-1)
        rewards = self.effective_reward(responses.rewards, responses.class_logp)
        return torch.log_softmax(log_w + rewards / self.coefficient, 0)


class KL(LogLinear):
    """w = π_ref, eq. (2.3); optimum ∝ π_ref·e^{r/β}, eq. (5.1), with the bias of the reference."""

    name: Literal["kl"] = "kl"

    @property
    def optimum_formula(self) -> str:
        return f"∝ π_ref(y|x)·e^{{r/β}}, β = {self.beta:g}: biased by π_ref (eq. 5.1)"

    @property
    def weighs_tokens(self) -> bool:
        return True

    def log_weights(self, ref_logp: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, ref_logp, 0.0)


class PreferenceMatching(LogLinear):
    """w = 1, eq. (3.9), Theorem 1: R = −β log π + C_2/π; optimum softmax(r/β), eq. (3.2).

    C_2/π has zero gradient in expectation, so `c2` enters only the reported value, in which 1/π is
    at most e^80. With C_1 = log(1/k), k the number of responses, this is the KL penalty to the
    uniform distribution (Example 3).
    """

    name: Literal["pm"] = "pm"
    c2: float = 0.0
    """C_2 of eq. (3.8), in units of reward."""

    @property
    def optimum_formula(self) -> str:
        return f"softmax(r/β) over all responses, β = {self.beta:g} (eq. 3.2)"

    @property
    def weighs_tokens(self) -> bool:
        return True

    def log_weights(self, ref_logp: Tensor, mask: Tensor) -> Tensor:
        return torch.zeros_like(ref_logp)

    def value(self, logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
        value = super().value(logp, ref_logp, mask)
        if self.c2 == 0.0:
            return value
        return value + self.c2 * torch.exp(-response_sum(logp, mask).clamp(min=-LARGEST_EXPONENT))


class MaximumEntropy(LogLinear):
    """w = 1 with a free coefficient τ; the reward is not rescaled (section 3.2, Example 1).

    Objective E[r − τ log π]; optimum softmax(r/τ), which matches preferences only at τ = 1
    (Table 1).
    """

    name: Literal["maximum_entropy"] = "maximum_entropy"
    tau: Positive = 1.0
    """Weight of the entropy, in units of reward per nat, in place of beta, which stays 1."""

    @property
    def optimum_formula(self) -> str:
        return f"softmax(r/τ) over all responses, τ = {self.tau:g}"

    @model_validator(mode="after")
    def _only_tau(self) -> "MaximumEntropy":
        if self.beta != 1.0:
            raise ValueError("beta: maximum_entropy does not rescale the reward; set tau instead")
        return self

    @property
    def coefficient(self) -> float:
        return self.tau

    @property
    def weighs_tokens(self) -> bool:
        return True

    def log_weights(self, ref_logp: Tensor, mask: Tensor) -> Tensor:
        return torch.zeros_like(ref_logp)


class ConditionalPM(LogLinear):
    """Preference matching on M(x), the responses that are regular under the reference (Def. 4.1).

    level "token" (the published code): w_t = π_ref,t where π_ref,t < α, else 1. Preferences are
    matched, softmax(r/β), among the responses whose tokens all have π_ref,t ≥ α.
    level "sequence" (Def. 4.1, Theorem 4): M(x) = {y: π_ref(y|x) ≥ α}; w = 1 on M(x), and outside
    it w = π_ref(y|x) or the fixed ε of eq. (4.1). Preferences are matched within M(x). Once a
    prefix has π_ref < α, the response is outside, whatever follows: token t gets log w(y_≤t) −
    log w(y_<t), which adds up to log w(y) and lets each token answer for its own part. With
    `alpha_per_token` a response can come back, and log w is placed on its last token.
    level "class": opinions rather than strings (classes.py). M(x) is the responses whose class has
    π_ref(c(y)|x) ≥ α; w = π_ref(y|x)/π_ref(c(y)|x) on M(x), and π_ref(y|x) outside it and outside
    every class. Natural classes have shares ∝ E_{π_ref(·|x,c)} e^{r/β}, and within a class it is
    kl. The tokens get log π_ref,t, as in kl; −β log π_ref(c(y)|x) is part of the effective reward.
    α → 0 is pm, except of classes; α > 1 is kl (unless ε is given).
    """

    name: Literal["conditional_pm"] = "conditional_pm"
    level: Literal["token", "sequence", "class"] = "token"
    """Whether each token, the whole response or the response's class is compared with the
    threshold."""
    alpha: NonNegative | None = None
    """Threshold on the reference's probability of a token, of the whole response, or of its class,
    where null is none."""
    log_alpha: float | None = None
    """Sequence and class level: the same threshold as a logarithm in nats, for long responses."""
    alpha_per_token: NonNegative | None = None
    """Sequence level: threshold on the geometric mean of the tokens' probabilities."""
    epsilon: Positive | None = None
    """Sequence level: weight of every response outside M(x), eq. (4.1); null is π_ref(y|x)."""
    log_epsilon: float | None = None
    """The same weight as a logarithm in nats."""
    classes: ClassSettings | None = None
    """Class level: what makes two responses the same opinion."""

    @property
    def optimum_formula(self) -> str:
        among = {
            "token": "responses whose tokens all reach the threshold",
            "sequence": "responses that reach the threshold",
            "class": "opinions that reach the threshold",
        }[self.level]
        return f"softmax(r/β) among {among}, β = {self.beta:g}; ∝ w·e^{{r/β}} elsewhere (eq. 4.1)"

    @model_validator(mode="after")
    def _one_threshold(self) -> "ConditionalPM":
        thresholds = (self.alpha, self.log_alpha, self.alpha_per_token)
        given = sum(threshold is not None for threshold in thresholds)
        if given != 1 and not (self.level == "class" and given == 0):
            raise ValueError("give exactly one of alpha, log_alpha and alpha_per_token")
        if self.epsilon is not None and self.log_epsilon is not None:
            raise ValueError("give one of epsilon and log_epsilon, not both")
        for field in ("alpha_per_token", "epsilon", "log_epsilon"):
            if self.level != "sequence" and getattr(self, field) is not None:
                raise ValueError(f'{field}: only with "level": "sequence"')
        if self.level == "token" and self.log_alpha is not None:
            raise ValueError('log_alpha: only with "level": "sequence" or "class"')
        if (self.level == "class") != (self.classes is not None):
            raise ValueError('classes: "level": "class" needs them, and no other has them')
        return self

    @property
    def response_classes(self) -> ClassSettings | None:
        return self.classes

    @property
    def weighs_tokens(self) -> bool:
        return self.level == "token"

    def effective_reward(self, rewards: Tensor, class_logp: Tensor | None = None) -> Tensor:
        """Class level: r − β log π_ref(c(y)|x) on M(x)."""
        if self.level != "class":
            return rewards
        class_logp = _known(class_logp)
        inside = self._is_natural_class(class_logp)
        return rewards - self.beta * torch.where(inside, class_logp, 0.0).to(rewards)

    def log_weights(self, ref_logp: Tensor, mask: Tensor) -> Tensor:
        ref_logp = torch.where(mask, ref_logp, 0.0)
        if self.level == "class":
            return ref_logp
        if self.level == "token":
            return torch.where(mask & (ref_logp < self._log_threshold), ref_logp, 0.0)
        if self.alpha_per_token is not None:
            inside = self.natural(ref_logp, mask)
            return on_last_token(torch.where(inside, 0.0, self._outside(ref_logp.sum(-1))), mask)
        prefix = log_prefix(ref_logp)
        outside = prefix < self._log_threshold  # and so is whatever follows
        leaves = outside & (outside.cumsum(-1) == 1)
        later = ref_logp if self._log_epsilon is None else torch.zeros_like(ref_logp)
        log_w = torch.where(leaves, self._outside(prefix), later)
        return torch.where(outside & mask, log_w, 0.0)

    def _outside(self, ref_logp: Tensor) -> Tensor:
        """log w of responses outside M(x), of log-probability `ref_logp` under the reference."""
        log_epsilon = self._log_epsilon
        return ref_logp if log_epsilon is None else torch.full_like(ref_logp, log_epsilon)

    def natural(self, ref_logp: Tensor, mask: Tensor, class_logp: Tensor | None = None) -> Tensor:
        """Token level: all tokens reach the threshold; otherwise the response or its class does."""
        if self.level == "class":
            return self._is_natural_class(_known(class_logp))
        ref_logp = torch.where(mask, ref_logp, 0.0)
        if self.level == "token":
            return (~mask | (ref_logp >= self._log_threshold)).all(-1)
        if self.alpha_per_token is not None:
            return ref_logp.sum(-1) / mask.sum(-1).clamp(min=1) >= self._log_threshold
        return log_prefix(ref_logp)[:, -1] >= self._log_threshold

    def _is_natural_class(self, class_logp: Tensor) -> Tensor:
        """[batch] bool; a response outside every class, with −inf, has no natural one."""
        return (class_logp >= self._log_threshold) & (class_logp > -math.inf)

    @property
    def _log_threshold(self) -> float:
        if self.log_alpha is not None:
            return self.log_alpha
        alpha = self.alpha if self.alpha is not None else self.alpha_per_token
        return math.log(alpha) if alpha else -math.inf

    @property
    def _log_epsilon(self) -> float | None:
        """log ε; None where the weight outside M(x) is π_ref."""
        return math.log(self.epsilon) if self.epsilon is not None else self.log_epsilon


def log_prefix(ref_logp: Tensor) -> Tensor:
    """[batch, length] log π_ref(y_≤t), which never rises with t, not even by rounding.

    Args:
        ref_logp: [batch, length], 0 where masked.
    """
    return ref_logp.clamp(max=0.0).cumsum(-1)


def _known(class_logp: Tensor | None) -> Tensor:
    if class_logp is None:
        raise ValueError("conditional_pm of classes needs class_logp, log π_ref(c(y)|x)")
    return class_logp


class KLInterpolation(LogLinear):
    """w = π_ref^κ; optimum ∝ π_ref^κ·e^{r/β}: κ = 0 is pm, κ = 1 is kl."""

    name: Literal["kl_interpolation"] = "kl_interpolation"
    kappa: Fraction
    """Exponent of the reference: 0 is pm, 1 is kl."""

    @property
    def optimum_formula(self) -> str:
        return f"∝ π_ref(y|x)^κ·e^{{r/β}}, κ = {self.kappa:g}, β = {self.beta:g}"

    @property
    def weighs_tokens(self) -> bool:
        return True

    def log_weights(self, ref_logp: Tensor, mask: Tensor) -> Tensor:
        if self.kappa == 0.0:  # π_ref^0 = 1, also where π_ref = 0
            return torch.zeros_like(ref_logp)
        return self.kappa * torch.where(mask, ref_logp, 0.0)
