"""Rewards from a sequence-classification model."""

import torch
from torch import Tensor, nn

from step3_rlhf.rewards.readings import Reading
from step3_rlhf.rollout import Rollout
from training.models.partitioned import is_partitioned
from training.models.scalar import last_token
from training.runtime import ranks


class ModelReward:
    """The scalar of a reward model, after the response's last token or for the whole text."""

    def __init__(self, model: nn.Module, read: Reading, batch_size: int) -> None:
        self.model = model
        self.read = read
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> Tensor:
        wanted = -(-len(rollout) // self.batch_size)
        forwards = ranks.max_over_ranks(wanted) if is_partitioned(self.model) else wanted
        parts = []
        for number in range(forwards):
            # Under ZeRO-3 a forward pass is a collective, so all ranks make equally many.
            first = number * self.batch_size if number < wanted else 0
            inputs = self.read(rollout.rows(first, first + self.batch_size))
            values = self.model(**inputs)
            if values.dim() == 2:  # [B, T], one value after each token
                values = last_token(values, inputs["attention_mask"])
            parts.append(values)
        return torch.cat(parts[:wanted])
