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
def sequence_logps(model: Model, rollout: Rollout, config: EvaluationConfig) -> Tensor:
    """[B] float64 log π(y|x) of each whole response, nats."""
    size = config.per_device_eval_batch_size
    parts = []
    for first in range(0, len(rollout), size):
        rows = rollout.rows(first, first + size)
        parts.append(
            model(rows.input_ids, rows.attention_mask, rows.scored_mask)[0].double().sum(-1)
        )
    return torch.cat(parts)


@torch.no_grad()
def token_logps(model: Model, rollout: Rollout) -> Tensor:
    """[B, R] float64 log-probability of each response token, nats, on the CPU."""
    logp, _ = model(rollout.input_ids, rollout.attention_mask, rollout.scored_mask)
    return rollout.response_part(logp).double().cpu()
