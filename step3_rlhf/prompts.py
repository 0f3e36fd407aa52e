"""The order of prompts and the seed of each draw, the same on any number of ranks."""

import json
from typing import NamedTuple

import torch
from datasets import Dataset

from step3_rlhf.config import PPOConfig
from training.data import Dialogue, shard
from training.runtime.ranks import rank, world_size

# Purposes of a draw: its seed is (config.seed, purpose, position in the stream of prompts).
TRAINING, CENTERING, EVALUATION, CLASSES, PROMPT_CENTERING = 0, 1, 2, 3, 4


class PromptBatch(NamedTuple):
    """Prompts to draw one response each to; several responses to one prompt are adjacent rows.

    ids        [B] lists of token ids
    dialogues  [B] the same prompts as messages
    seeds      [B] one per draw; the same seed draws the same response
    """

    ids: list[list[int]]
    dialogues: list[Dialogue]
    seeds: list[tuple[int, ...]]


class Prompts:
    """An endless stream of prompts, shuffled differently in each epoch."""

    def __init__(self, data: Dataset, config: PPOConfig) -> None:
        columns = data[:]  # all at once: Arrow is slow row by row
        self.ids: list[list[int]] = columns["prompt_ids"]
        self.dialogues = [dialogue(messages) for messages in columns["messages"]]
        self.config = config
        self._orders: dict[int, list[int]] = {}

    def of_iteration(self, number: int) -> PromptBatch:
        """This rank's prompts of an iteration, counted from 0, each `num_generations` times.

        Each optimizer step has the same global batch on any number of ranks. All rows of a prompt
        are in one micro-batch.
        """
        each = self.config.num_generations
        draws = [each * place + k for place in self._places(number) for k in range(each)]
        return self._at(draws, TRAINING, each)

    def for_prompt_centering(self, number: int, draws: int) -> PromptBatch:
        """The same prompts, each once, `draws` times each."""
        places = self._places(number)
        every = [draws * place + k for place in places for k in range(draws)]
        return self._at(every, PROMPT_CENTERING, draws)

    def _places(self, number: int) -> list[int]:
        """The positions in the stream of this rank's prompts of an iteration."""
        config, each = self.config, self.config.num_generations
        accumulation, micro = config.gradient_accumulation_steps, config.per_device_train_batch_size
        mini_batch = micro * accumulation * world_size() // each
        prompts: list[int] = []
        for k in range(config.num_mini_batches):
            first = (number * config.num_mini_batches + k) * mini_batch
            positions_of_all = list(range(first, first + mini_batch))
            parts = shard(positions_of_all, rank(), world_size(), micro // each, accumulation)
            prompts += [position for part in parts for position in part]
        return prompts

    def for_centering(self, count: int) -> PromptBatch:
        """This rank's share of `count` prompts, rounded up so that every rank has equally many."""
        share = -(-count // world_size())
        return self._at([rank() + world_size() * k for k in range(share)], CENTERING)

    def _at(self, draws: list[int], purpose: int, each: int = 1) -> PromptBatch:
        """The prompts of the given draws; `each` consecutive ones belong to one prompt."""
        rows = [self._row(draw // each) for draw in draws]
        seeds: list[tuple[int, ...]] = [(self.config.seed, purpose, draw) for draw in draws]
        ids = [list(self.ids[row]) for row in rows]
        return PromptBatch(ids, [self.dialogues[row] for row in rows], seeds)

    def _row(self, position: int) -> int:
        """Row of the data set at a position of the stream."""
        epoch, offset = divmod(position, len(self.ids))
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.ids), generator=generator).tolist()
            # An iteration can straddle two epochs; older orders are dropped.
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = order
        return self._orders[epoch][offset]


def dialogue(messages: str) -> Dialogue:
    """The messages in a row of the column `messages`, which is JSON."""
    return tuple(json.loads(messages))


def iterations(config: PPOConfig, prompts: int, processes: int | None = None) -> int:
    """Number of iterations in the run.

    Args:
        prompts: number of training prompts.
        processes: of the run; None is as many as there are now.

    Raises:
        ValueError: `total_episodes` is not a whole number of iterations.
    """
    processes = processes or world_size()
    per_iteration = config.local_rollout_size() * processes
    if config.total_episodes is None:
        drawn = config.num_train_epochs * prompts * config.num_generations
        return max(1, round(drawn / per_iteration))
    if config.total_episodes % per_iteration:
        raise ValueError(
            f"total_episodes: {config.total_episodes} is not a multiple of the {per_iteration} "
            "responses of one iteration (per_device_train_batch_size x "
            f"gradient_accumulation_steps x num_mini_batches x {processes} processes)"
        )
    return config.total_episodes // per_iteration
