"""What is known of a micro-batch of responses, phase by phase.

Shapes: B responses, R response tokens; entries behind a response's last token are masked.
"""

from dataclasses import dataclass

from torch import Tensor

from step3_rlhf.rollout import Rollout


@dataclass(frozen=True)
class Judged:
    """A part of a rollout with what the reward model and the reference say of it."""

    rollout: Rollout
    rewards: Tensor  # [B] r(x, y), after centering and clipping
    ref_logp: Tensor  # [B, R] log π_ref,t, nats


@dataclass(frozen=True)
class Scores:
    """What the actor and the critic say of each response token."""

    logp: Tensor  # [B, R] log π_t, nats
    values: Tensor  # [B, R] value of the state before token t

    def detached(self) -> "Scores":
        return Scores(self.logp.detach(), self.values.detach())


@dataclass(frozen=True)
class Experience(Judged):
    """All that the losses need: also the scores of the policy that drew, and advantages."""

    old: Scores
    advantages: Tensor  # [B, R]
    returns: Tensor  # [B, R]
