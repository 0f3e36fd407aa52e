"""The paper's metrics (section 6.1) and exact distances on finite sets, as pure functions.

Log-probabilities are natural logarithms; π(y|x) = exp(Σ_t log π_t), EOS included.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def pm_divergence(
    logp_1: Tensor, logp_2: Tensor, reward_1: Tensor, reward_2: Tensor, temperature: float
) -> Tensor:
    """Instance preference matching divergence (section 6.1), in nats.

    KL(Bernoulli(p_llm) ‖ Bernoulli(p_reward)) with p_llm = σ(log π(y1) − log π(y2)) and
    p_reward = σ((r1 − r2) / β). It is computed in log space and finite if its arguments are.

    Args:
        logp_1, logp_2: [prompts] log π of two independent responses to each prompt.
        reward_1, reward_2: [prompts] their rewards.
        temperature: β.

    Returns:
        [prompts] values ≥ 0; their mean is the PM divergence.
    """
    llm = (logp_1 - logp_2).double()
    reward = (reward_1 - reward_2).double() / temperature
    first = llm.sigmoid() * (logsigmoid(llm) - logsigmoid(reward))
    second = (-llm).sigmoid() * (logsigmoid(-llm) - logsigmoid(-reward))
    return (first + second).clamp(min=0.0)


def pm_squared_difference(
    logp_1: Tensor, logp_2: Tensor, reward_1: Tensor, reward_2: Tensor, temperature: float
) -> Tensor:
    """(p_llm − p_reward)², the published evaluation's "eval pm"; arguments of `pm_divergence`.

    Returns:
        [prompts] values from 0 to 1.
    """
    llm = (logp_1 - logp_2).double().sigmoid()
    reward = ((reward_1 - reward_2).double() / temperature).sigmoid()
    return (llm - reward).square()


def response_perplexity(logp: Tensor, lengths: Tensor) -> Tensor:
    """[p_1 · … · p_L]^{−1/L} of each response (section 6.1); the metric is the mean of these.

    Args:
        logp: [responses] log π(y|x).
        lengths: [responses] tokens, EOS included.
    """
    return torch.exp(-logp.double() / lengths)


def text_perplexity(logp: Tensor, lengths: Tensor) -> float:
    """exp(−Σ log π / Σ tokens) over all texts."""
    return torch.exp(-logp.double().sum() / lengths.sum()).item()


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """½ Σ |p − q| of two distributions, given as normalized log-probabilities [..., K]."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ p (log p − log q) in nats, from normalized log-probabilities [..., K]; 0 log 0 = 0."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
