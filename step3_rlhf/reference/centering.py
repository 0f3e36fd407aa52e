"""The mean reward of the reference policy, at which rewards are centered (C_1 of Example 2)."""

import torch
from torch import Tensor

from step3_rlhf.rollout import Rollout
from training.runtime.faults import dumped, require_finite
from training.runtime.ranks import sum_over_ranks


def mean_reward(rollout: Rollout, rewards: Tensor, name: str, output_dir: str) -> float:
    """E_{π_ref} r, estimated from responses of the reference; the same on every rank.

    Args:
        rollout: this rank's responses, which are written into `output_dir` if a reward is not
            finite.
        rewards: [B] float64, their effective rewards.
        name: what the rewards are called.

    Raises:
        UserError: a reward is not finite.
    """
    with dumped(output_dir, 0, rollout.readable):
        require_finite(f"{name} of the reference's responses", rewards)
    total, count = sum_over_ranks(torch.stack([rewards.sum(), torch.ones_like(rewards).sum()]))
    return (total / count).item()
