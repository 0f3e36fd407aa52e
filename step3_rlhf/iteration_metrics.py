"""The metrics of one PPO iteration, and what ends a run by them.

Each rank sums, then all ranks average.

README.md beside this file defines every metric by its formula and unit.
"""

import torch
from torch import Tensor

from step3_rlhf.config import EarlyStoppingSettings, PPOConfig
from step3_rlhf.experience import Experience, Scores
from step3_rlhf.ppo import ClippedLoss, loss_divisor
from step3_rlhf.regularizers.base import Regularizer
from step3_rlhf.regularizers.optimality import certificate
from training.models.logprobs import masked_sum
from training.runtime.ranks import sum_over_ranks

OPTIMUM = "optimum/"
"""Prefix of the figures that say how far the policy is from its optimum."""


class IterationMetrics:
    """Sums over this rank's responses and tokens; `averages` adds up the ranks and divides."""

    def __init__(self, regularizer: Regularizer, config: PPOConfig) -> None:
        self.regularizer = regularizer
        self.config = config
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None  # [names] float64, on the device until `averages`
        self._texts: list[Tensor] = []  # [2] each: negative log-likelihood and tokens of ptx_data

    @property
    def sums(self) -> dict[str, Tensor]:
        """This rank's sums so far by name, [] float64 each; empty before the first `add`."""
        return {} if self._sums is None else dict(zip(self._names, self._sums, strict=True))

    @torch.no_grad()
    def add(
        self,
        part: Experience,
        new: Scores,
        entropy: Tensor,
        policy: ClippedLoss,
        value: ClippedLoss | None,
    ) -> None:
        """Add a micro-batch. Called each time the micro-batch is trained on.

        Args:
            part: the micro-batch; its regularizer is that of the old scores.
            new: scores of the forward pass that trains.
            entropy: [B, R] entropy of the next-token distribution in that pass, nats.
            policy, value: the losses of that pass; no value loss without a critic.
        """
        mask, old = part.rollout.response_mask, part.old
        regularizer = self.regularizer.value(old.logp, part.ref_logp, mask)
        marginal = self.regularizer.marginal(old.logp, part.ref_logp, mask)
        credit = part.rewards + marginal.per_token.sum(-1)
        added = {
            "responses": part.rewards.new_full((), len(part.rollout)),
            "tokens": mask.sum(),
            "prompt_tokens": part.rollout.prompt_tokens,
            "ended": part.rollout.ended.sum(),
            "logp": masked_sum(old.logp, mask),
            "log_ratio": masked_sum(old.logp - part.ref_logp, mask),
            "regularizer": regularizer.sum(),
            "objective": (part.rewards + regularizer).sum(),
            "bound": marginal.bound.sum(),
            "entropy": masked_sum(entropy, mask),
            "policy_loss": policy.total,
            "policy_clipped": policy.clipped,
            # Schulman's low-variance estimate of KL(old ‖ new): ρ − 1 − log ρ, ρ = new/old
            "approxkl": masked_sum((new.logp - old.logp).expm1() - (new.logp - old.logp), mask),
        }
        if value is not None:
            returns = torch.where(mask, part.returns, 0.0).double()
            errors = torch.where(mask, part.returns - old.values, 0.0).double()
            added |= {
                "value_loss": value.total,
                "value_clipped": value.clipped,
                "returns": returns.sum(),
                "squared_returns": (returns**2).sum(),
                "errors": errors.sum(),
                "squared_errors": (errors**2).sum(),
            }
        if (drawn := part.rollout.drawn_logp) is not None:
            added["drawn_difference"] = masked_sum((drawn - old.logp).abs(), mask)
        if self.config.num_generations > 1:
            shares = self.config.group_shares
            if part.by_group is not None:
                credit = part.by_group + marginal.per_token.sum(-1, keepdim=True)
            by_prompt = credit.view(-1, self.config.num_generations, *credit.shape[1:])
            distances = certificate(by_prompt, self.regularizer, shares)
            added |= {OPTIMUM + name: values.sum() for name, values in distances.items()}
        values = torch.stack([value_sum.detach().double() for value_sum in added.values()])
        self._names = tuple(added)
        self._sums = values if self._sums is None else self._sums + values

    @torch.no_grad()
    def add_texts(self, loss: Tensor, tokens: int) -> None:
        """Add the texts of ptx_data beside a micro-batch: their −Σ log π (nats), their tokens."""
        self._texts.append(
            torch.stack([loss.detach().double(), loss.new_full((), tokens).double()])
        )

    def averages(self, rewards: Tensor) -> dict[str, float]:
        """The iteration's metrics, the same on every rank; averages over all passes as well.

        Args:
            rewards: [this rank's responses], as the reward source gave them; with one column per
                group of a mixture, of which the population's mean Σ ρ_k r_k is taken.
        """
        if rewards.dim() == 2:
            rewards = rewards @ rewards.new_tensor(self.config.reward.shares)
        own = {
            **self.sums,
            "drawn": rewards.new_full((), len(rewards), dtype=torch.float64),
            "rewards": rewards.sum().double(),
        }
        if self._texts:
            own["text_loss"], own["text_tokens"] = torch.stack(self._texts).sum(0)
        totals = sum_over_ranks(torch.stack(list(own.values()))).tolist()  # the only wait
        sums = dict(zip(own, totals, strict=True))
        n, tokens = sums["responses"], sums["tokens"]
        divisor = loss_divisor(int(n), self.config.response_length)
        prompts = n / self.config.num_generations
        averages = {name: sums[name] / prompts for name in sums if name.startswith(OPTIMUM)}
        if "value_loss" in sums:
            variance = sums["squared_returns"] / tokens - (sums["returns"] / tokens) ** 2
            unexplained = sums["squared_errors"] / tokens - (sums["errors"] / tokens) ** 2
            averages |= {
                "loss/value": sums["value_loss"] / divisor,
                "val/clipfrac": sums["value_clipped"] / tokens,
                "val/explained_variance": 1 - unexplained / variance if variance > 0 else 0.0,
            }
        if "text_loss" in sums:
            averages["loss/ptx"] = sums["text_loss"] / sums["text_tokens"]
        if "drawn_difference" in sums:
            averages["sampling/logp_difference"] = sums["drawn_difference"] / tokens
        return {
            "objective/rlhf_reward": sums["objective"] / n,
            "objective/scores": sums["rewards"] / sums["drawn"],
            "objective/regularizer": sums["regularizer"] / n,
            "objective/kl": sums["log_ratio"] / n,
            "objective/entropy": -sums["logp"] / n,
            "objective/bound_fraction": sums["bound"] / n,
            "policy/entropy_per_token": sums["entropy"] / tokens,
            "policy/kl_per_token": sums["log_ratio"] / tokens,
            "policy/approxkl": sums["approxkl"] / tokens,
            "policy/clipfrac": sums["policy_clipped"] / tokens,
            "loss/policy": sums["policy_loss"] / divisor,
            "prompt/length": sums["prompt_tokens"] / n,
            "response/length": tokens / n,
            "response/ended_fraction": sums["ended"] / n,
            **averages,
        }


class EarlyStopping:
    """Counts the iterations in a row whose `optimum/gap` is small enough."""

    def __init__(self, settings: EarlyStoppingSettings | None, iterations: int = 0) -> None:
        """
        Args:
            settings: None never stops.
            iterations: in a row so far, in a run that resumes.
        """
        self.settings = settings
        self.iterations = iterations

    def observe(self, metrics: dict[str, float]) -> None:
        """Count an iteration by its metrics."""
        if self.settings is not None:
            near = metrics["optimum/gap"] <= self.settings.optimum_gap
            self.iterations = self.iterations + 1 if near else 0

    def has_arrived(self) -> bool:
        return self.settings is not None and self.iterations >= self.settings.patience
