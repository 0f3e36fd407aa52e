"""The models that are compared, and the log-probabilities they give to responses."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from step3_rlhf.config import EvaluationConfig
from step3_rlhf.rewards.sources import RewardSource
from step3_rlhf.rollout import Rollout
from training.models.lora import WithoutAdapter

Model = nn.Module | WithoutAdapter


@dataclass(frozen=True)
class Models:
    """Policy, reference and reward, and the tokenizer of policy and reference."""

    policy: nn.Module
    reference: Model
    reward: RewardSource
    tokenizer: PreTrainedTokenizerBase


@torch.no_grad()
def token_logps(model: Model, rollout: Rollout, config: EvaluationConfig) -> Tensor:
    """[B, R] float64 log-probability of each response token, nats, 0 where masked, on the CPU."""
    size = config.per_device_eval_batch_size
    found = torch.zeros(rollout.response_mask.shape, dtype=torch.float64)
    for first in range(0, len(rollout), size):
        rows = rollout.rows(first, first + size)
        logp, _ = model(rows.input_ids, rows.attention_mask, rows.scored_mask)
        found[first : first + size, : rows.response_mask.shape[1]] = rows.response_part(logp).cpu()
    return found
