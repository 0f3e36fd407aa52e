"""PPO and RLOO as pure functions: token rewards, advantages and clipped losses.

Shapes: B responses, R response tokens. `mask` [B, R] bool is True on response tokens, EOS included;
the True entries of a row are contiguous from column 0. Time t runs over response tokens, and the
value v_t is that of the state *before* token t is drawn.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from training.models.logprobs import masked_sum

AdvantageNormalization = Literal["none", "center", "full"]


class ClippedLoss(NamedTuple):
    """A loss over the response tokens of a micro-batch.

    total    []  sum of the loss over the tokens
    clipped  []  number of tokens on which clipping took effect
    """

    total: Tensor
    clipped: Tensor


def place_rewards(marginal: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """Token rewards: the marginal on each token, plus the response's reward on its last token.

    With γ = 1 they add up to r(x, y) + R + πR′ (eq. 3.6), which is what PPO must be given.

    Args:
        marginal: [B, R], already multiplied by β.
        rewards: [B] r(x, y).

    Returns:
        [B, R], 0 where masked.
    """
    last = mask.long().sum(-1, keepdim=True) - 1
    placed = torch.where(mask, marginal, torch.zeros_like(marginal))
    return placed.scatter_add(1, last, rewards.unsqueeze(1).to(placed))


def advantages_and_returns(
    token_rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al., 2016, eq. 16).

    Returns:
        Advantages A_t [B, R] and returns A_t + v_t [B, R], both 0 where masked.
    """
    v = torch.where(mask, values, 0.0)
    v_next = torch.nn.functional.pad(v[:, 1:], (0, 1))
    deltas = token_rewards + gamma * v_next - v  # δ_t = r_t + γ v_{t+1} − v_t
    deltas = torch.where(mask, deltas, 0.0).to(v.dtype)
    t = torch.arange(v.shape[1], device=v.device)
    ahead = (t[:, None] - t).clamp(min=0).to(v.dtype)  # [s, t]: s − t
    weights = torch.pow(gamma * lam, ahead).tril()
    advantages = torch.where(mask, deltas @ weights, 0.0)  # A_t = Σ_{s ≥ t} (γλ)^{s−t} δ_s
    return advantages, advantages + v


def leave_one_out(token_rewards: Tensor, mask: Tensor, each: int) -> tuple[Tensor, Tensor]:
    """RLOO (Kool et al., 2019; Ahmadian et al., 2024): the other responses are the baseline.

    A response's credit is a_i = r(x, y) + R + πR′, and each of its tokens has the advantage
    A_i = a_i − mean_{j≠i} a_j. At the optimum all a_i to a prompt are the same, and every A_i is
    exactly 0; a division by their standard deviation, as in GRPO, would be 0/0 there.

    Args:
        token_rewards: [B, R], what `place_rewards` returns.
        each: responses to each prompt, adjacent rows; at least 2.

    Returns:
        Advantages A_i and credits a_i on each token [B, R], both 0 where masked.
    """
    credit = torch.where(mask, token_rewards, 0.0).sum(-1).view(-1, each)
    others = (credit.sum(-1, keepdim=True) - credit) / (each - 1)
    advantages = (credit - others).view(-1, 1).expand(mask.shape)
    return torch.where(mask, advantages, 0.0), torch.where(mask, credit.view(-1, 1), 0.0)


def normalize_advantages(
    advantages: Sequence[Tensor],
    masks: Sequence[Tensor],
    mode: AdvantageNormalization,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda values: values,
) -> list[Tensor]:
    """Advantages as they are ("none"), minus their mean ("center"), or standardized ("full").

    Near the optimum of a regularized objective all advantages tend to 0, and "full" then scales
    noise up to unit size.

    Args:
        advantages, masks: [B, R] each, one per micro-batch; mean and deviation are taken over the
            response tokens of all of them on all ranks.
        sum_over_ranks: adds up a tensor over the ranks.
    """
    if mode == "none":
        return list(advantages)
    valid = torch.cat([a[mask].double() for a, mask in zip(advantages, masks, strict=True)])
    moments = torch.stack([torch.ones_like(valid).sum(), valid.sum(), (valid**2).sum()])
    n, total, squares = sum_over_ranks(moments)
    mean = total / n
    scale = (squares / n - mean**2).clamp(min=0).sqrt() + 1e-8 if mode == "full" else 1.0
    return [
        torch.where(mask, (a - mean) / scale, 0.0).to(a.dtype)
        for a, mask in zip(advantages, masks, strict=True)
    ]


def loss_divisor(responses: int, response_length: int) -> int:
    """What the sums of both losses over the tokens of `responses` are divided by.

    It is the number of tokens that these responses can have, a constant of the run, and not the
    number that they happen to have. The gradient of the policy loss, a sum over responses of
    Σ_t A_t ∇log π_t, has mean 0 at the optimum whatever the critic says, because a value of the
    prefix is a baseline. Divided by a number that depends on the responses themselves, it is a
    ratio, in which short responses weigh more; unless the critic is exact, its mean is 0 somewhere
    else. (Two responses of 1 and 10 tokens, optimum .5, value 1 nat too low: .96, .72 and .53 for
    batches of 1, 4 and 16.)

    Any constant has that property. The number of responses alone would make the gradient larger
    than a mean over tokens by the length of a response, so that `max_grad_norm` = 1 would clip
    almost every step; and a clipped gradient is again a ratio. This one makes it smaller, by mean
    length / `response_length`. Adam's steps do not depend on the scale, so learning rates for a
    mean over tokens keep their meaning. The value loss has the same divisor, so that the critic
    gives every token the same weight in every batch.
    """
    return responses * response_length


def policy_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, cliprange: float
) -> ClippedLoss:
    """The clipped surrogate of Schulman et al. (2017, eq. 7), negated.

    Args:
        logp, old_logp, advantages: [B, R].
    """
    ratio = torch.exp(torch.where(mask, logp - old_logp, 0.0))
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return _larger(unclipped, clipped, mask)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange_value: float
) -> ClippedLoss:
    """½ (v − return)², for v itself or v clipped around the old value, whichever is larger.

    Args:
        values, old_values, returns: [B, R].
    """
    near = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    unclipped = 0.5 * (values - returns) ** 2
    clipped = 0.5 * (near - returns) ** 2
    return _larger(unclipped, clipped, mask)


def _larger(unclipped: Tensor, clipped: Tensor, mask: Tensor) -> ClippedLoss:
    """Sum over the tokens of the larger of two losses [B, R]."""
    total = masked_sum(torch.maximum(unclipped, clipped), mask)
    return ClippedLoss(total, masked_sum((clipped > unclipped).to(total.dtype), mask))
