"""The hidden states of a decoder after each token of a padded batch."""

import inspect

from torch import Tensor, nn

from training.models.logprobs import position_ids
from training.models.packing import pack


def _takes_positions(model: nn.Module) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _hidden_states(
    decoder: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    takes_positions: bool,
    packing: bool,
) -> Tensor:
    """[batch, length, hidden] states after each token; on padding, anything."""
    if packing:
        packed = pack(input_ids, attention_mask)
        decoded = decoder(
            input_ids=packed.input_ids,
            attention_mask=packed.attention_mask,
            position_ids=packed.position_ids,
            use_cache=False,
        )
        return packed.unpacked(decoded.last_hidden_state)
    positions = {"position_ids": position_ids(attention_mask)} if takes_positions else {}
    decoded = decoder(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions
    )
    states: Tensor = decoded.last_hidden_state
    return states
