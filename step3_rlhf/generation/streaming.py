"""Draws a single response and hands over its tokens while they are drawn."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from step3_rlhf.config import SamplingSettings
from step3_rlhf.generation.drawing import Draws
from step3_rlhf.generation.with_generate import generate
from training.models.decoding.decoder import Decoder
from training.models.policy import Policy

Watch = Callable[[list[int]], None]
"""Is given the tokens so far, again and again as they become more."""


@torch.no_grad()
def stream(
    policy: Policy,
    prompt_ids: list[int],
    uniforms: Tensor,
    settings: SamplingSettings,
    ends: tuple[int, ...],
    pad: int,
    watch: Watch,
) -> list[int]:
    """Draw the response that `generator_of(policy)` draws from the same uniforms.

    Args:
        prompt_ids: the prompt's token ids.
        uniforms: [1, R] float64 in [0, 1).
        ends, pad: as in `Generator`.

    Returns:
        At most R token ids; what follows the first end is to be ignored, here and in `watch`.
    """
    ids = torch.tensor([prompt_ids])
    mask = torch.ones_like(ids)
    if not policy.decodes:
        watching = [_Watching(watch, len(prompt_ids))]
        return generate(policy, ids, mask, uniforms, settings, ends, pad, watching)[0]
    draws = Draws(uniforms, settings, ends, pad, policy.model.device)
    drawn = 1  # the first token comes with the prompt's own pass

    def finished() -> Tensor:
        nonlocal drawn
        drawn += 1
        watch(draws.tokens[0, :drawn].tolist())
        return draws.ended

    decoder = Decoder(policy, ids, mask, steps=uniforms.shape[1])
    decoder.run(draws.choose, finished, steps_between_checks=1)
    tokens: list[int] = draws.tokens[0].tolist()
    return tokens


class _Watching(StoppingCriteria):
    """Never stops; hands over the only row's tokens."""

    def __init__(self, watch: Watch, prompt_length: int) -> None:
        self.watch = watch
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.watch(input_ids[0, self.prompt_length :].tolist())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
