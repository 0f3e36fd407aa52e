"""PPO, one iteration at a time: the ten steps of `PPOTrainer.iteration`, in the order of the data.

RLOO is the same without a critic: the other responses to a prompt are its baseline.
README.md beside this file has the formulas and shapes of each step.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from step3_rlhf import ppo
from step3_rlhf.classes.shares import class_shares
from step3_rlhf.config import PPOConfig
from step3_rlhf.experience import Experience, Judged, Scores, with_advantages
from step3_rlhf.iteration_metrics import IterationMetrics
from step3_rlhf.prompts import Prompts
from step3_rlhf.ptx import PtxBatch, PtxTexts, negative_log_likelihood
from step3_rlhf.reference.centering import mean_reward
from step3_rlhf.reference.cuts import CUT_SAMPLES, foreseen_cuts
from step3_rlhf.regularizers.log_linear import LogLinear
from step3_rlhf.rewards.mixture import Mixture
from step3_rlhf.rewards.prompt_centers import centers_of_iteration
from step3_rlhf.rewards.sources import RewardSource
from step3_rlhf.rollout import Rollout, sample
from training.models.lora import WithoutAdapter
from training.models.policy import Policy
from training.runtime.averaging import AveragedWeights
from training.runtime.engine import TrainedModule, optimizer_step
from training.runtime.faults import dumped, require_finite
from training.runtime.ranks import world_size
from training.runtime.tracking import Clock

Part = TypeVar("Part", bound=Judged)


class PPOTrainer:
    """Holds the models of a run; `iteration` is the whole algorithm."""

    def __init__(
        self,
        config: PPOConfig,
        actor: TrainedModule,
        critic: TrainedModule | None,
        reference: nn.Module | WithoutAdapter,
        reward: RewardSource,
        prompts: Prompts,
        tokenizer: PreTrainedTokenizerBase,
        ptx: PtxTexts | None = None,
    ) -> None:
        """
        Args:
            critic: None for RLOO.
            ptx: texts that the actor learns beside the rewards.
        """
        self.config = config
        self.actor = actor
        self.critic = critic
        self.trained = {"actor": actor} | ({} if critic is None else {"critic": critic})
        self.reference = reference
        self.reward = reward
        self.prompts = prompts
        self.tokenizer = tokenizer
        self.ptx = ptx
        self.averages: dict[str, AveragedWeights] = {}
        """The moving average of the actor's weights, by the name of its export."""
        if config.ema_decay is not None:
            self.averages["actor_ema"] = AveragedWeights(actor.module, config.ema_decay)
        self.regularizer = config.regularizer
        self.classes = class_shares(config.regularizer, reference, tokenizer, config)
        self.mixture = None
        if config.reward.mixture:
            self.mixture = Mixture(
                config.reward.shares, self.regularizer.coefficient, config.num_generations
            )
        self.clock = Clock()
        self.reward_center = 0.0
        """Mean reward of the reference policy, −C_1 of Example 2, subtracted from every reward."""
        self.prompt_centers: Tensor | float = 0.0
        """[B] the same for the prompt of each response of the iteration, −C_{1,x}."""
        self.cuts: dict[str, float] = {}
        """What `foresee_cuts` found: figures that are logged with every iteration."""

    def iteration(self, number: int) -> dict[str, float]:
        """Draw responses, score them, and take optimizer steps on them.

        Args:
            number: counts from 0; prompts and random draws depend only on it and on the seed.

        Returns:
            The iteration's metrics, the same on every rank.
        """
        config, clock = self.config, self.clock
        metrics = IterationMetrics(self.regularizer, config)
        # 1. Prompts: this rank's share, with a seed for each draw.
        prompts = self.prompts.of_iteration(number)
        # 2. Rollout: one response to each row, drawn from the current actor.
        with clock.phase("rollout"):
            rollout = sample(self.actor.engine, self.tokenizer, *prompts, config.sampling)
        with dumped(config.output_dir, number + 1, rollout.readable):
            # 3. Rewards: r(x, y) of each response.
            with clock.phase("reward"):
                raw_rewards = self.reward(rollout)
            if config.reward_centering == "prompt_mean":
                self.center_prompts(number)
            rewards = self.shape_rewards(raw_rewards, rollout)
            require_finite(self.regularizer.effective_reward_name, rewards)
            # 4. Reference: log π_ref of each response token.
            with clock.phase("reference"):
                ref_logp = self.reference_logp(rollout)
            # 5. Micro-batches, each trimmed to its longest prompt and response.
            parts = self.micro_batches(rollout, rewards, ref_logp)
            if config.uses_rollout_once:
                # 6.-9. together: the forward pass that trains also gives the old scores.
                self.take_steps(parts, self.losses_in_one_pass, metrics)
            else:
                # 6. Old scores: log π and the value at each token, before any step is taken.
                with clock.phase("old_scores"):
                    old = [self.old_scores(part) for part in parts]
                # 7. Token rewards: R + πR′ (eq. 3.6) on each token, and r(x, y) on the last one.
                # 8. Advantages and returns: GAE with the critic's values, or RLOO.
                experiences = self.with_advantages(parts, old)
                # 9. Losses, and optimizer steps of the actor and, if there is one, the critic.
                for _ in range(config.num_ppo_epochs):
                    self.take_steps(experiences, self.losses, metrics)
        if self.mixture:
            self.mixture.remember()
        # 10. Metrics: averages over the responses and tokens of all ranks.
        return metrics.averages(raw_rewards) | self.optimizer_metrics() | self.cuts

    def shape_rewards(self, rewards: Tensor, rollout: Rollout) -> Tensor:
        """[B] rewards that PPO maximizes: centered, and penalized or clipped if the config says so.

        Args:
            rewards: [B], as the reward source gave them; of a mixture [B, G], as is the result.
        """
        shaped = self.effective_rewards(rewards, rollout) - self.reward_center  # + C_1, Example 2
        shaped = shaped - self.prompt_centers  # + C_{1,x}
        if self.config.missing_eos_penalty is not None:
            ended = rollout.ended.view(-1, *[1] * (rewards.dim() - 1))
            shaped = torch.where(ended, shaped, shaped - self.config.missing_eos_penalty)
        if self.config.reward_clip is not None:
            shaped = shaped.clamp(-self.config.reward_clip, self.config.reward_clip)
        return shaped

    def effective_rewards(self, rewards: Tensor, rollout: Rollout) -> Tensor:
        """[B] the rewards that the regularizer puts in the place of r: r itself for most."""
        if self.classes is None:
            return self.regularizer.effective_reward(rewards)
        with self.clock.phase("reference"):  # which says how probable each response's class is
            return self.regularizer.effective_reward(rewards, self.classes(rollout))

    def center_prompts(self, number: int) -> None:
        """Estimate E_{π_ref}[r | x] (Example 2) for each prompt of an iteration."""
        with self.clock.phase("centering"):
            self.prompt_centers = centers_of_iteration(
                number,
                self.prompts,
                self.reference,
                self.tokenizer,
                lambda drawn: self.effective_rewards(self.reward(drawn), drawn),
                self.config,
            )

    @torch.no_grad()
    def reference_logp(self, rollout: Rollout) -> Tensor:
        """[B, R] log π_ref of each response token in nats, 0 where masked."""
        ref_logp = torch.zeros(rollout.response_mask.shape, device=rollout.input_ids.device)
        size = self.config.per_device_eval_batch_size
        for first in range(0, len(rollout), size):
            part = rollout.rows(first, first + size)
            logp, _ = self.reference(part.input_ids, part.attention_mask, part.scored_mask)
            columns = part.response_mask.shape[1]
            ref_logp[first : first + size, :columns] = part.response_part(logp)
        return ref_logp

    def micro_batches(self, rollout: Rollout, rewards: Tensor, ref_logp: Tensor) -> list[Judged]:
        """The rollout in parts of `per_device_train_batch_size` responses."""
        size = self.config.per_device_train_batch_size
        parts = []
        for first in range(0, len(rollout), size):
            rows = rollout.rows(first, first + size)
            columns = rows.response_mask.shape[1]
            chosen = slice(first, first + size)
            parts.append(Judged(rows, rewards[chosen], ref_logp[chosen, :columns]))
        return parts

    @torch.no_grad()
    def old_scores(self, part: Judged) -> Scores:
        """Scores before this iteration's first optimizer step, without gradients."""
        return self.forward(part.rollout)[0]

    def forward(self, rollout: Rollout) -> tuple[Scores, Tensor]:
        """Scores of each response token, and the policy's entropy [B, R] (nats, no gradient)."""
        logp, entropy = self.actor(
            rollout.input_ids, rollout.attention_mask, rollout.scored_mask, with_entropy=True
        )
        scores = Scores(rollout.response_part(logp), self.values(rollout))
        return scores, rollout.response_part(entropy.detach())

    def values(self, rollout: Rollout) -> Tensor:
        """[B, R] the critic's value of the state before each response token; 0 without a critic."""
        if self.critic is None:
            return torch.zeros(rollout.response_mask.shape, device=rollout.input_ids.device)
        return rollout.state_part(self.critic(rollout.input_ids, rollout.attention_mask))

    def with_advantages(self, parts: Sequence[Judged], old: Sequence[Scores]) -> list[Experience]:
        """Steps 7 and 8, for all micro-batches."""
        return with_advantages(parts, old, self.regularizer, self.mixture, self.config)

    def take_steps(
        self,
        parts: Sequence[Part],
        losses: Callable[[Part, IterationMetrics], Sequence[Tensor]],
        metrics: IterationMetrics,
    ) -> None:
        """One pass over the rollout: an optimizer step of each trained model per mini-batch."""
        accumulation = self.config.gradient_accumulation_steps
        length = self.config.response_length
        for first in range(0, len(parts), accumulation):
            batches = parts[first : first + accumulation]
            optimizer_step(
                list(self.trained.values()),
                list(zip(batches, self.ptx_batches(batches), strict=True)),
                lambda batch: self.beside_texts(losses(batch[0], metrics), batch[1], metrics),
                items=lambda batch: ppo.loss_divisor(len(batch[0].rollout), length),
                clock=self.clock,
            )
            for average in self.averages.values():
                average.update()

    def ptx_batches(self, parts: Sequence[Part]) -> Sequence[PtxBatch | None]:
        """The texts beside each micro-batch of the next optimizer step; None without ptx_data."""
        if self.ptx is None:
            return [None] * len(parts)
        responses = world_size() * sum(len(part.rollout) for part in parts)
        divisor = ppo.loss_divisor(responses, self.config.response_length)
        return self.ptx.of_step(self.actor.engine.global_steps, divisor)

    def beside_texts(
        self, losses: Sequence[Tensor], batch: PtxBatch | None, metrics: IterationMetrics
    ) -> Sequence[Tensor]:
        """The losses, the actor's with the weighted loss of the texts."""
        if batch is None:
            return losses
        loss = negative_log_likelihood(self.actor, batch.texts)
        metrics.add_texts(loss, batch.tokens)
        actor, *others = losses
        return [actor + batch.weight * loss, *others]

    def losses(self, part: Experience, metrics: IterationMetrics) -> Sequence[Tensor]:
        """The loss of each trained model, summed over the response tokens."""
        return self.losses_from(part, *self.forward(part.rollout), metrics)

    def losses_in_one_pass(self, part: Judged, metrics: IterationMetrics) -> Sequence[Tensor]:
        """Steps 6 to 9 of a rollout that is used once: its old scores are those of this pass."""
        new, entropy = self.forward(part.rollout)
        (experience,) = self.with_advantages([part], [new.detached()])
        return self.losses_from(experience, new, entropy, metrics)

    def losses_from(
        self, part: Experience, new: Scores, entropy: Tensor, metrics: IterationMetrics
    ) -> Sequence[Tensor]:
        """The losses of a forward pass, which are also added to the metrics."""
        mask = part.rollout.response_mask
        policy = ppo.policy_loss(
            new.logp, part.old.logp, part.advantages, mask, self.config.cliprange
        )
        value = None
        if self.critic is not None:
            value = ppo.value_loss(
                new.values, part.old.values, part.returns, mask, self.config.cliprange_value
            )
        metrics.add(part, new, entropy, policy, value)
        return (
            [policy.total] if value is None else [policy.total, self.config.vf_coef * value.total]
        )

    def optimizer_metrics(self) -> dict[str, float]:
        """Learning rates, gradient norms and, in fp16, loss scales of the last optimizer step."""
        found: dict[str, float] = {}
        for name, model in self.trained.items():
            found[f"{name}/learning_rate"] = model.learning_rate
            found[f"{name}/grad_norm"] = model.grad_norm
            found |= model.loss_scaling(name)
        return found

    def foresee_cuts(self) -> None:
        """Before iteration 0: how many responses the optimum cuts, of a product over tokens."""
        regularizer, actor = self.regularizer, self.actor.module
        if isinstance(regularizer, LogLinear) and regularizer.weighs_tokens:
            assert isinstance(actor, Policy)
            ends = actor.ends or (self.tokenizer.eos_token_id,)
            rollout = self.drawn_by_reference(CUT_SAMPLES)
            self.cuts = foreseen_cuts(regularizer, self.reference, rollout, ends, self.config)

    def center_rewards(self) -> None:
        """Before iteration 0: the mean reward of the reference (Example 2)."""
        config = self.config
        rollout = self.drawn_by_reference(config.reward_centering_samples)
        rewards = self.effective_rewards(self.reward(rollout).double(), rollout)
        name = self.regularizer.effective_reward_name
        self.reward_center = mean_reward(rollout, rewards, name, config.output_dir)

    def drawn_by_reference(self, count: int) -> Rollout:
        """This rank's share of `count` responses that the reference draws."""
        prompts = self.prompts.for_centering(count)
        return sample(self.reference, self.tokenizer, *prompts, self.config.sampling)
