"""The models that are compared, and the log-probabilities they give to responses."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from step3_rlhf.classes.shares import ClassShares
from step3_rlhf.config import EvaluationConfig
from step3_rlhf.regularizers.log_linear import LogLinear
from step3_rlhf.regularizers.truncation import law_statistics
from step3_rlhf.rewards.sources import RewardSource
from step3_rlhf.rollout import Rollout
from training.models.logprobs import masked_sum
from training.models.lora import WithoutAdapter

Model = nn.Module | WithoutAdapter


@dataclass(frozen=True)
class Models:
    """Policy, reference and reward, if there is one; the tokenizer of policy and reference.

    `classes` finds the class shares that the regularizer needs; None where it needs none.
    """

    policy: nn.Module
    reference: Model
    reward: RewardSource | None
    tokenizer: PreTrainedTokenizerBase
    classes: ClassShares | None = None

    def class_logp(self, rollout: Rollout) -> Tensor | None:
        """[B] float64 log π_ref(c(y)|x) on the CPU, nats; None where responses have no classes."""
        return self.classes(rollout).cpu() if self.classes else None


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


@torch.no_grad()
def law_sums(
    models: Models, rollout: Rollout, regularizer: LogLinear, config: EvaluationConfig
) -> tuple[Tensor, Tensor]:
    """Sums over each response's prefixes of the truncation law's quantities at the reference.

    Returns:
        Two tensors [B] float64: Σ_t log Σ w(v|prefix_t) over the tokens v that do not end a
        response, nats, and Σ_t Σ w(v|prefix_t) over those that do.
    """
    ends = getattr(models.policy, "ends", ()) or (models.tokenizer.eos_token_id,)
    size = config.per_device_eval_batch_size
    sums = torch.zeros(2, len(rollout), dtype=torch.float64)
    for first in range(0, len(rollout), size):
        rows = rollout.rows(first, first + size)
        inputs = (rows.input_ids, rows.attention_mask, rows.scored_mask)
        for place, statistic in enumerate(law_statistics(regularizer, ends)):
            _, values = models.reference(*inputs, statistic=statistic)
            sums[place, first : first + size] = masked_sum(values.double(), rows.scored_mask, 1)
    return sums[0], sums[1]


DISTRIBUTIONS = 2**25
"""Largest number of probabilities, tokens × vocabulary, of which two copies exist at a time."""


@torch.no_grad()
def full_vocabulary_sums(
    models: Models, rollout: Rollout, response_length: int
) -> tuple[Tensor, Tensor]:
    """Sums over each response's tokens of the entropy of π and of KL(π ‖ π_ref), in nats.

    Both are over the whole next-token distribution at each prefix that was drawn, as the published
    evaluation takes them, and not of the drawn tokens only.

    Args:
        response_length: tokens of the longest response possible; the same on every rank.

    Returns:
        Two tensors [B] float64.
    """
    size = max(1, DISTRIBUTIONS // (response_length * len(models.tokenizer)))
    entropies: list[Tensor] = []
    divergences: list[Tensor] = []
    for first in range(0, len(rollout), size):
        rows = rollout.rows(first, first + size)
        inputs = (rows.input_ids, rows.attention_mask, rows.scored_mask)
        _, log_p = models.policy(*inputs, whole=True)
        _, log_q = models.reference(*inputs, whole=True)
        both = min(log_p.shape[-1], log_q.shape[-1])  # rows that only pad an embedding have none
        p = log_p.exp()
        entropy = -(p * log_p).sum(-1)
        divergence = (p[:, :both] * (log_p[:, :both] - log_q[:, :both])).sum(-1)
        row = rows.scored_mask.nonzero()[:, 0]
        for values, sums in ((entropy, entropies), (divergence, divergences)):
            zeros = values.new_zeros(len(rows), dtype=torch.float64)
            sums.append(zeros.index_add(0, row, values.double()))
    return torch.cat(entropies), torch.cat(divergences)
