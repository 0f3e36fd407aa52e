"""How far a policy is from its optimum, told from several responses to the same prompt.

PPO credits a response with a(y) = r(x, y) + R + πR′ (eq. 3.6). At the optimum of a sequence-level
regularizer, the first-order condition says that a(y) is the same for all responses to a prompt that
have positive probability: a(y) = λ(x). Responses that differ in it therefore prove that the policy
has not arrived, and say how far away it is; no finite set of responses is needed.

For log-linear regularizers a/β = log π*(y|x) − log π(y|x) + log Z(x), and with y ~ π

    KL(π ‖ π*) = log E e^{a/β} − E a/β = Var(a)/(2β²) + O(a³)
    J(π*) − J(π) = β KL(π ‖ π*),   J(π) = E[r + R]

The optimum of a mixture (rewards/mixture.py) is Σ_k ρ_k π_k*, π_k* that of group k alone. With a_k
the credit under the rewards of group k, π_k*/π = e^{a_k/β}/E e^{a_k/β}, so that a/β is

    log π*(y|x) − log π(y|x) = log Σ_k ρ_k e^{a_k/β} / E e^{a_k/β}

up to log Z, and KL(π ‖ π*) = −E of it. Of one group these are the formulae above.

The expectations over y are means over a prompt's responses. Var and log are not linear, so that
their means would be off by a share of about 1/K. The jackknife (Quenouille 1956), K θ − (K − 1)
mean θ₋ᵢ with θ₋ᵢ that of the others without response i, leaves an error of order 1/K²; of one
group's variance, none.

Shapes: P prompts, K ≥ 2 responses to each, drawn independently from the policy; G groups.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from step3_rlhf.regularizers.base import Regularizer

ONE_GROUP = (1.0,)


def certificate(
    credit: Tensor, regularizer: Regularizer, shares: Sequence[float] = ()
) -> dict[str, Tensor]:
    """The distance from the optimum by its names, [P] each; {} if the credit does not tell it.

    gap     ½ Var(a)/β, in units of reward: what the objective can still gain, to second order, for
            a log-linear regularizer; for any other a figure that is 0 exactly at the optimum
    spread  Var(a)/β², in nats²
    kl      KL(π ‖ π*), in nats; log-linear regularizers only

    Args:
        credit: [P, K] a(y); of a mixture [P, K, G].
        shares: [G] ρ_k of a mixture; empty where there is none.
    """
    if not regularizer.levels_credit:
        return {}
    beta = regularizer.coefficient
    variance = spread(credit, beta, shares)
    found = {"gap": 0.5 * beta * variance, "spread": variance}
    if regularizer.is_log_linear:
        found["kl"] = kl_to_optimum(credit, beta, shares)
    return found


def spread(credit: Tensor, beta: float, shares: Sequence[float] = ()) -> Tensor:
    """[P] estimate of Var(a)/β² within each prompt; arguments as those of `certificate`."""

    def variance(values: Tensor) -> Tensor:
        return log_ratio_to_optimum(values, shares).var(-1, unbiased=False)

    return jackknife(variance, credit / beta)


def kl_to_optimum(credit: Tensor, beta: float, shares: Sequence[float] = ()) -> Tensor:
    """[P] estimate of KL(π ‖ π*); arguments as those of `certificate`.

    What is missing in it are responses too rare to be drawn: far from the optimum it is too small.
    """
    return jackknife(lambda values: -log_ratio_to_optimum(values, shares).mean(-1), credit / beta)


def log_ratio_to_optimum(values: Tensor, shares: Sequence[float] = ()) -> Tensor:
    """[..., K] log π*(y|x) − log π(y|x), nats, the normalizers being means over the K responses.

    Args:
        values: [..., K] a/β; with shares [..., K, G].
    """
    by_group = values if shares else values.unsqueeze(-1)
    weights = by_group.new_tensor(shares or ONE_GROUP)
    log_z = by_group.logsumexp(-2, keepdim=True) - math.log(by_group.shape[-2])
    return (weights.log() + by_group - log_z).logsumexp(-1)


def jackknife(statistic: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """[P] K θ − (K − 1) mean θ₋ᵢ.

    Args:
        statistic: from [..., K, ...] to [...].
        values: [P, K, ...]
    """
    count = values.shape[1]
    others = torch.tensor([[j for j in range(count) if j != i] for i in range(count)])
    without = statistic(values[:, others.to(values.device)].flatten(0, 1))
    return count * statistic(values) - (count - 1) * without.view(-1, count).mean(-1)
