"""Token ids -> padded tensors, and the order in which a run sees its data."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from datasets import Dataset

FILLER = -1
"""Index of a row that only fills a batch up to its shape and carries no loss."""

IGNORED = -100
"""The label that cross-entropy ignores."""


@dataclass(frozen=True)
class SequenceBatch:
    """Prompts with their responses, padded on the right to the longest row.

    Example, pad 0, EOS 2: prompt [5, 6] with response [7, 2] beside prompt [8] with [2]

        input_ids      [[5, 6, 7, 2], [8, 2, 0, 0]]
        attention_mask [[1, 1, 1, 1], [1, 1, 0, 0]]
        response_mask  [[0, 0, 1, 1], [0, 1, 0, 0]]
    """

    input_ids: torch.Tensor
    """[B, T] long."""
    attention_mask: torch.Tensor
    """[B, T] long, 1 on tokens."""
    response_mask: torch.Tensor
    """[B, T] bool, True on response tokens, EOS included; all False in a filler row."""

    @property
    def last_positions(self) -> torch.Tensor:
        """[B] long: the column of each row's last token, filler rows included."""
        return self.attention_mask.sum(dim=1) - 1

    def to(self, device: torch.device | str) -> "SequenceBatch":
        """The same batch on `device`."""
        parts = (getattr(self, field.name) for field in fields(self))
        return SequenceBatch(*(part.to(device, non_blocking=True) for part in parts))


@dataclass(frozen=True)
class GroupedBatch:
    """Several responses per prompt, best first, one sequence per row.

    Example: two groups, of 2 and 3 responses: group_index [0, 0, 1, 1, 1], group_sizes [2, 3].
    """

    sequences: SequenceBatch
    """B rows: the responses of all groups."""
    group_index: torch.Tensor
    """[B] long: the group of each row."""
    group_sizes: torch.Tensor
    """[n_groups] long; sums to B."""
    group_mask: torch.Tensor
    """[n_groups] bool: False for filler groups, which carry no loss."""
    levels: torch.Tensor
    """[n_groups, largest group] long: the same number for tied responses; −1 behind the last."""
    unranked: torch.Tensor
    """[n_groups] long: how many of the last responses come after the others in unknown order."""
    largest_tie: torch.Tensor
    """[n_groups] long: the most responses that could be tied; 1 if none could. Both stay on the
    host, where it is decided which likelihood the batch needs."""

    def to(self, device: torch.device | str) -> "GroupedBatch":
        """The same batch on `device`."""
        names = ("group_index", "group_sizes", "group_mask", "levels")
        parts = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, sequences=self.sequences.to(device), **parts)


def pad_sequences(
    prompt_ids: Sequence[Sequence[int]], response_ids: Sequence[Sequence[int]], pad_token_id: int
) -> SequenceBatch:
    """Join each prompt with its response and pad on the right to the longest row.

    Raises:
        ValueError: there are no rows, or the numbers of prompts and responses differ.
    """
    if not prompt_ids or len(prompt_ids) != len(response_ids):
        raise ValueError(f"{len(prompt_ids)} prompts with {len(response_ids)} responses")
    rows = [(list(p), list(r)) for p, r in zip(prompt_ids, response_ids, strict=True)]
    length = max(len(p) + len(r) for p, r in rows)
    shape = (len(rows), length)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    response_mask = torch.zeros(shape, dtype=torch.bool)
    for index, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        input_ids[index, :end] = torch.tensor(prompt + response, dtype=torch.long)
        attention_mask[index, :end] = 1
        response_mask[index, len(prompt) : end] = True
    return SequenceBatch(input_ids, attention_mask, response_mask)


def pad_prompts(
    prompt_ids: Sequence[Sequence[int]], pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad prompts on the left to the longest: input_ids and attention_mask, [B, T] long.

    Raises:
        ValueError: there are no rows.
    """
    if not prompt_ids:
        raise ValueError("no prompts")
    shape = (len(prompt_ids), max(len(ids) for ids in prompt_ids))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for index, ids in enumerate(prompt_ids):
        start = shape[1] - len(ids)
        input_ids[index, start:] = torch.tensor(list(ids), dtype=torch.long)
        attention_mask[index, start:] = 1
    return input_ids, attention_mask


def response_labels(batch: SequenceBatch) -> torch.Tensor:
    """[B, T] long: the input ids at response tokens, -100 elsewhere; not shifted."""
    return batch.input_ids.masked_fill(~batch.response_mask, IGNORED)


def collate_texts(dataset: "Dataset", indices: Sequence[int], pad_token_id: int) -> SequenceBatch:
    """Collate SFT rows into a micro-batch; filler rows have no response tokens."""
    rows = _rows(dataset, indices)
    batch = pad_sequences(
        [row["prompt_ids"] for row in rows], [row["response_ids"] for row in rows], pad_token_id
    )
    is_real = torch.tensor([index != FILLER for index in indices])
    return SequenceBatch(
        batch.input_ids, batch.attention_mask, batch.response_mask & is_real[:, None]
    )


def collate_groups(dataset: "Dataset", indices: Sequence[int], pad_token_id: int) -> GroupedBatch:
    """Collate preference rows into a micro-batch with the responses of all groups."""
    rows = _rows(dataset, indices)
    sizes = torch.tensor([len(row["responses_ids"]) for row in rows])
    group_mask = torch.tensor([index != FILLER for index in indices])
    group_index = torch.repeat_interleave(torch.arange(len(rows)), sizes)
    batch = pad_sequences(
        [row["prompt_ids"] for row in rows for _ in row["responses_ids"]],
        [response for row in rows for response in row["responses_ids"]],
        pad_token_id,
    )
    response_mask = batch.response_mask & group_mask[group_index][:, None]
    sequences = SequenceBatch(batch.input_ids, batch.attention_mask, response_mask)
    width = int(sizes.max())
    levels = [row["levels"] + [-1] * (width - len(row["levels"])) for row in rows]
    order = [torch.tensor([row[name] for row in rows]) for name in ("unranked", "largest_tie")]
    return GroupedBatch(sequences, group_index, sizes, group_mask, torch.tensor(levels), *order)


def _rows(dataset: "Dataset", indices: Sequence[int]) -> list[dict[str, Any]]:
    """Read the rows; a filler borrows the tokens of the first real row (or of row 0)."""
    stand_in = next((index for index in indices if index != FILLER), 0)
    # All rows in one read: Arrow is slow one row at a time.
    columns = dataset[[stand_in if index == FILLER else index for index in indices]]
    return [{name: values[k] for name, values in columns.items()} for k in range(len(indices))]


class GlobalBatches:
    """The order of the data, which is the same on any number of ranks and can resume at any step.

    Epoch e is a permutation seeded by (seed, e) and cut into global batches. The last batch of an
    epoch may be shorter; no row is dropped or repeated.
    """

    def __init__(self, size: int, global_batch_size: int, seed: int, shuffle: bool = True) -> None:
        if size < 1 or global_batch_size < 1:
            raise ValueError(f"{size} rows in batches of {global_batch_size}")
        self.size = size
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.steps_per_epoch = -(-size // global_batch_size)
        self._epoch = -1
        self._order: list[int] = []

    def indices(self, step: int) -> list[int]:
        """The rows of optimizer step `step`, counted from 0 across all epochs."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            order = rng.permutation(self.size).tolist() if self.shuffle else range(self.size)
            self._order, self._epoch = list(order), epoch
        start = position * self.global_batch_size
        return self._order[start : start + self.global_batch_size]


def shard(
    indices: Sequence[int], rank: int, world_size: int, micro_batch_size: int, accumulation: int
) -> list[list[int]]:
    """This rank's micro-batches of a global batch.

    Every rank gets `accumulation` micro-batches of `micro_batch_size` rows, so that all ranks take
    part in every collective operation; FILLER entries pad a shorter batch.

    Raises:
        ValueError: the batch is too large for the ranks' micro-batches, or `rank` is out of range.
    """
    capacity = world_size * micro_batch_size * accumulation
    if len(indices) > capacity:
        raise ValueError(f"{len(indices)} rows do not fit into a global batch of {capacity}")
    if not 0 <= rank < world_size:
        raise ValueError(f"no rank {rank} among {world_size}")
    # A stride spreads a short batch evenly over the ranks.
    mine = list(indices[rank::world_size])
    mine += [FILLER] * (micro_batch_size * accumulation - len(mine))
    return [
        mine[start : start + micro_batch_size] for start in range(0, len(mine), micro_batch_size)
    ]
