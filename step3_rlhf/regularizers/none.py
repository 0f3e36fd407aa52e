"""The absence of a regularizer, for comparison."""

import math
from typing import Literal

from step3_rlhf.regularizers.base import Marginal, Regularizer, ResponseSet, unbound
from training.deferred import Tensor, torch


class NoRegularizer(Regularizer):
    """Objective E[r]; marginal 0; optimum: all mass on the response of highest reward (Prop. 3.1).

    If several responses share the highest reward, `log_optimum` is uniform over them.
    """

    name: Literal["none"] = "none"

    @property
    def is_flat(self) -> bool:
        return True

    def value(self, logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
        return torch.zeros_like(logp[:, 0])

    def marginal(self, logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Marginal:
        return Marginal(torch.zeros_like(logp), unbound(mask))

    def log_optimum(self, responses: ResponseSet) -> Tensor:
        best = responses.rewards == responses.rewards.max()
        return torch.where(best, 0.0, -math.inf).double().log_softmax(0)
