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
    """

    input_ids: Tensor  # [R, L] long
    position_ids: Tensor  # [R, L] long
    attention_mask: Tensor  # [R, 1, L, L] bool: whether token q attends to token k
    rows: Tensor  # [tokens] long
    columns: Tensor  # [tokens] long
    valid: Tensor  # [B, L] bool: the places of the tokens in the batch

    def unpacked(self, hidden: Tensor) -> Tensor:
        """Move hidden states [R, L, H] back to [B, L, H]; 0 on padding."""
        batch = hidden.new_zeros(*self.valid.shape, hidden.shape[-1])
        batch[self.valid] = hidden[self.rows, self.columns]
        return batch


def pack(input_ids: Tensor, attention_mask: Tensor) -> Packed:
    """Pack the sequences into fewer rows: the longest first, each into the first row with room.

    Args:
        input_ids: [B, L], padded on either side.
        attention_mask: [B, L], 0 on padding.
    """
    valid = attention_mask.bool()
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

    sequence_of, place = valid.nonzero(as_tuple=True)[0], (valid.cumsum(-1) - 1)[valid]
    rows = torch.tensor(row_of, device=valid.device)[sequence_of]
    columns = torch.tensor(start_of, device=valid.device)[sequence_of] + place
    packed_ids = input_ids.new_zeros(len(used), width)
    packed_ids[rows, columns] = input_ids[valid]
    positions = torch.zeros_like(packed_ids)
    positions[rows, columns] = place
    owner = torch.zeros_like(packed_ids)  # 0: padding, which attends to padding
    owner[rows, columns] = sequence_of + 1
    within = (owner[:, :, None] == owner[:, None, :]).tril()
    return Packed(packed_ids, positions, within[:, None], rows, columns, valid)


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
