"""The exact optimum of a regularized objective on a finite set of responses.

    π* = argmax_π E_{y~π}[r(y) + R(π(y))],   π a distribution over the set

On a finite set the optimum exists for every sequence-level regularizer of this package, because
the objective is concave and the set of distributions is compact. For a token-level f-divergence,
which is an approximation, it is instead the distribution at which PPO with its marginal comes to
rest (f_divergence.py). All computations are in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from step3_rlhf.regularizers.base import NoOptimumError, ResponseSet
from training.deferred import Tensor, torch

if TYPE_CHECKING:
    from step3_rlhf.regularizers.base import Regularizer


TOLERANCE = 1e-10
"""Largest |Σπ − 1| of an accepted solution."""


def optimum(regularizer: Regularizer, responses: ResponseSet) -> Tensor:
    """The optimal distribution over a response set.

    Returns:
        [K] float64 log-probabilities (nats), normalized over the set; −inf where π* is zero.

    Raises:
        NoOptimumError: it is not known, or its equations were not solved to |Σπ − 1| ≤ 1e-10.
    """
    log_pi = regularizer.log_optimum(responses)
    residual = torch.logsumexp(log_pi, 0).expm1().abs().item()
    if not residual <= TOLERANCE:
        raise NoOptimumError(f"{regularizer.name}: no optimum found; Σπ misses 1 by {residual:.1e}")
    return torch.log_softmax(log_pi, 0)


def optimum_of(regularizer: Regularizer, rewards: Tensor, ref_logp: Tensor) -> Tensor:
    """`optimum` from vectors [K], each response being one token."""
    count = len(rewards)
    return optimum(
        regularizer,
        ResponseSet(
            tokens=torch.arange(count)[:, None],
            ref_logp=ref_logp[:, None],
            mask=torch.ones(count, 1, dtype=torch.bool),
            rewards=rewards,
        ),
    )
