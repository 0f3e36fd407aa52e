"""How many responses the optimum itself cuts at `response_length`.

The optimum of a log-linear regularizer is ∝ w(y|x)·e^{r/β} on the responses that end by themselves
and on those that are cut. Let the weights w_t depend on the last token only, W = [w(v|s)] over the
tokens v that do not end a response, ρ the Perron root of W, u its left eigenvector with sum 1, and
e = w(end|·). With r = 0 and a limit of L tokens, the mass of cut responses grows as ρ^L and that of
ended ones as u·e Σ_{t<L} ρ^t, so that as L → ∞

    P*(cut) → 0                          if ρ < 1
    P*(cut) → (ρ − 1)/(ρ − 1 + u·e)      if ρ > 1

A reward within a range of s moves the odds by at most e^{s/β}. Under `kl`, ρ < 1 always; under
`pm`, ρ is the number of tokens that do not end a response.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from step3_rlhf.regularizers.log_linear import LogLinear

Statistic = Callable[[Tensor, Tensor], Tensor]
"""From logits [rows, vocabulary] and log Σ e^logit [rows] to one number per row."""

NEVER = -1e4
"""Log-probability in nats below which a token does not exist."""


def cut_share(log_growth: float, end_weight: float, length: int) -> float:
    """Share of the optimum's responses that are cut after `length` tokens, for r = 0.

    1/(1 + e Σ_{k=1}^{L} ρ^{−k}), which tends to the law above.

    Args:
        log_growth: log ρ.
        end_weight: u·e.
    """
    exponents = [-log_growth * k for k in range(1, length + 1)]
    if max(exponents) > 700:  # the sum would overflow
        return 0.0
    return 1.0 / (1.0 + end_weight * math.fsum(map(math.exp, exponents)))


def log_growth_of(regularizer: LogLinear, log_ref: Tensor, ends: Tensor) -> Tensor:
    """[rows] log Σ w(v|prefix) over the tokens that do not end a response, nats.

    Args:
        log_ref: [rows, vocabulary] log π_ref of every token after a prefix.
        ends: [vocabulary] bool, the tokens that end a response.
    """
    return _log_weights(regularizer, log_ref).masked_fill(ends, -math.inf).logsumexp(-1)


def end_weight_of(regularizer: LogLinear, log_ref: Tensor, ends: Tensor) -> Tensor:
    """[rows] Σ w(v|prefix) over the tokens that end a response; arguments as above."""
    return _log_weights(regularizer, log_ref).masked_fill(~ends, -math.inf).logsumexp(-1).exp()


def law_statistics(regularizer: LogLinear, ends: Sequence[int]) -> list[Statistic]:
    """`log_growth_of` and `end_weight_of` at the prefixes whose logits are given.

    Args:
        ends: the token ids that end a response.
    """

    def statistic(of: Callable[[LogLinear, Tensor, Tensor], Tensor]) -> Statistic:
        def value(logits: Tensor, log_normalizer: Tensor) -> Tensor:
            is_end = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
            is_end[list(ends)] = True
            return of(regularizer, logits - log_normalizer[:, None], is_end)

        return value

    return [statistic(log_growth_of), statistic(end_weight_of)]


def _log_weights(regularizer: LogLinear, log_ref: Tensor) -> Tensor:
    everywhere = torch.ones(log_ref.shape, dtype=torch.bool, device=log_ref.device)
    log_w = regularizer.log_weights(log_ref, everywhere)
    return log_w.masked_fill(log_ref < NEVER, -math.inf)
