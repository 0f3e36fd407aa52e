"""Comparisons, each response once: records -> the compared set of each prompt -> batches.

A prompt may have many comparisons of few responses. A batch scores each response once, however many
of its comparisons name it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from training.data import FILLER, SequenceBatch, pad_sequences

ROWS_AT_A_TIME = 1000
"""Records that are read from Arrow at once."""


@dataclass(frozen=True)
class ComparedSet:
    """A prompt and all responses that were compared for it, as arrays of token ids."""

    prompt: np.ndarray
    responses: list[np.ndarray]


@dataclass(frozen=True)
class Comparison:
    """A ranking of some members of a compared set.

    set      number of the set
    ranking  numbers of its responses, best first
    """

    set: int
    ranking: tuple[int, ...]


@dataclass(frozen=True)
class ComparedBatch:
    """C comparisons of B responses in all.

    Example: two comparisons for one prompt, 1 ≻ 0 and 2 ≻ 1: B = 3, ranking [[0, 1], [2, 0]] after
    the order in which responses are met.
    """

    sequences: SequenceBatch  # B rows: each response once, after its prompt
    ref_logp: Tensor  # [B, T] log π_ref of the response's tokens, nats; 0 elsewhere
    ranking: Tensor  # [C, K] long: the rows of a comparison's responses, best first
    ranked: Tensor  # [C, K] bool: whether there is one; nowhere in a filler
    members: Tensor  # [C, S] long: the rows of the compared set, as far as it is scored
    is_member: Tensor  # [C, S] bool

    @property
    def is_real(self) -> Tensor:
        """[C] bool: False for filler, which carries no loss."""
        return self.ranked.any(-1)

    def to(self, device: torch.device | str) -> "ComparedBatch":
        """The same batch on `device`."""
        return ComparedBatch(*(getattr(self, field.name).to(device) for field in fields(self)))


class Comparisons:
    """The comparisons of a split, in the order of its rows, and their compared sets."""

    def __init__(self, data: Dataset) -> None:
        """`data`: columns `prompt_ids` and `responses_ids`, best first, without ties."""
        self.sets: list[ComparedSet] = []
        self.rows: list[Comparison] = []
        numbers: dict[bytes, int] = {}
        members: list[dict[bytes, int]] = []
        for prompt, responses in _arrays(data):
            number = numbers.setdefault(prompt.tobytes(), len(numbers))
            if number == len(self.sets):
                self.sets.append(ComparedSet(prompt, []))
                members.append({})
            known = self.sets[number].responses
            ranking = []
            for response in responses:
                member = members[number].setdefault(response.tobytes(), len(known))
                if member == len(known):
                    known.append(response)
                ranking.append(member)
            self.rows.append(Comparison(number, tuple(ranking)))

    @property
    def divided_sets(self) -> int:
        """Number of compared sets that fall into parts without a comparison between them."""
        parts = [list(range(len(compared.responses))) for compared in self.sets]
        for row in self.rows:
            part = parts[row.set]
            joined = {part[member] for member in row.ranking}
            parts[row.set] = [min(joined) if label in joined else label for label in part]
        return sum(len(set(part)) > 1 for part in parts)

    def by_set(self) -> list[int]:
        """All rows, those of one set after one another, so that a batch has few responses."""
        return sorted(range(len(self.rows)), key=lambda row: self.rows[row].set)

    def batch(
        self, rows: Sequence[int], ref_logps: "RefLogps", pad_token_id: int, whole_sets: bool
    ) -> ComparedBatch:
        """The comparisons in `rows` with their responses; FILLER has none.

        Args:
            whole_sets: score all responses that were compared for a prompt, ranked here or not.
        """
        places: dict[tuple[int, int], int] = {}

        def place(number: int, member: int) -> int:
            return places.setdefault((number, member), len(places))

        rankings: list[list[int]] = []
        members: list[list[int]] = []
        for row in rows:
            found = Comparison(0, ()) if row == FILLER else self.rows[row]
            rankings.append([place(found.set, member) for member in found.ranking])
            wanted = range(len(self.sets[found.set].responses)) if whole_sets else found.ranking
            members.append([place(found.set, member) for member in wanted if found.ranking])
        if not places:  # filler alone: all ranks take part in the forward pass
            place(0, 0)
        sequences = pad_sequences(
            [self.sets[number].prompt.tolist() for number, _ in places],
            [self.sets[number].responses[member].tolist() for number, member in places],
            pad_token_id,
        )
        values = torch.cat([ref_logps.of(number, member) for number, member in places])
        ref_logp = torch.zeros(sequences.response_mask.shape)
        ref_logp = ref_logp.masked_scatter(sequences.response_mask, values)
        return ComparedBatch(sequences, ref_logp, *_grid(rankings), *_grid(members))


class RefLogps:
    """log π_ref of every token of every response of the compared sets, nats, float32."""

    def __init__(self, comparisons: Comparisons, values: Tensor) -> None:
        """`values`: [tokens] of all responses, set by set."""
        lengths = [len(response) for found in comparisons.sets for response in found.responses]
        if sum(lengths) != len(values):
            raise ValueError(f"{len(values)} log-probabilities for {sum(lengths)} tokens")
        self.values = values
        self._parts = values.split(lengths)
        sizes = [len(found.responses) for found in comparisons.sets]
        self._first = np.cumsum([0, *sizes]).tolist()

    def of(self, number: int, member: int) -> Tensor:
        """[length] those of one response of set `number`."""
        return self._parts[self._first[number] + member]


def without_ties(data: Dataset) -> Dataset:
    """The comparisons with the first response of each tie, and of those of unknown order, only.

    Marginals have no likelihood of ties here; a comparison of tied responses alone is left out.
    """

    def kept(row: dict[str, Any]) -> dict[str, Any]:
        levels = list(row["levels"])
        if row["unranked"]:
            levels[-row["unranked"] :] = [levels[-1]] * row["unranked"]
        first = [place for place in range(len(levels)) if levels[place] not in levels[:place]]
        return {
            "responses_ids": [row["responses_ids"][place] for place in first],
            "levels": [levels[place] for place in first],
            "unranked": 0,
            "largest_tie": 1,
        }

    tied = [
        unranked > 0 or len(set(levels)) < len(levels)
        for levels, unranked in zip(data["levels"][:], data["unranked"][:], strict=True)
    ]
    if not any(tied):
        return data
    reduced = data.map(kept)
    return reduced.select([k for k, levels in enumerate(reduced["levels"][:]) if len(levels) > 1])


def _arrays(data: Dataset) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    columns = data.select_columns(["prompt_ids", "responses_ids"])
    for part in columns.iter(ROWS_AT_A_TIME):
        for prompt, responses in zip(part["prompt_ids"], part["responses_ids"], strict=True):
            yield np.array(prompt, np.int32), [np.array(ids, np.int32) for ids in responses]


def _grid(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows of several lengths as [rows, longest] with 0 behind their ends, and where they are."""
    width = max(1, *map(len, rows))
    filled = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return filled, torch.tensor([[k < len(row) for k in range(width)] for row in rows])
