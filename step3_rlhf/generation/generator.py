"""What draws responses. To use another engine, such as vLLM, write a `Generator`."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from step3_rlhf.config import SamplingSettings
from step3_rlhf.generation.drawing import Draws
from step3_rlhf.generation.with_generate import generate
from training.models.decoding.decoder import Decoder
from training.models.policy import Policy


class Drawn(NamedTuple):
    """Responses to B prompts.

    tokens  [B][≤ R]  token ids; what follows the first end is ignored
    logp    [B, R]    log π of each token as the generator computed it, or None if it does not say
    """

    tokens: list[list[int]]
    logp: Tensor | None


class Generator(Protocol):
    """Draws one response to each prompt.

    A generator must draw from the distribution that the policy scores, softmax of `policy.logits`,
    warped only as `settings` say. It must draw the same response for the same uniforms, whatever
    else is in the batch, or runs depend on the number of GPUs.
    """

    def __call__(
        self,
        policy: Policy,
        ids: Tensor,
        mask: Tensor,
        uniforms: Tensor,
        settings: SamplingSettings,
        ends: tuple[int, ...],
        pad: int,
    ) -> Drawn:
        """
        Args:
            ids, mask: [B, P] prompts, padded on the left, on the host.
            uniforms: [B, R] float64 in [0, 1), from which the tokens are drawn.
            ends: the ids that end a response.
            pad: the padding id.
        """
        ...


def generator_of(policy: Policy) -> Generator:
    """Our decoder where it computes what the policy's own forward says, else transformers'."""
    return decode if policy.decodes else generate_by_transformers


def decode(
    policy: Policy,
    ids: Tensor,
    mask: Tensor,
    uniforms: Tensor,
    settings: SamplingSettings,
    ends: tuple[int, ...],
    pad: int,
) -> Drawn:
    """A Generator: `Decoder` runs the policy, `Draws` draws from its logits."""
    draws = Draws(uniforms, settings, ends, pad, policy.model.device)
    Decoder(policy, ids, mask, steps=uniforms.shape[1]).run(draws.choose, lambda: draws.ended)
    return Drawn(draws.tokens.tolist(), draws.logp)


@torch.no_grad()
def generate_by_transformers(
    policy: Policy,
    ids: Tensor,
    mask: Tensor,
    uniforms: Tensor,
    settings: SamplingSettings,
    ends: tuple[int, ...],
    pad: int,
) -> Drawn:
    """A Generator: transformers' `generate`, for families that decode in their own way."""
    return Drawn(generate(policy, ids, mask, uniforms, settings, ends, pad), None)
