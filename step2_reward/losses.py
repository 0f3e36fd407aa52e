"""Preference losses: pure functions of rewards, in nats, one term per comparison."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def btl_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """−log σ(r(x, y_w) − r(x, y_l)), eq. (2.2).

    Args:
        chosen, rejected: [pairs] rewards.

    Returns:
        [pairs] losses.
    """
    return -logsigmoid(chosen - rejected)  # (2.2)


def plackett_luce_loss(rewards: Tensor, present: Tensor) -> Tensor:
    """−log P(ranking) under the Plackett–Luce model (Assumption A.1); `btl_loss` for two responses.

    Args:
        rewards: [rankings, responses], best first.
        present: [rankings, responses] bool; False after the last response of a shorter ranking.

    Returns:
        [rankings] losses; 0 for a ranking without responses.
    """
    rewards = rewards.masked_fill(~present, -torch.inf)
    # log Σ_{j ≥ i} e^{r_j}, accumulated from the last response
    remaining = rewards.flip(-1).logcumsumexp(-1).flip(-1)
    # A.1: Σ_i ( log Σ_{j ≥ i} e^{r_τ(j)} − r_τ(i) )
    return torch.where(present, remaining - rewards, 0.0).sum(-1)
