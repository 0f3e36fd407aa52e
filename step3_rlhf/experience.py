"""What is known of a micro-batch of responses, as it passes through an iteration's steps.

Shapes: B responses, R response tokens. Entries after a response's last token are masked.
"""

from dataclasses import dataclass, field

from torch import Tensor

from step3_rlhf.rollout import Rollout


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
