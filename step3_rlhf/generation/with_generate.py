"""Draws responses with transformers' `generate`."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from step3_rlhf.config import SamplingSettings
from step3_rlhf.generation.drawing import draw, warpers
from training.models.families.generation import plain_generation
from training.models.policy import Policy


def generate(
    policy: Policy,
    ids: Tensor,
    mask: Tensor,
    uniforms: Tensor,
    settings: SamplingSettings,
    ends: tuple[int, ...],
    pad: int,
    stopping: Sequence[StoppingCriteria] = (),
) -> list[list[int]]:
    """Draw one response to each prompt; arguments as in `Generator`.

    Args:
        stopping: is asked after every token whether a row needs no more.
    """
    device = policy.model.device
    processors = LogitsProcessorList()
    if policy.absent is not None:
        processors.append(Existing(policy.absent))
    processors += warpers(settings)
    processors.append(SeededSampler(uniforms.to(device), ids.shape[1]))
    with plain_generation(policy.model) as model:
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList(stopping),
            max_new_tokens=settings.response_length,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=list(ends),
        )
    tokens: list[list[int]] = output[:, ids.shape[1] :].tolist()
    return tokens


class Existing(LogitsProcessor):
    """Gives −inf to ids that no token has, as the policy does when it scores."""

    def __init__(self, absent: Tensor) -> None:
        self.absent = absent  # [vocabulary] bool

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(self.absent, -torch.inf)


class SeededSampler(LogitsProcessor):
    """Leaves one token per row, drawn at the row's uniform for this step.

    A row's draws depend only on its own uniforms, never on the other rows of the batch. Every other
    token gets −inf, so that greedy decoding picks the drawn one.
    """

    def __init__(self, uniforms: Tensor, prompt_length: int) -> None:
        self.uniforms = uniforms  # [B, R] in [0, 1)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt_length
        token = draw(scores.float().softmax(-1), self.uniforms[:, step])
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)
