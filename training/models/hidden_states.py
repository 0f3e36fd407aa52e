"""The hidden states that a decoder computes for each token of a padded batch."""

import inspect

from torch import Tensor, nn

from training.models.logprobs import position_ids
from training.models.packing import pack


def takes_positions(model: nn.Module) -> bool:
    """Whether the model's forward pass accepts `position_ids`."""
    return "position_ids" in inspect.signature(model.forward).parameters


def hidden_states(
    decoder: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    with_positions: bool,
    packing: bool,
) -> Tensor:
    """Compute the states [batch, length, hidden] after each token; on padding they are arbitrary.

    Args:
        with_positions: pass `position_ids` that padding does not shift.
        packing: compute several short sequences in one row.
    """
    if packing:
        packed = pack(input_ids, attention_mask)
        decoded = decoder(
            input_ids=packed.input_ids,
            attention_mask=packed.attention_mask,
            position_ids=packed.position_ids,
            use_cache=False,
        )
        return packed.unpacked(decoded.last_hidden_state)
    positions = {"position_ids": position_ids(attention_mask)} if with_positions else {}
    decoded = decoder(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions
    )
    states: Tensor = decoded.last_hidden_state
    return states
