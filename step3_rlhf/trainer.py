"""One PPO iteration, its stages in the order in which the data flows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from step3_rlhf import ppo
from step3_rlhf.config import PPOConfig
from step3_rlhf.prompts import Prompts
from step3_rlhf.rewards.sources import RewardSource
from step3_rlhf.rollout import Rollout, sample
from training.models.logprobs import masked_sum
from training.models.lora import WithoutAdapter
from training.runtime.engine import TrainedModule, optimizer_step
from training.runtime.faults import dumped, require_finite
from training.runtime.ranks import sum_over_ranks


@dataclass(frozen=True)
class Scores:
    """What the policy that drew the responses, and its critic, say of each response token."""

    logp: Tensor  # [B, R] log π_t, nats
    values: Tensor  # [B, R] value of the state before token t


@dataclass(frozen=True)
class Experience:
    """A micro-batch of a rollout and all that is known of it before training on it."""

    rollout: Rollout
    rewards: Tensor  # [B] r(x, y), after centering and clipping
    ref_logp: Tensor  # [B, R] log π_ref,t, nats
    old: Scores | None = None  # None: the forward pass that trains also scores
    advantages: Tensor | None = None  # [B, R]
    returns: Tensor | None = None  # [B, R]


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

    def iteration(self, number: int) -> dict[str, float]:
        """Draw responses, score them, and take the optimizer steps that they are worth.

        Args:
            number: 0-based; prompts and random draws depend on it and on the seed alone.

        Returns:
            Metrics, the same on every rank.
        """
        batch = self.prompts.of_iteration(number)
        rollout = sample(self.actor.engine, self.tokenizer, *batch, self.config.sampling)
        with dumped(self.config.output_dir, number + 1, rollout.readable):
            rewards, raw_rewards = self.shaped(self.reward(rollout), rollout)
            require_finite("rewards", rewards)
            ref_logp = self.score_reference(rollout)
            parts = self.micro_batches(rollout, rewards, ref_logp)

            statistics = Statistics(self.regularizer)
            if not self.config.uses_rollout_once:
                parts = self.with_advantages([self.scored(part) for part in parts])
            accumulation = self.config.gradient_accumulation_steps
            for _ in range(self.config.num_ppo_epochs):
                for first in range(0, len(parts), accumulation):
                    optimizer_step(
                        [self.actor, self.critic],
                        parts[first : first + accumulation],
                        lambda part: self.losses(part, statistics),
                        items=lambda part: int(part.rollout.response_mask.sum()),
                    )
        return statistics.averages(raw_rewards, self)

    def losses(self, part: Experience, statistics: "Statistics") -> Sequence[Tensor]:
        """Actor's and critic's losses, summed over the micro-batch's response tokens."""
        mask = part.rollout.response_mask
        new, entropy = self.forward(part.rollout)
        if part.old is None:
            old = Scores(new.logp.detach(), new.values.detach())
            (part,) = self.with_advantages([replace(part, old=old)])
        policy_loss, policy_clipped = ppo.policy_loss(
            new.logp, part.old.logp, part.advantages, mask, self.config.cliprange
        )
        value_loss, value_clipped = ppo.value_loss(
            new.values, part.old.values, part.returns, mask, self.config.cliprange_value
        )
        statistics.add(part, new, entropy, policy_loss, policy_clipped, value_loss, value_clipped)
        return policy_loss, self.config.vf_coef * value_loss

    def with_advantages(self, parts: list[Experience]) -> list[Experience]:
        """Penalty → token rewards → advantages and returns, then the batch's normalization."""
        config, placed = self.config, []
        for part in parts:
            mask = part.rollout.response_mask
            marginal = self.regularizer.marginal(part.old.logp, part.ref_logp, mask)
            token_rewards = ppo.place_rewards(marginal.per_token, part.rewards, mask)
            advantages, returns = ppo.advantages_and_returns(
                token_rewards, part.old.values, mask, config.gamma, config.lam
            )
            placed.append(replace(part, advantages=advantages, returns=returns))
        normalized = ppo.normalize_advantages(
            [part.advantages for part in placed],
            [part.rollout.response_mask for part in placed],
            config.advantage_normalization,
            sum_over_ranks,
        )
        return [replace(p, advantages=a) for p, a in zip(placed, normalized, strict=True)]

    def forward(self, rollout: Rollout) -> tuple[Scores, Tensor]:
        """The actor's and the critic's view of a rollout, and the policy's entropy per token."""
        logp, entropy = self.actor(
            rollout.input_ids, rollout.attention_mask, rollout.scored_mask, with_entropy=True
        )
        values = self.critic(rollout.input_ids, rollout.attention_mask)
        scores = Scores(rollout.response_part(logp), rollout.state_part(values))
        return scores, rollout.response_part(entropy.detach())

    @torch.no_grad()
    def scored(self, part: Experience) -> Experience:
        return replace(part, old=self.forward(part.rollout)[0])

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

    def micro_batches(
        self, rollout: Rollout, rewards: Tensor, ref_logp: Tensor
    ) -> list[Experience]:
        """The rollout cut into micro-batches, each trimmed to its longest row."""
        size = self.config.per_device_train_batch_size
        parts = []
        for first in range(0, len(rollout), size):
            rows = rollout.rows(first, first + size)
            columns = rows.response_mask.shape[1]
            chosen = slice(first, first + size)
            parts.append(Experience(rows, rewards[chosen], ref_logp[chosen, :columns]))
        return parts

    def shaped(self, rewards: Tensor, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Rewards as PPO gets them, and as the reward model gave them."""
        shaped = rewards - self.reward_center  # C_1, Example 2
        if self.config.missing_eos_penalty is not None:
            shaped = torch.where(rollout.ended, shaped, shaped - self.config.missing_eos_penalty)
        if self.config.reward_clip is not None:
            shaped = shaped.clamp(-self.config.reward_clip, self.config.reward_clip)
        return shaped, rewards

    def center_rewards(self) -> None:
        """C_1 = −E_{π_ref} r (Example 2), estimated before the first step, from the reference."""
        wanted = self.config.reward_centering_samples
        batch = self.prompts.for_centering(wanted)
        rollout = sample(self.reference, self.tokenizer, *batch, self.config.sampling)
        rewards = self.reward(rollout).double()
        with dumped(self.config.output_dir, 0, rollout.readable):
            require_finite("rewards of the reference's responses", rewards)
        total, count = sum_over_ranks(torch.stack([rewards.sum(), torch.ones_like(rewards).sum()]))
        self.reward_center = (total / count).item()


class Statistics:
    """Sums over responses and tokens of one iteration; `averages` joins them over the ranks."""

    def __init__(self, regularizer: object) -> None:
        self.regularizer = regularizer
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(
        self,
        part: Experience,
        new: Scores,
        entropy: Tensor,
        policy_loss: Tensor,
        policy_clipped: Tensor,
        value_loss: Tensor,
        value_clipped: Tensor,
    ) -> None:
        mask, old = part.rollout.response_mask, part.old
        value = self.regularizer.value(old.logp, part.ref_logp, mask)
        bound = self.regularizer.marginal(old.logp, part.ref_logp, mask).bound
        returns = part.returns[mask].double()
        errors = (part.returns - old.values)[mask].double()
        self._accumulate(
            responses=torch.tensor(len(part.rollout)),
            tokens=mask.sum(),
            ended=part.rollout.ended.sum(),
            logp=masked_sum(old.logp, mask),
            log_ratio=masked_sum(old.logp - part.ref_logp, mask),
            regularizer=value.sum(),
            objective=(part.rewards + value).sum(),
            bound=bound.sum(),
            entropy=masked_sum(entropy, mask),
            policy_loss=policy_loss,
            policy_clipped=policy_clipped,
            value_loss=value_loss,
            value_clipped=value_clipped,
            # Schulman's low-variance estimate of KL(old ‖ new): r − 1 − log r, r = new/old
            moved=masked_sum((new.logp - old.logp).expm1() - (new.logp - old.logp), mask),
            returns=returns.sum(),
            squared_returns=(returns**2).sum(),
            errors=errors.sum(),
            squared_errors=(errors**2).sum(),
        )

    def _accumulate(self, **values: Tensor) -> None:
        for name, value in values.items():
            value = value.detach().double().cpu()
            self.sums[name] = self.sums.get(name, torch.zeros((), dtype=torch.float64)) + value

    def averages(self, rewards: Tensor, trainer: PPOTrainer) -> dict[str, float]:
        """Metrics; where a rollout is used several times, means over the passes."""
        own = torch.stack([torch.tensor(float(len(rewards))), rewards.sum().cpu()]).double()
        drawn, reward = sum_over_ranks(own).tolist()
        totals = sum_over_ranks(torch.stack(list(self.sums.values()))).tolist()
        sums = dict(zip(self.sums, totals, strict=True))
        n, tokens = sums["responses"], sums["tokens"]
        variance = sums["squared_returns"] / tokens - (sums["returns"] / tokens) ** 2
        unexplained = sums["squared_errors"] / tokens - (sums["errors"] / tokens) ** 2
        return {
            "objective/rlhf_reward": sums["objective"] / n,
            "objective/scores": reward / drawn,
            "objective/regularizer": sums["regularizer"] / n,
            "objective/kl": sums["log_ratio"] / n,
            "objective/entropy": -sums["logp"] / n,
            "objective/bound_fraction": sums["bound"] / n,
            "policy/entropy_per_token": sums["entropy"] / tokens,
            "policy/kl_per_token": sums["log_ratio"] / tokens,
            "policy/approxkl": sums["moved"] / tokens,
            "policy/clipfrac": sums["policy_clipped"] / tokens,
            "loss/policy": sums["policy_loss"] / tokens,
            "loss/value": sums["value_loss"] / tokens,
            "val/clipfrac": sums["value_clipped"] / tokens,
            "val/explained_variance": 1 - unexplained / variance if variance > 0 else 0.0,
            "response/length": tokens / n,
            "response/ended_fraction": sums["ended"] / n,
            "actor/learning_rate": trainer.actor.learning_rate,
            "actor/grad_norm": trainer.actor.grad_norm,
            "critic/learning_rate": trainer.critic.learning_rate,
            "critic/grad_norm": trainer.critic.grad_norm,
            **trainer.actor.loss_scaling("actor"),
            **trainer.critic.loss_scaling("critic"),
        }
