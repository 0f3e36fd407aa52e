"""The metrics of one PPO iteration: sums on each rank, averages over all of them."""

import torch
from torch import Tensor

from step3_rlhf.experience import Experience, Scores
from step3_rlhf.ppo import ClippedLoss
from step3_rlhf.regularizers.base import Regularizer
from training.models.logprobs import masked_sum
from training.runtime.ranks import sum_over_ranks


class IterationMetrics:
    """Sums over responses and tokens of one iteration; `averages` joins them over the ranks."""

    def __init__(self, regularizer: Regularizer) -> None:
        self.regularizer = regularizer
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(
        self,
        part: Experience,
        new: Scores,
        entropy: Tensor,
        policy: ClippedLoss,
        value: ClippedLoss,
    ) -> None:
        """Add a micro-batch, each time that it is trained on.

        Args:
            new: what the forward pass that trains gave.
            entropy: [B, R] nats.
        """
        mask, old = part.rollout.response_mask, part.old
        regularizer = self.regularizer.value(old.logp, part.ref_logp, mask)
        bound = self.regularizer.marginal(old.logp, part.ref_logp, mask).bound
        returns = part.returns[mask].double()
        errors = (part.returns - old.values)[mask].double()
        self._accumulate(
            responses=torch.tensor(len(part.rollout)),
            tokens=mask.sum(),
            ended=part.rollout.ended.sum(),
            logp=masked_sum(old.logp, mask),
            log_ratio=masked_sum(old.logp - part.ref_logp, mask),
            regularizer=regularizer.sum(),
            objective=(part.rewards + regularizer).sum(),
            bound=bound.sum(),
            entropy=masked_sum(entropy, mask),
            policy_loss=policy.total,
            policy_clipped=policy.clipped,
            value_loss=value.total,
            value_clipped=value.clipped,
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

    def averages(self, rewards: Tensor) -> dict[str, float]:
        """The metrics of the iteration; means over the passes where there are several.

        Args:
            rewards: [responses of this rank], as the reward model gave them.
        """
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
        }
