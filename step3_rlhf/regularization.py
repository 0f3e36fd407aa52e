"""What a regularizer R of the objective E_{y~π}[r(x, y) + R(π(y|x))] is.

It states two things and keeps them apart:

value     R itself, β included: what reports show.
marginal  R + πR', eq. (3.6): what PPO adds to the reward. ∇E_π[R] = E_π[(R + πR')·∇log π], and
          only for −log π does that differ from R by a mere constant.

Shapes, everywhere: `logp` and `ref_logp` are [batch, length] natural log-probabilities of the
sampled tokens under the policy and the reference; `mask` is the [batch, length] bool of the
response's tokens, end-of-sequence included. Where `mask` is false they may hold anything.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from step3_rlhf.optimum import NoOptimumError, ResponseSet
from training.config import Positive, StrictModel

LARGEST_EXPONENT = 80.0
"""Reported values use e^x for |x| ≤ 80 only: finite in float32."""


@dataclass(frozen=True)
class Marginal:
    """R + πR' up to a constant, in units of reward.

    per_token  [batch, length]  zero where the mask is false; its sum is the response's
    bound      [batch] bool     responses on which a documented numerical bound took effect
    """

    per_token: Tensor
    bound: Tensor


class Regularizer(StrictModel, ABC):
    """Typed, validated parameters and the mathematics that they mean."""

    name: str = "custom"
    beta: Positive = 1.0
    """Weight of the regularizer, in units of reward per nat."""

    @abstractmethod
    def value(self, logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
        """[batch] R(π(y|x)), in units of reward, β included: the objective is r + value."""

    @abstractmethod
    def marginal(self, logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Marginal:
        """R + πR' per token: what PPO adds to the reward."""

    def log_optimum(self, responses: ResponseSet) -> Tensor:
        """[K] float64 log-probabilities of the optimum on a finite set; see optimum.py."""
        raise NoOptimumError(f"{self.name}: {type(self).__name__} does not state its optimum")

    @property
    def preference_temperature(self) -> float:
        """T of the softmax(r/T) that matching the reward's preferences means."""
        return self.beta


def response_sum(values: Tensor, mask: Tensor) -> Tensor:
    """[batch] sums over the response's tokens; what stands elsewhere, even NaN, does not count."""
    return torch.where(mask, values, 0.0).sum(-1)


def on_last_token(values: Tensor, mask: Tensor) -> Tensor:
    """[batch, length]: `values` [batch] on each response's last token, zero elsewhere."""
    last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    return torch.where(last, values[:, None], 0.0)


def unbound(mask: Tensor) -> Tensor:
    """[batch] bool: no numerical bound took effect."""
    return torch.zeros(mask.shape[0], dtype=torch.bool, device=mask.device)


def log1p_exp(x: Tensor) -> Tensor:
    """log(1 + e^x) to full precision; torch's softplus drops e^{−x} beyond x = 20."""
    return torch.logaddexp(x, torch.zeros_like(x))
