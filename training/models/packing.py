"""Packing: several short sequences in one row, so that less is computed for padding.

The sequences of a padded batch move into fewer rows of the same width, each attending only to
itself, and the hidden states move back to the places of their tokens in the batch. Nothing outside
the models notices, and every loss is the same.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from training.errors import UserError

PACKABLE = frozenset({"gpt2", "llama", "mistral", "opt", "qwen2", "qwen3"})
"""Model types (transformers' names) whose packed and padded batches a test compares."""


@dataclass(frozen=True)
class Packed:
    """B sequences of up to L tokens in R ≤ B rows.

    Example, pad 0: [[5, 6, 7, 8], [5, 6, 0, 0], [0, 0, 0, 9]] becomes

        input_ids     [[5, 6, 7, 8], [5, 6, 9, 0]]
        position_ids  [[0, 1, 2, 3], [0, 1, 0, 0]]
        rows          [0, 0, 0, 0, 1, 1, 1]   for the batch's tokens, row by row
        columns       [0, 1, 2, 3, 0, 1, 2]
        from_rows     [0, 0, 0, 0, 1, 1, 2]   and their places in the batch
        from_columns  [0, 1, 2, 3, 0, 1, 3]
    """

    input_ids: Tensor  # [R, L] long
    position_ids: Tensor  # [R, L] long
    attention_mask: Tensor  # [R, 1, L, L] bool: whether token q attends to token k
    rows: Tensor  # [tokens] long
    columns: Tensor  # [tokens] long
    from_rows: Tensor  # [tokens] long
    from_columns: Tensor  # [tokens] long
    sequences: int  # B

    def unpacked(self, hidden: Tensor) -> Tensor:
        """Move hidden states [R, L, H] back to [B, L, H]; 0 on padding."""
        batch = hidden.new_zeros(self.sequences, *hidden.shape[1:])
        batch[self.from_rows, self.from_columns] = hidden[self.rows, self.columns]
        return batch


def pack(input_ids: Tensor, attention_mask: Tensor) -> Packed:
    """Pack the sequences into fewer rows: the longest first, each into the first row with room.

    Args:
        input_ids: [B, L], padded on either side.
        attention_mask: [B, L], 0 on padding.
    """
    valid = attention_mask.bool().cpu()  # the only wait for a GPU: the plan is made on the host
    width = valid.shape[1]
    lengths: list[int] = valid.sum(-1).tolist()
    row_of, start_of, used = [0] * len(lengths), [0] * len(lengths), list[int]()
    for sequence in sorted(range(len(lengths)), key=lambda s: -lengths[s]):
        fitting = (row for row, taken in enumerate(used) if taken + lengths[sequence] <= width)
        row = next(fitting, len(used))
        if row == len(used):
            used.append(0)
        row_of[sequence], start_of[sequence] = row, used[row]
        used[row] += lengths[sequence]

    from_rows, from_columns = valid.nonzero(as_tuple=True)
    place = (valid.cumsum(-1) - 1)[valid]
    rows = torch.tensor(row_of)[from_rows]
    columns = torch.tensor(start_of)[from_rows] + place
    positions = torch.zeros(len(used), width, dtype=torch.long)
    positions[rows, columns] = place
    owner = torch.zeros_like(positions)  # 0: padding, which attends to padding
    owner[rows, columns] = from_rows + 1
    plan = (positions, owner, rows, columns, from_rows, from_columns)
    positions, owner, rows, columns, from_rows, from_columns = (
        part.to(input_ids.device, non_blocking=True) for part in plan
    )
    packed_ids = input_ids.new_zeros(positions.shape)
    packed_ids[rows, columns] = input_ids[from_rows, from_columns]
    within = (owner[:, :, None] == owner[:, None, :]).tril()
    return Packed(
        packed_ids, positions, within[:, None], rows, columns, from_rows, from_columns, len(valid)
    )


def refuse_unpackable(config: PretrainedConfig, name_or_path: str) -> None:
    """Refuse a model whose layers do not simply follow a mask and would mix packed sequences.

    Raises:
        UserError: the model is not in `PACKABLE`, or has sliding windows.
    """
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = not hasattr(config, "layer_types") and getattr(config, "sliding_window", None)
    if config.model_type not in PACKABLE or kinds != {"full_attention"} or window:
        raise UserError(
            f"packing: {name_or_path} is a {config.model_type} model"
            + (" with sliding windows" if config.model_type in PACKABLE else "")
            + f"; full attention of {', '.join(sorted(PACKABLE))} can be packed; packing=false"
        )
