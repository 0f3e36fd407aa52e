"""The record of what was drawn for an evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from step3_rlhf.rewards.mixture import log_sums_of_others, mixture_reward


@dataclass(frozen=True)
class Responses:
    """One response to each prompt, scored by policy, reference and reward; [prompts] each.

    Without a reward, `rewards` and `credit` are None; of a mixture they are [prompts, groups], the
    rewards until `under_one_reward`.
    """

    texts: list[str]
    logp: Tensor  # log π(y|x), nats
    ref_logp: Tensor  # log π_ref(y|x), nats
    rewards: Tensor | None
    lengths: Tensor  # tokens, EOS included
    ended: Tensor  # 1 if the response has its EOS, else 0
    credit: Tensor | None = None  # a(y) = r + R + πR′; None without a regularizer or a reward
    natural: Tensor | None = None  # 1 if the response is in M(x); None without an M(x)
    full_entropy: Tensor | None = None  # Σ_t H(π(·|prefix_t)), nats, over the whole vocabulary
    full_kl: Tensor | None = None  # Σ_t KL(π(·|prefix_t) ‖ π_ref(·|prefix_t)), nats


def under_one_reward(
    own: Sequence[Responses],
    reference: Sequence[Responses],
    shares: Sequence[float],
    beta: float,
) -> tuple[list[Responses], list[Responses]]:
    """The draws with the rewards of the mixture in place of each group's.

    The Z_k(x) of `rewards/mixture.py` are estimated from all of the policy's draws, for the reward
    of one of these from the others.

    Args:
        own: two or more draws of the policy.
        reference: draws of the reference.
        shares: [groups] ρ_k.
        beta: coefficient of the regularizer. Draws without credit are of no regularizer; w is 1.
    """
    weights = torch.tensor(shares, dtype=torch.float64)
    values = torch.stack([_credit(draw, beta) / beta for draw in own], dim=1)
    by_others, by_all = log_sums_of_others(values), values.logsumexp(1)

    def single(draw: Responses, log_z: Tensor) -> Responses:
        assert draw.rewards is not None
        rewards = mixture_reward(draw.rewards, log_z, weights, beta)
        return replace(draw, rewards=rewards)

    return (
        [single(draw, by_others[:, number]) for number, draw in enumerate(own)],
        [single(draw, by_all) for draw in reference],
    )


def _credit(draw: Responses, beta: float) -> Tensor:
    """[prompts, groups] a(y) under the rewards of each group."""
    assert draw.rewards is not None
    return draw.rewards - beta * draw.logp[:, None] if draw.credit is None else draw.credit
