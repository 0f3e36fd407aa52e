"""Packing: several short sequences in one row, and what they have in common computed once.

The sequences of a padded batch move into fewer rows. Sequences that begin alike, such as the
responses to one prompt, share the tokens of their common prefix. Each token attends to the past of
its own sequence only, and the hidden states move back to the places of the tokens in the batch.
Nothing outside the models notices, and every loss is the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from training.errors import UserError

PACKABLE = frozenset({"gpt2", "llama", "mistral", "opt", "qwen2", "qwen3"})
"""Model types (transformers' names) whose packed and padded batches a test compares."""

WORTH_SHARING = 0.2
"""The least part of a sequence that it must have in common with others to share it."""

WIDEST = 4
"""The largest width of a row of a family, in widths of the batch: attention grows with it."""


@dataclass(frozen=True)
class Packed:
    """B sequences of up to L tokens in R ≤ B rows of width W ≥ L.

    Example, pad 0: [[5, 6, 7, 8], [5, 6, 0, 0], [0, 0, 0, 9]] becomes

        input_ids     [[5, 6, 7, 8], [9, 0, 0, 0]]
        position_ids  [[0, 1, 2, 3], [0, 0, 0, 0]]
        rows          [0, 0, 0, 0, 0, 0, 1]   for the batch's tokens, row by row
        columns       [0, 1, 2, 3, 0, 1, 0]
        from_rows     [0, 0, 0, 0, 1, 1, 2]   and their places in the batch
        from_columns  [0, 1, 2, 3, 0, 1, 3]
    """

    input_ids: Tensor  # [R, W] long
    position_ids: Tensor  # [R, W] long
    attention_mask: Tensor  # [R, 1, W, W] bool: whether token q attends to token k
    rows: Tensor  # [tokens] long; a shared token has the same place for all its sequences
    columns: Tensor  # [tokens] long
    from_rows: Tensor  # [tokens] long
    from_columns: Tensor  # [tokens] long
    sequences: int  # B
    length: int  # L

    def unpacked(self, hidden: Tensor) -> Tensor:
        """Move hidden states [R, W, H] back to [B, L, H]; 0 on padding."""
        batch = hidden.new_zeros(self.sequences, self.length, hidden.shape[-1])
        batch[self.from_rows, self.from_columns] = hidden[self.rows, self.columns]
        return batch


@dataclass
class Family:
    """Sequences that share their first `common` tokens; a family of one shares nothing.

    members: numbers of the sequences.
    tokens: all that is computed for them, the common tokens once.
    """

    members: list[int]
    common: int
    tokens: int


def pack(input_ids: Tensor, attention_mask: Tensor) -> Packed:
    """Pack the sequences into fewer rows: the largest family first, each into the first with room.

    Args:
        input_ids: [B, L], padded on either side.
        attention_mask: [B, L], 0 on padding.
    """
    # The only wait for a GPU: the plan is made on the host.
    host = torch.where(attention_mask.bool(), input_ids, -1).cpu()
    valid = host >= 0
    length = valid.shape[1]
    texts = [[token for token in row if token >= 0] for row in host.tolist()]
    found = list(families(texts))
    width = max(length, min(WIDEST * length, max(family.tokens for family in found)))
    blocks = [part for family in found for part in parts(family, texts, width)]

    row_of, start_of, common_of = [0] * len(texts), [0] * len(texts), [0] * len(texts)
    prefix_of, used = [0] * len(texts), list[int]()
    for block in sorted(blocks, key=lambda block: -block.tokens):
        fitting = (row for row, taken in enumerate(used) if taken + block.tokens <= width)
        row = next(fitting, len(used))
        if row == len(used):
            used.append(0)
        own = used[row] + block.common
        for member in block.members:
            row_of[member], prefix_of[member] = row, used[row]
            common_of[member], start_of[member] = block.common, own
            own += len(texts[member]) - block.common
        used[row] += block.tokens

    from_rows, from_columns = valid.nonzero(as_tuple=True)
    place = (valid.cumsum(-1) - 1)[valid]
    common, prefix, start = (torch.tensor(of)[from_rows] for of in (common_of, prefix_of, start_of))
    is_shared = place < common
    rows = torch.tensor(row_of)[from_rows]
    columns = torch.where(is_shared, prefix + place, start + place - common)
    positions = torch.zeros(len(used), width, dtype=torch.long)
    positions[rows, columns] = place
    # A token belongs to a segment: the common tokens of a family, or the others of a sequence.
    # Segments are told apart by the columns at which they begin; −1 is padding, which attends to
    # padding. A token sees its own segment and the one that its sequence begins with.
    segment, first = torch.full_like(positions, -1), torch.full_like(positions, -1)
    segment[rows, columns] = torch.where(is_shared, prefix, start)
    first[rows, columns] = torch.where(common > 0, prefix, start)
    plan = (positions, segment, first, rows, columns, from_rows, from_columns)
    positions, segment, first, rows, columns, from_rows, from_columns = (
        part.to(input_ids.device, non_blocking=True) for part in plan
    )
    packed_ids = input_ids.new_zeros(positions.shape)
    packed_ids[rows, columns] = input_ids[from_rows, from_columns]
    seen = segment[:, None, :]
    within = ((seen == segment[:, :, None]) | (seen == first[:, :, None])).tril()
    return Packed(
        packed_ids,
        positions,
        within[:, None],
        rows,
        columns,
        from_rows,
        from_columns,
        len(texts),
        length,
    )


def families(texts: Sequence[list[int]]) -> Iterator[Family]:
    """Divide the sequences into families, so that as few tokens as possible are computed.

    In alphabetical order those that begin alike are neighbours. The next sequence joins a family if
    fewer tokens are computed with it than apart, and if it shares enough of its own.
    """
    family: Family | None = None
    for number in sorted(range(len(texts)), key=lambda number: texts[number]):
        size = len(texts[number])
        if family is None:
            family = Family([number], 0, size)
            continue
        members = len(family.members)
        before = family.common if members > 1 else len(texts[family.members[0]])
        last = texts[family.members[-1]]
        common = min(before, in_common(last, texts[number]))
        saved = members * common - (members - 1) * before
        if saved > 0 and common >= WORTH_SHARING * size:
            apart = family.tokens + size
            family = Family([*family.members, number], common, apart - saved)
        else:
            yield family
            family = Family([number], 0, size)
    if family is not None:
        yield family


def in_common(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of tokens that two sequences have in common at their beginnings."""
    shorter = min(len(one), len(other))
    return next((place for place in range(shorter) if one[place] != other[place]), shorter)


def parts(family: Family, texts: Sequence[Sequence[int]], width: int) -> Iterator[Family]:
    """Divide a family into parts that fit into a row; each has the common tokens."""
    part = Family([], family.common, family.common)
    for member in family.members:
        own = len(texts[member]) - family.common
        if part.tokens + own > width:
            yield part
            part = Family([], family.common, family.common)
        part.members.append(member)
        part.tokens += own
    yield part


def refuse_unpackable(config: PretrainedConfig, name_or_path: str) -> None:
    """Refuse a model whose layers do not simply follow a mask and would mix packed sequences.

    Raises:
        UserError: the model is not in `PACKABLE`, has sliding windows, or names another attention
            than torch's, which takes the mask for numbers to add.
    """
    attention = getattr(config, "_attn_implementation", None)
    if attention not in (None, "sdpa"):
        raise UserError(
            f"packing: the config.json of {name_or_path} sets attn_implementation to {attention}, "
            "and packing needs sdpa; remove it there, or packing=false"
        )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = not hasattr(config, "layer_types") and getattr(config, "sliding_window", None)
    if config.model_type not in PACKABLE or kinds != {"full_attention"} or window:
        raise UserError(
            f"packing: {name_or_path} is a {config.model_type} model"
            + (" with sliding windows" if config.model_type in PACKABLE else "")
            + f"; full attention of {', '.join(sorted(PACKABLE))} can be packed; packing=false"
        )
