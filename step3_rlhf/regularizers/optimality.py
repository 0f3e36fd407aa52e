"""How far a policy is from its optimum, told from several responses to the same prompt.

PPO credits a response with a(y) = r(x, y) + R + πR′ (eq. 3.6). At the optimum of a sequence-level
regularizer, the first-order condition says that a(y) is the same for all responses to a prompt that
have positive probability: a(y) = λ(x). Responses that differ in it therefore prove that the policy
has not arrived, and say how far away it is; no finite set of responses is needed.

For log-linear regularizers a/β = log π*(y|x) − log π(y|x) + log Z(x), and with y ~ π

    KL(π ‖ π*) = log E e^{a/β} − E a/β = Var(a)/(2β²) + O(a³)
    J(π*) − J(π) = β KL(π ‖ π*),   J(π) = E[r + R]

Shapes: P prompts, K ≥ 2 responses to each, drawn independently from the policy.
"""

import math

import torch
from torch import Tensor

from step3_rlhf.regularizers.base import Regularizer


def certificate(credit: Tensor, regularizer: Regularizer) -> dict[str, Tensor]:
    """The distance from the optimum by its names, [P] each; {} if the credit does not tell it.

    gap     ½ Var(a)/β, in units of reward: what the objective can still gain, to second order, for
            a log-linear regularizer; for any other a figure that is 0 exactly at the optimum
    spread  Var(a)/β², in nats²
    kl      KL(π ‖ π*), in nats; log-linear regularizers only

    Args:
        credit: [P, K] a(y).
    """
    if not regularizer.levels_credit:
        return {}
    beta = regularizer.coefficient
    variance = spread(credit, beta)
    found = {"gap": 0.5 * beta * variance, "spread": variance}
    return found | ({"kl": kl_to_optimum(credit, beta)} if regularizer.is_log_linear else {})


def spread(credit: Tensor, beta: float) -> Tensor:
    """[P] Var(a)/β² within each prompt, unbiased for any K ≥ 2.

    Args:
        credit: [P, K] a(y).
    """
    return (credit / beta).var(-1, unbiased=True)


def kl_to_optimum(credit: Tensor, beta: float) -> Tensor:
    """[P] estimate of KL(π ‖ π*) ≥ 0: log mean e^{a/β} − mean a/β, with the jackknife.

    The logarithm of a mean is too small on average, by about a share 1/K of the result. The
    jackknife (Quenouille 1956), K θ − (K − 1) mean θ₋ᵢ with θ₋ᵢ that of the others without
    response i, leaves a bias of order 1/K². What is still missing are responses too rare to be
    drawn: far from the optimum the estimate is too small.

    Args:
        credit: [P, K] a(y).
    """
    z = (credit - credit.mean(-1, keepdim=True)) / beta
    count = z.shape[-1]
    itself = torch.eye(count, dtype=torch.bool, device=z.device)
    others = z.unsqueeze(-2).masked_fill(itself, -math.inf)  # [P, K, K], row i without response i
    whole = z.logsumexp(-1) - math.log(count)  # mean z is 0
    without = others.logsumexp(-1) - math.log(count - 1)
    # The means of z without response i are 0 on average, as that of all is.
    return count * whole - (count - 1) * without.mean(-1)
