"""Draws one token per row from logits, at a uniform that belongs to the row alone.

Shapes: B rows, V tokens of the vocabulary, R response tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from step3_rlhf.config import SamplingSettings

BLOCK = 256
"""Weights that are added in float32 before their sums are added in float64."""


def uniforms(seeds: Sequence[Sequence[int]], length: int) -> Tensor:
    """[len(seeds), length] uniforms in [0, 1), each row from its own seed, on any machine alike."""
    rows = [np.random.Generator(np.random.Philox(list(seed))).random(length) for seed in seeds]
    return torch.tensor(np.stack(rows))


def warpers(settings: SamplingSettings) -> LogitsProcessorList:
    """What changes the logits before tokens are drawn; empty where nothing does."""
    found = LogitsProcessorList()
    if settings.temperature != 1.0:
        found.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k > 0:
        found.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        found.append(TopPLogitsWarper(settings.top_p))
    return found


def draw(weights: Tensor, at: Tensor) -> Tensor:
    """Invert each row's distribution function: [B] tokens.

    The vocabulary is divided into blocks: the block is found by sums in float64, the token by a sum
    within the block. Over 100,000 tokens, sums in float32 alone would shift the distribution.

    Args:
        weights: [B, V] float32, in proportion to the probabilities.
        at: [B] float64 in [0, 1).
    """
    rows, vocabulary = weights.shape
    weights = torch.nn.functional.pad(weights, (0, -vocabulary % BLOCK)).view(rows, -1, BLOCK)
    up_to = weights.sum(-1).double().cumsum(-1)  # [B, blocks]
    target = at[:, None] * up_to[:, -1:]
    block = _first_above(up_to, target)
    before = torch.where(block > 0, up_to.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = weights.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).squeeze(1)
    place = _first_above(inside.double().cumsum(-1), target - before)
    return (block * BLOCK + place).squeeze(1)


def _first_above(sums: Tensor, target: Tensor) -> Tensor:
    """[B, 1] the first column whose running sum [B, N] exceeds the target [B, 1].

    Where rounding leaves none, it is the last column that adds anything.
    """
    column = torch.searchsorted(sums, target.contiguous(), right=True)
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())
    return torch.minimum(column, last)


class Draws:
    """The tokens drawn so far, in tensors that are allocated once: `choose` waits for nothing."""

    def __init__(
        self,
        uniforms: Tensor,
        settings: SamplingSettings,
        ends: tuple[int, ...],
        pad: int,
        device: torch.device,
    ) -> None:
        """
        Args:
            uniforms: [B, R] float64.
            ends: the ids that end a response.
            pad: the id after an end.
        """
        self.uniforms = uniforms.to(device)
        self.warpers = warpers(settings)
        self.ends = torch.tensor(ends, device=device)
        self.pad = pad
        self.tokens = torch.full(uniforms.shape, pad, device=device)
        self.logp = torch.zeros(uniforms.shape, dtype=torch.float32, device=device)
        """[B, R] log π of the tokens, from the logits that they were drawn from, unwarped."""
        self.ended = torch.zeros(len(uniforms), dtype=torch.bool, device=device)
        self._step = torch.zeros(1, dtype=torch.long, device=device)
        # The warpers that are used look at the logits alone.
        self._no_ids = torch.zeros(len(uniforms), 1, dtype=torch.long, device=device)

    def choose(self, logits: Tensor) -> Tensor:
        """Draw the next token of each row, [B], from logits [B, V] float32."""
        logp = logits.log_softmax(-1)
        weights = self.warpers(self._no_ids, logits).softmax(-1) if self.warpers else logp.exp()
        token = draw(weights, self.uniforms.index_select(1, self._step).squeeze(1))
        logp = logp.gather(1, token[:, None]).squeeze(1)
        token = torch.where(self.ended, self.pad, token)
        self.tokens.index_copy_(1, self._step, token[:, None])
        self.logp.index_copy_(1, self._step, torch.where(self.ended, 0.0, logp)[:, None])
        self.ended |= torch.isin(token, self.ends)
        self._step += 1
        return token
