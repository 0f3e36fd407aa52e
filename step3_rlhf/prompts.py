"""The order of prompts, and the seed of each draw: the same on any number of ranks."""

import torch
from datasets import Dataset

from step3_rlhf.config import PPOConfig
from training.data import shard
from training.runtime.ranks import rank, world_size

# What is drawn for: a draw's seed is (seed, purpose, position).
TRAINING, CENTERING, EVALUATION = 0, 1, 2

PromptBatch = tuple[list[list[int]], list[str], list[tuple[int, ...]]]


class Prompts:
    """An endless stream of prompts: each epoch is a permutation of its own."""

    def __init__(self, data: Dataset, config: PPOConfig) -> None:
        columns = data[:]  # read at once: one row at a time is slow in Arrow
        self.ids: list[list[int]] = columns["prompt_ids"]
        self.texts: list[str] = columns["prompt"]
        self.config = config
        self._orders: dict[int, list[int]] = {}

    def of_iteration(self, number: int) -> PromptBatch:
        """This rank's prompts of an iteration: ids, texts, and a seed for each.

        Each optimizer step gets the same global batch on any number of ranks.
        """
        config = self.config
        accumulation, micro = config.gradient_accumulation_steps, config.per_device_train_batch_size
        mini_batch = micro * accumulation * world_size()
        positions: list[int] = []
        for k in range(config.num_mini_batches):
            first = (number * config.num_mini_batches + k) * mini_batch
            whole = list(range(first, first + mini_batch))
            parts = shard(whole, rank(), world_size(), micro, accumulation)
            positions += [position for part in parts for position in part]
        return self._at(positions, TRAINING)

    def for_centering(self, count: int) -> PromptBatch:
        """This rank's share of `count` prompts, rounded up to the same number on every rank."""
        share = -(-count // world_size())
        return self._at([rank() + world_size() * k for k in range(share)], CENTERING)

    def _at(self, positions: list[int], purpose: int) -> PromptBatch:
        rows = [self._row(position) for position in positions]
        seeds: list[tuple[int, ...]] = [
            (self.config.seed, purpose, position) for position in positions
        ]
        return [list(self.ids[r]) for r in rows], [self.texts[r] for r in rows], seeds

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.texts))
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.texts), generator=generator).tolist()
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = order
        return self._orders[epoch][offset]


def iterations(config: PPOConfig, prompts: int, processes: int | None = None) -> int:
    """Iterations of the run; `total_episodes` must be a whole number of them.

    Raises:
        ValueError: with the path of the setting that does not fit.
    """
    processes = processes or world_size()
    per_iteration = config.local_rollout_size() * processes
    if config.total_episodes is None:
        return max(1, round(config.num_train_epochs * prompts / per_iteration))
    if config.total_episodes % per_iteration:
        raise ValueError(
            f"total_episodes: {config.total_episodes} is not a multiple of the {per_iteration} "
            "responses of one iteration (per_device_train_batch_size x "
            f"gradient_accumulation_steps x num_mini_batches x {processes} processes)"
        )
    return config.total_episodes // per_iteration
