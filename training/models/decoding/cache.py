"""Keys and values of all tokens so far, in tensors that are allocated once."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class Columns:
    """The columns of the cache that the next forward pass writes, shared by all layers.

    On a CPU, attention reads only the columns that are filled; their number is known without
    asking a device. A CUDA graph repeats the same operations on the same memory, so there attention
    reads all columns, and the mask hides the empty ones.
    """

    def __init__(self, capacity: int, prompt_of: Tensor, reads_all: bool) -> None:
        """
        Args:
            prompt_of: [rows] the prompt that each row has, a row of the first pass.
        """
        self.capacity = capacity
        self.prompt_of = prompt_of
        self.reads_all = reads_all
        self.next = torch.zeros(1, dtype=torch.long, device=prompt_of.device)
        """[1] the first empty column."""
        self.filled = 0
        """The same as a number; a graph that is replayed does not move it."""

    def advance(self, tokens: int) -> None:
        """Move on after a pass over `tokens` per row."""
        self.next += tokens
        self.filled += tokens


class PreallocatedLayer(CacheLayerMixin):
    """One layer's keys and values, [rows, heads, capacity, head size] each.

    The first pass is over the distinct prompts, each later one over a token of every row.

    transformers' DynamicCache copies all of them in every step, and its StaticCache makes attention
    read all columns on a CPU too.
    """

    is_sliding = False

    def __init__(self, columns: Columns) -> None:
        super().__init__()
        self.columns = columns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate, and give each row the states of its prompt.

        The rest is zeros, since attention multiplies what the mask hides by 0.

        Args:
            key_states, value_states: [prompts, heads, tokens, head size].
        """
        own = self.columns
        for name, states in (("keys", key_states), ("values", value_states)):
            _, heads, tokens, size = states.shape
            kept = states.new_zeros(len(own.prompt_of), heads, own.capacity, size)
            kept[:, :, :tokens] = states[own.prompt_of]
            setattr(self, name, kept)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the states of new tokens [rows, heads, 1, head size]; return all to attend.

        In the first pass they are [prompts, heads, tokens, head size], and attend to themselves.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        filled = self.columns.filled
        read = []
        for kept, states in ((self.keys, key_states), (self.values, value_states)):
            assert kept is not None
            if self.columns.reads_all:
                kept.index_copy_(2, self.columns.next, states)
                read.append(kept)
            else:
                kept[:, :, filled : filled + 1] = states
                read.append(kept[:, :, : filled + 1])
        return read[0], read[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of columns that attention reads, and the first of them."""
        own = self.columns
        return own.capacity if own.reads_all and own.filled else own.filled + query_length, 0

    def get_seq_length(self) -> int:
        return self.columns.filled

    def get_max_length(self) -> int:
        return self.columns.capacity
