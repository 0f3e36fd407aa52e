"""The reward of a population of several groups: a mixture of their preferences, not their mean.

Group k has the share ρ_k and the rewards r_k. With a weighted sum Σ ρ_k r_k, the optimum is the
geometric pool ∝ w Π_k e^{ρ_k r_k/β}, in which a response that one group dislikes gets next to
nothing. What the population says is the mixture of what its groups say,

    π*(y|x) = Σ_k ρ_k w(y|x) e^{r_k/β} / Z_k(x),    Z_k(x) = Σ_y w(y|x) e^{r_k/β},

and it is the optimum of a log-linear regularizer with weight w under the reward

    r(x, y) = β log Σ_k ρ_k e^{r_k/β} / Z_k(x).

The Z_k are estimated from the policy's own draws. PPO credits a response with
a_k = r_k + R + πR′ = r_k − β (log π − log w) under the rewards of group k, so that

    Z_k(x) = E_{y~π}[w e^{r_k/β} / π] = E_{y~π}[e^{a_k/β}].

Only ratios Z_k/Z_j matter. The estimate is unbiased whatever the policy was when it drew, so that
draws of earlier iterations do not go out of date; they count less and less, because those of a
policy far from the optimum are noisier. At the optimum no e^{a_k/β} exceeds Z_k/ρ_k.

A response takes no part in the Z_k of its own reward; otherwise it would lower its own reward by
about 1/n, n the number of draws. What remains is the bias of log and 1/Z at an estimate of Z, also
of order 1/n. In a tabular simulation with shares (.89, .10, .01) and their mirror, the exact Z_k
end at a total variation of .02 from the mixture; 8 responses and a single visit to each prompt end
at .04, 2 responses at .25; with many visits and this memory, 2 responses end at .03.

Shapes: B responses, P prompts, K responses to each prompt, G groups.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from training.runtime.ranks import gather_objects

DECAY = 0.8
"""Factor on the weight of a prompt's earlier draws at each visit to the prompt."""


def mixture_reward(rewards: Tensor, log_z: Tensor, shares: Tensor, beta: float) -> Tensor:
    """β log Σ_k ρ_k e^{r_k/β}/Z_k, in units of reward.

    The Z_k are scaled so that Σ_k ρ_k log Z_k = 0: their common factor does not change the optimum,
    and without it groups with equal rewards have the reward of each.

    Args:
        rewards: [..., G] r_k.
        log_z: [..., G] log Z_k, up to a common constant.
        shares: [G] ρ_k > 0, which add up to 1.

    Returns:
        [...] rewards.
    """
    relative = log_z - (shares * log_z).sum(-1, keepdim=True)
    return beta * (shares.log() + rewards / beta - relative).logsumexp(-1)


def log_sums_of_others(values: Tensor) -> Tensor:
    """[P, K, G]: log Σ_{j ≠ i} e^{v_j} over the K responses to a prompt.

    Args:
        values: [P, K, G].
    """
    count = values.shape[1]
    itself = torch.eye(count, dtype=torch.bool, device=values.device)[None, :, :, None]
    return values[:, None].masked_fill(itself, -math.inf).logsumexp(2)


class Mixture:
    """The rewards of a mixture while a policy is trained, with the log Z_k of every prompt."""

    def __init__(self, shares: Sequence[float], beta: float, responses_per_prompt: int) -> None:
        """
        Args:
            shares: [G] ρ_k.
            beta: coefficient of the regularizer.
            responses_per_prompt: K ≥ 2; those to one prompt are adjacent rows.
        """
        self.shares = torch.tensor(shares, dtype=torch.float64)
        self.beta = beta
        self.responses_per_prompt = responses_per_prompt
        self.log_sums: dict[str, list[float]] = {}
        """[G] log Σ e^{a_k/β} over a prompt's earlier draws, with decay, by the prompt's key."""
        self._drawn: list[tuple[str, list[float]]] = []

    def rewards(self, by_group: Tensor, marginal: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B] rewards of the mixture; the draws wait for `remember`.

        Args:
            by_group: [B, G] r_k.
            marginal: [B] R + πR′, −β (log π − log w) up to a constant.
            prompts: [B] texts.
        """
        each, shares = self.responses_per_prompt, self.shares.to(by_group.device)
        credit = (by_group.double() + marginal.double()[:, None]) / self.beta  # a_k/β
        values = credit.view(-1, each, len(shares))
        keys = [_key(prompt) for prompt in prompts[::each]]
        none = [-math.inf] * len(shares)
        known = [self.log_sums.get(key, none) for key in keys]
        earlier = torch.tensor(known, dtype=values.dtype, device=values.device)
        # All groups have equally many draws, so that sums do for means.
        log_z = torch.logaddexp(earlier[:, None] + math.log(DECAY), log_sums_of_others(values))
        self._drawn += zip(keys, values.logsumexp(1).tolist(), strict=True)
        rewards = mixture_reward(by_group.double(), log_z.flatten(0, 1), shares, self.beta)
        return rewards.to(by_group.dtype)

    def remember(self) -> None:
        """Add the draws of all ranks since the last call to the sums, the same on every rank."""
        drawn: dict[str, list[list[float]]] = {}
        for key, sums in sorted(gather_objects(self._drawn)):
            drawn.setdefault(key, []).append(sums)
        for key, new in drawn.items():
            old = self.log_sums.get(key)
            faded = [] if old is None else [[value + math.log(DECAY) for value in old]]
            table = torch.tensor(faded + new, dtype=torch.float64)
            self.log_sums[key] = table.logsumexp(0).tolist()
        self._drawn = []


def _key(prompt: str) -> str:
    """A short name of a prompt, for checkpoints."""
    return hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest()
