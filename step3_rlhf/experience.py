"""What is known of a micro-batch of responses, as it passes through an iteration's steps.

Steps 7 and 8 are here: the responses with their rewards and scores become experience.

Shapes: B responses, R response tokens. Entries after a response's last token are masked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from step3_rlhf import ppo
from step3_rlhf.config import PPOConfig
from step3_rlhf.regularizers.base import Marginal, Regularizer
from step3_rlhf.rewards.mixture import Mixture
from step3_rlhf.rollout import Rollout
from training.runtime.ranks import sum_over_ranks


@dataclass(frozen=True)
class Judged:
    """Responses with their rewards and the reference's log-probabilities (steps 3 to 5)."""

    rollout: Rollout
    rewards: Tensor  # [B] r(x, y), after centering, penalty and clipping; of a mixture [B, G]
    ref_logp: Tensor  # [B, R] log π_ref,t, nats
    by_group: Tensor | None = field(default=None, kw_only=True)
    """[B, G] a mixture's rewards of each group, once `rewards` are those of the mixture."""


@dataclass(frozen=True)
class Scores:
    """The actor's and the critic's output at each response token (step 6)."""

    logp: Tensor  # [B, R] log π_t, nats
    values: Tensor  # [B, R] value of the state before token t; 0 where there is no critic

    def detached(self) -> "Scores":
        return Scores(self.logp.detach(), self.values.detach())


@dataclass(frozen=True)
class Experience(Judged):
    """All that the losses need (steps 7 and 8); rewards are [B], also of a mixture."""

    old: Scores  # of the actor and critic before this iteration's first optimizer step
    advantages: Tensor  # [B, R]
    returns: Tensor  # [B, R]


def with_advantages(
    parts: Sequence[Judged],
    old: Sequence[Scores],
    regularizer: Regularizer,
    mixture: Mixture | None,
    config: PPOConfig,
) -> list[Experience]:
    """Steps 7 and 8 of an iteration, for all its micro-batches.

    Args:
        old: the scores of each micro-batch.
        mixture: makes one reward of those of several groups; None if there are no groups.
    """
    judged, advantages, returns = [], [], []
    for part, scores in zip(parts, old, strict=True):
        mask = part.rollout.response_mask
        # 7. The marginal R + πR′ (eq. 3.6) on each token, r(x, y) on the last one.
        marginal = regularizer.marginal(scores.logp, part.ref_logp, mask)
        judged.append(under_one_reward(part, marginal, mixture))
        token_rewards = ppo.place_rewards(marginal.per_token, judged[-1].rewards, mask)
        # 8. Advantages and returns: GAE with the critic's values, or RLOO.
        if config.has_critic:
            a, r = ppo.advantages_and_returns(
                token_rewards, scores.values, mask, config.gamma, config.lam
            )
        else:
            a, r = ppo.leave_one_out(token_rewards, mask, config.num_generations)
        advantages.append(a)
        returns.append(r)
    masks = [part.rollout.response_mask for part in parts]
    normalized = ppo.normalize_advantages(
        advantages, masks, config.advantage_normalization, sum_over_ranks
    )
    return [
        Experience(part.rollout, part.rewards, part.ref_logp, scores, a, r, by_group=part.by_group)
        for part, scores, a, r in zip(judged, old, normalized, returns, strict=True)
    ]


def under_one_reward(part: Judged, marginal: Marginal, mixture: Mixture | None) -> Judged:
    """The micro-batch, with the rewards of the mixture in place of those of its groups."""
    if mixture is None:
        return part
    credit, prompts = marginal.per_token.sum(-1), part.rollout.prompts
    rewards = mixture.rewards(part.rewards, credit, prompts)
    return replace(part, rewards=rewards, by_group=part.rewards)
