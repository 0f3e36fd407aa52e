"""One PPO iteration, its steps in the order in which the data flows."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from step3_rlhf import ppo
from step3_rlhf.config import PPOConfig
from step3_rlhf.experience import Experience, Judged, Scores
from step3_rlhf.iteration_metrics import IterationMetrics
from step3_rlhf.prompts import Prompts
from step3_rlhf.rewards.sources import RewardSource
from step3_rlhf.rollout import Rollout, sample
from training.models.lora import WithoutAdapter
from training.runtime.engine import TrainedModule, optimizer_step
from training.runtime.faults import dumped, require_finite
from training.runtime.ranks import sum_over_ranks

Part = TypeVar("Part", bound=Judged)


class PPOTrainer:
    """Holds the four models; `iteration` is the whole algorithm."""

    def __init__(
        self,
        config: PPOConfig,
        actor: TrainedModule,
        critic: TrainedModule,
        reference: nn.Module | WithoutAdapter,
        reward: RewardSource,
        prompts: Prompts,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.config = config
        self.actor = actor
        self.critic = critic
        self.reference = reference
        self.reward = reward
        self.prompts = prompts
        self.tokenizer = tokenizer
        self.regularizer = config.regularizer
        self.reward_center = 0.0
        """C_1 of Example 2, subtracted from every reward."""

    def iteration(self, number: int) -> dict[str, float]:
        """Draw responses, score them, and take the optimizer steps on them.

        Args:
            number: 0-based; prompts and random draws depend on it and on the seed alone.

        Returns:
            Metrics, the same on every rank.
        """
        config, metrics = self.config, IterationMetrics(self.regularizer)
        # 1. This rank's prompts, with a seed for each draw.
        batch = self.prompts.of_iteration(number)
        # 2. A response to each from the actor as it is.
        rollout = sample(self.actor.engine, self.tokenizer, *batch, config.sampling)
        with dumped(config.output_dir, number + 1, rollout.readable):
            # 3. The reward r(x, y) of each response.
            raw_rewards = self.reward(rollout)
            rewards = self.shaped(raw_rewards, rollout)
            require_finite("rewards", rewards)
            # 4. log π_ref of each response token.
            ref_logp = self.score_reference(rollout)
            # 5. Micro-batches, each trimmed to its longest row.
            parts = self.micro_batches(rollout, rewards, ref_logp)
            if config.uses_rollout_once:
                # 6.-8. happen inside the forward pass that trains.
                self.take_steps(parts, lambda part: self.losses_at_once(part, metrics))
            else:
                # 6. log π and values of each token, from actor and critic as they are.
                scores = [self.scored(part) for part in parts]
                # 7., 8. Penalty and reward on the tokens; advantages and returns.
                experiences = self.with_advantages(parts, scores)
                # 9. Losses, and optimizer steps of actor and critic.
                for _ in range(config.num_ppo_epochs):
                    self.take_steps(experiences, lambda part: self.losses(part, metrics))
        # 10. Figures of the iteration, averaged over all ranks.
        return metrics.averages(raw_rewards) | self.optimizer_metrics()

    def take_steps(self, parts: Sequence[Part], losses: Callable[[Part], Sequence[Tensor]]) -> None:
        """One pass over the rollout: an optimizer step of actor and critic per mini-batch."""
        accumulation = self.config.gradient_accumulation_steps
        for first in range(0, len(parts), accumulation):
            optimizer_step(
                [self.actor, self.critic],
                parts[first : first + accumulation],
                losses,
                items=lambda part: int(part.rollout.response_mask.sum()),
            )

    def losses(self, part: Experience, metrics: IterationMetrics) -> Sequence[Tensor]:
        """The actor's and the critic's loss, each summed over the response tokens."""
        return self.losses_of(part, *self.forward(part.rollout), metrics)

    def losses_at_once(self, part: Judged, metrics: IterationMetrics) -> Sequence[Tensor]:
        """The same where one forward pass both scores and trains: its scores are the old ones."""
        new, entropy = self.forward(part.rollout)
        (experience,) = self.with_advantages([part], [new.detached()])
        return self.losses_of(experience, new, entropy, metrics)

    def losses_of(
        self, part: Experience, new: Scores, entropy: Tensor, metrics: IterationMetrics
    ) -> Sequence[Tensor]:
        mask = part.rollout.response_mask
        policy = ppo.policy_loss(
            new.logp, part.old.logp, part.advantages, mask, self.config.cliprange
        )
        value = ppo.value_loss(
            new.values, part.old.values, part.returns, mask, self.config.cliprange_value
        )
        metrics.add(part, new, entropy, policy, value)
        return policy.total, self.config.vf_coef * value.total

    def with_advantages(
        self, parts: Sequence[Judged], scores: Sequence[Scores]
    ) -> list[Experience]:
        """Penalty → token rewards → advantages and returns, then the batch's normalization."""
        config = self.config
        advantages, returns = [], []
        for part, old in zip(parts, scores, strict=True):
            mask = part.rollout.response_mask
            marginal = self.regularizer.marginal(old.logp, part.ref_logp, mask)
            token_rewards = ppo.place_rewards(marginal.per_token, part.rewards, mask)
            a, r = ppo.advantages_and_returns(
                token_rewards, old.values, mask, config.gamma, config.lam
            )
            advantages.append(a)
            returns.append(r)
        masks = [part.rollout.response_mask for part in parts]
        normalized = ppo.normalize_advantages(
            advantages, masks, config.advantage_normalization, sum_over_ranks
        )
        return [
            Experience(part.rollout, part.rewards, part.ref_logp, old, a, r)
            for part, old, a, r in zip(parts, scores, normalized, returns, strict=True)
        ]

    def forward(self, rollout: Rollout) -> tuple[Scores, Tensor]:
        """What actor and critic say of a rollout, and the policy's entropy per token [B, R]."""
        logp, entropy = self.actor(
            rollout.input_ids, rollout.attention_mask, rollout.scored_mask, with_entropy=True
        )
        values = self.critic(rollout.input_ids, rollout.attention_mask)
        scores = Scores(rollout.response_part(logp), rollout.state_part(values))
        return scores, rollout.response_part(entropy.detach())

    @torch.no_grad()
    def scored(self, part: Judged) -> Scores:
        return self.forward(part.rollout)[0]

    @torch.no_grad()
    def score_reference(self, rollout: Rollout) -> Tensor:
        """[B, R] log π_ref of each response token, 0 where masked."""
        ref_logp = torch.zeros(rollout.response_mask.shape, device=rollout.input_ids.device)
        size = self.config.per_device_eval_batch_size
        for first in range(0, len(rollout), size):
            part = rollout.rows(first, first + size)
            logp, _ = self.reference(part.input_ids, part.attention_mask, part.scored_mask)
            columns = part.response_mask.shape[1]
            ref_logp[first : first + size, :columns] = part.response_part(logp)
        return ref_logp

    def micro_batches(self, rollout: Rollout, rewards: Tensor, ref_logp: Tensor) -> list[Judged]:
        """The rollout in micro-batches, each trimmed to its longest row."""
        size = self.config.per_device_train_batch_size
        parts = []
        for first in range(0, len(rollout), size):
            rows = rollout.rows(first, first + size)
            columns = rows.response_mask.shape[1]
            chosen = slice(first, first + size)
            parts.append(Judged(rows, rewards[chosen], ref_logp[chosen, :columns]))
        return parts

    def shaped(self, rewards: Tensor, rollout: Rollout) -> Tensor:
        """[B] rewards as PPO gets them, from those that the reward model gave."""
        shaped = rewards - self.reward_center  # C_1, Example 2
        if self.config.missing_eos_penalty is not None:
            shaped = torch.where(rollout.ended, shaped, shaped - self.config.missing_eos_penalty)
        if self.config.reward_clip is not None:
            shaped = shaped.clamp(-self.config.reward_clip, self.config.reward_clip)
        return shaped

    def center_rewards(self) -> None:
        """Estimate C_1 = −E_{π_ref} r (Example 2) from the reference, before the first step."""
        wanted = self.config.reward_centering_samples
        batch = self.prompts.for_centering(wanted)
        rollout = sample(self.reference, self.tokenizer, *batch, self.config.sampling)
        rewards = self.reward(rollout).double()
        with dumped(self.config.output_dir, 0, rollout.readable):
            require_finite("rewards of the reference's responses", rewards)
        total, count = sum_over_ranks(torch.stack([rewards.sum(), torch.ones_like(rewards).sum()]))
        self.reward_center = (total / count).item()

    def optimizer_metrics(self) -> dict[str, float]:
        """Learning rates, gradient norms and, in fp16, loss scales of the last step."""
        return {
            "actor/learning_rate": self.actor.learning_rate,
            "actor/grad_norm": self.actor.grad_norm,
            "critic/learning_rate": self.critic.learning_rate,
            "critic/grad_norm": self.critic.grad_norm,
            **self.actor.loss_scaling("actor"),
            **self.critic.loss_scaling("critic"),
        }
