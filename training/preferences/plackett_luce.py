"""The Plackett–Luce model of choices: how likely a ranking is, given the rewards of its members."""

import torch
from torch import Tensor


def plackett_luce_loss(rewards: Tensor, present: Tensor) -> Tensor:
    """−log P(ranking) under the Plackett–Luce model (Assumption A.1), in nats.

    For two responses it is −log σ(r_w − r_l), eq. (2.2).

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
