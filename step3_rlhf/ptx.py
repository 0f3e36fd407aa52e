"""PTX: supervised texts that are learned beside the rewards (Ouyang et al. 2022, eq. 2).

The actor's objective gains `ptx_coef` times the mean log-probability of a token of these texts. The
texts pull the policy towards them, so the optimum moves; without them it is the regularizer's own.
"""

from typing import NamedTuple

from datasets import Dataset
from torch import Tensor

from step3_rlhf.config import PPOConfig
from training.data import GlobalBatches, SequenceBatch, collate_texts, shard
from training.runtime.engine import TrainedModule
from training.runtime.ranks import device, rank, world_size


class PtxBatch(NamedTuple):
    """The texts beside one micro-batch of responses.

    texts   as many as the micro-batch has responses
    weight  of each token's loss in the sum that the actor's loss is
    tokens  that are learned from these texts
    """

    texts: SequenceBatch
    weight: float
    tokens: int


class PtxTexts:
    """The stream of texts, the same on any number of ranks: one text to each response."""

    def __init__(self, data: Dataset, config: PPOConfig, pad_token_id: int) -> None:
        self.data = data
        self.config = config
        self.pad_token_id = pad_token_id
        self.lengths = [len(ids) for ids in data["response_ids"]]
        micro, parts = config.per_device_train_batch_size, config.gradient_accumulation_steps
        self.order = GlobalBatches(len(data), world_size() * micro * parts, config.seed)

    def of_step(self, step: int, divisor: int) -> list[PtxBatch]:
        """This rank's micro-batches of optimizer step `step`, counted from 0.

        Args:
            divisor: what the step's loss sums are divided by, over all ranks and micro-batches.
        """
        config, rows = self.config, self.order.indices(step)
        micro, parts = config.per_device_train_batch_size, config.gradient_accumulation_steps
        weight = config.ptx_coef * divisor / sum(self.lengths[row] for row in rows)
        found = []
        for own in shard(rows, rank(), world_size(), micro, parts):
            texts = collate_texts(self.data, own, self.pad_token_id)
            tokens = int(texts.response_mask.sum())
            found.append(PtxBatch(texts.to(device()), weight, tokens))
        return found


def negative_log_likelihood(actor: TrainedModule, texts: SequenceBatch) -> Tensor:
    """[] −Σ log π of the texts' response tokens, nats."""
    logp, _ = actor(texts.input_ids, texts.attention_mask, texts.response_mask)
    return -logp.sum()
