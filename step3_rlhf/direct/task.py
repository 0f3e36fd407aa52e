"""What direct optimization learns, in the form of the supervised stages' training loop."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor, nn

from step3_rlhf.direct.comparisons import ComparedBatch, Comparisons, RefLogps
from step3_rlhf.direct.config import DirectConfig
from step3_rlhf.direct.loss import compared_log_mass, direct_loss, implied_pairs
from training import fitting
from training.data import FILLER, Split
from training.runtime import ranks
from training.runtime.engine import TrainedModule

OF_PAIRS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
"""Means over the pairs that rankings imply, under the names of TRL's DPOTrainer."""
OF_MASS = ("compared/mass", "compared/log_mass")
"""Means over comparisons, known where the whole compared set is scored."""


@dataclass(frozen=True)
class Scored:
    """A batch under the policy and the regularizer.

    marginals  [C, K] m(y), in units of reward
    logps      [C, K] log π(y|x), nats
    ranked     [C, K] bool: where there is a response
    log_mass   [C] log Σ π(y|x) over the scored members of the compared set, nats
    """

    marginals: Tensor
    logps: Tensor
    ranked: Tensor
    log_mass: Tensor


class DirectOptimization:
    """Learns the regularizer's optimum from the likelihood of choices, in nats per comparison."""

    def __init__(
        self,
        trained: TrainedModule | nn.Module,
        train: Dataset,
        comparisons: Mapping[str, Comparisons],
        ref_logps: Mapping[str, RefLogps],
        config: DirectConfig,
        pad_token_id: int,
    ) -> None:
        """
        Args:
            comparisons, ref_logps: of the splits "train", "validation" and "test".
        """
        self.policy = trained
        self.train = train
        self.comparisons = comparisons
        self.ref_logps = ref_logps
        self.config = config
        self.pad_token_id = pad_token_id
        self.anchor = config.anchor.weight if config.anchor else 0.0
        self._sums = _no_sums()

    def collate(self, rows: list[int]) -> ComparedBatch:
        return self._batch("train", rows, whole_sets=self.anchor > 0)

    def _batch(self, split: str, rows: list[int], whole_sets: bool) -> ComparedBatch:
        comparisons, ref_logps = self.comparisons[split], self.ref_logps[split]
        batch = comparisons.batch(rows, ref_logps, self.pad_token_id, whole_sets)
        return batch.to(ranks.device())

    def items(self, batch: ComparedBatch) -> int:
        return int(batch.is_real.sum())

    def loss_sum(self, batch: ComparedBatch) -> Tensor:
        scored = self.scored(batch)
        self._sums += _sums(scored)
        return self._losses(scored).sum()

    def scored(self, batch: ComparedBatch) -> Scored:
        """Score each response once, and arrange what comparisons need."""
        sequences = batch.sequences
        logp, _ = self.policy(
            sequences.input_ids, sequences.attention_mask, sequences.response_mask
        )
        of_tokens = self.config.regularizer.marginal(logp, batch.ref_logp, sequences.response_mask)
        marginals, logps = of_tokens.per_token.sum(-1), logp.sum(-1)
        return Scored(
            marginals[batch.ranking],
            logps[batch.ranking],
            batch.ranked,
            compared_log_mass(logps[batch.members], batch.is_member),
        )

    def _losses(self, scored: Scored) -> Tensor:
        """[C] losses; 0 for a filler."""
        losses = direct_loss(scored.marginals, scored.ranked)
        return losses - self.anchor * scored.log_mass if self.anchor else losses

    def figures(self) -> dict[str, float]:
        """The means of the step just taken, over all ranks; forgets them."""
        sums, self._sums = ranks.sum_over_ranks(self._sums), _no_sums()
        return _means(sums, whole_sets=self.anchor > 0)

    @torch.no_grad()
    def evaluate(self, split: Split) -> dict[str, float]:
        total = torch.zeros(2, dtype=torch.float64, device=ranks.device())
        sums = _no_sums()
        by_set = self.comparisons[split].by_set()
        size = self.config.per_device_eval_batch_size
        for places in fitting.evaluation_batches(len(by_set), size):
            rows = [FILLER if place == FILLER else by_set[place] for place in places]
            batch = self._batch(split, rows, whole_sets=True)
            scored = self.scored(batch)
            total += torch.stack([self._losses(scored).sum().double(), batch.is_real.sum()])
            sums += _sums(scored)
        figures = {"loss": fitting.mean_over_ranks(total)}
        figures |= _means(ranks.sum_over_ranks(sums), whole_sets=True)
        return {f"{split}/{name}": value for name, value in figures.items()}


def _no_sums() -> Tensor:
    return torch.zeros(len(OF_PAIRS) + len(OF_MASS) + 2, dtype=torch.float64, device=ranks.device())


@torch.no_grad()
def _sums(scored: Scored) -> Tensor:
    """The sums of OF_PAIRS and the number of pairs; those of OF_MASS and that of comparisons."""
    row, better, worse = implied_pairs(scored.ranked)
    rewards, logps = -scored.marginals.double(), scored.logps.double()
    chosen, rejected = rewards[row, better], rewards[row, worse]
    of_pairs = torch.stack(
        [
            chosen,
            rejected,
            (chosen > rejected).double(),
            chosen - rejected,
            logps[row, better],
            logps[row, worse],
            torch.ones_like(chosen),
        ]
    )
    log_mass = scored.log_mass[scored.ranked.any(-1)].double()
    of_mass = torch.stack([log_mass.exp(), log_mass, torch.ones_like(log_mass)])
    return torch.cat([of_pairs.sum(-1), of_mass.sum(-1)])


def _means(sums: Tensor, whole_sets: bool) -> dict[str, float]:
    pairs, masses = sums.split([len(OF_PAIRS) + 1, len(OF_MASS) + 1])
    found: dict[str, float] = {}
    for names, (*totals, count) in ((OF_PAIRS, pairs.tolist()), (OF_MASS, masses.tolist())):
        if names is OF_PAIRS or whole_sets:
            found |= {
                name: total / max(count, 1.0) for name, total in zip(names, totals, strict=True)
            }
    return found
