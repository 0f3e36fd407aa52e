"""PPO's pure functions against numbers computed by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step3_rlhf.ppo import (
    advantages_and_returns,
    leave_one_out,
    loss_divisor,
    normalize_advantages,
    place_rewards,
    policy_loss,
    value_loss,
)

NAN = math.nan
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()


# Placing rewards


def test_the_reward_lands_on_the_last_response_token() -> None:
    marginal = torch.tensor([[0.1, 0.2, 0.3], [0.4, NAN, 9.0]])
    placed = place_rewards(marginal, torch.tensor([5.0, -1.0]), MASK)
    torch.testing.assert_close(placed, torch.tensor([[0.1, 0.2, 5.3], [-0.6, 0.0, 0.0]]))


def test_one_token_too_late_would_lose_or_misplace_it() -> None:
    """The trap: with γ < 1 or a mask, a reward one column later is another reward."""
    rewards = torch.tensor([5.0, -1.0])
    placed = place_rewards(torch.zeros(2, 3), rewards, MASK)
    late = torch.zeros(2, 4).scatter(1, MASK.sum(-1, keepdim=True), rewards[:, None])[:, :3]
    right = advantages_and_returns(placed, torch.zeros(2, 3), MASK, 1.0, 1.0)[0]
    wrong = advantages_and_returns(late, torch.zeros(2, 3), MASK, 1.0, 1.0)[0]
    assert right.tolist() == [[5.0, 5.0, 5.0], [-1.0, 0.0, 0.0]]
    assert wrong.tolist() == [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_token_rewards_telescope_to_the_sequences() -> None:
    """Σ_t = r − β Σ_t (log π_t − log π_ref,t), eq. (3.6) for kl."""
    torch.manual_seed(0)
    logp, ref_logp = torch.randn(2, 3), torch.randn(2, 3)
    rewards = torch.tensor([2.0, -3.0])
    marginal = -0.7 * (logp - ref_logp)
    total = place_rewards(marginal, rewards, MASK).sum(-1)
    expected = rewards - 0.7 * torch.where(MASK, logp - ref_logp, 0.0).sum(-1)
    torch.testing.assert_close(total, expected)


# Advantages


def test_gae_by_hand_with_a_masked_row() -> None:
    """γ = 0.9, λ = 0.8: δ = 1.4, 2.35, 1.5 and A_t = δ_t + 0.72 A_{t+1}."""
    rewards = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]], dtype=torch.float64)
    values = torch.tensor([[0.5, 1.0, 1.5], [1.0, NAN, 99.0]], dtype=torch.float64)
    advantages, returns = advantages_and_returns(rewards, values, MASK, 0.9, 0.8)
    by_hand = [[3.8696, 3.43, 1.5], [3.0, 0.0, 0.0]]
    torch.testing.assert_close(advantages, torch.tensor(by_hand).double(), rtol=1e-7, atol=1e-7)
    by_hand = [[4.3696, 4.43, 3.0], [4.0, 0.0, 0.0]]
    torch.testing.assert_close(returns, torch.tensor(by_hand).double(), rtol=1e-7, atol=1e-7)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6), st.sampled_from([1.0, 0.9]))
def test_lambda_1_is_monte_carlo(rows: int, columns: int, seed: int, gamma: float) -> None:
    """λ = 1: the advantage is the discounted sum of what comes, minus the value."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, columns + 1, (rows, 1), generator=generator)
    mask = torch.arange(columns) < lengths
    rewards = torch.randn(rows, columns, generator=generator).double() * mask
    values = torch.randn(rows, columns, generator=generator).double()
    advantages, returns = advantages_and_returns(rewards, values, mask, gamma, 1.0)
    for t in range(columns):
        discounts = gamma ** torch.arange(columns - t).double()
        sums = (rewards[:, t:] * discounts).sum(-1) * mask[:, t]
        torch.testing.assert_close(returns[:, t], sums)
        torch.testing.assert_close(advantages[:, t], (sums - values[:, t]) * mask[:, t])


def test_lambda_0_is_the_temporal_difference() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0]])
    values = torch.tensor([[0.5, 1.0, 1.5]])
    advantages, _ = advantages_and_returns(rewards, values, MASK[:1], 1.0, 0.0)
    torch.testing.assert_close(advantages, torch.tensor([[1.5, 2.5, 1.5]]))


# Normalization

PARTS = [torch.tensor([[1.0, 3.0, 5.0], [7.0, 0.0, 0.0]]), torch.tensor([[9.0, 11.0]])]
MASKS = [MASK, torch.tensor([[True, True]])]


def test_none_leaves_advantages_as_they_are() -> None:
    assert normalize_advantages(PARTS, MASKS, "none") == PARTS


def test_center_subtracts_the_mean_over_valid_tokens() -> None:
    first, second = normalize_advantages(PARTS, MASKS, "center")
    assert first.tolist() == [[-5.0, -3.0, -1.0], [1.0, 0.0, 0.0]]
    assert second.tolist() == [[3.0, 5.0]]


def test_full_divides_by_the_deviation_too() -> None:
    deviation = math.sqrt(35 / 3)  # of 1, 3, 5, 7, 9, 11
    first, second = normalize_advantages(PARTS, MASKS, "full")
    expected = torch.tensor([[-5.0, -3.0, -1.0], [1.0, 0.0, 0.0]]) / deviation
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, torch.tensor([[3.0, 5.0]]) / deviation)


def test_statistics_are_those_of_all_ranks() -> None:
    """Two ranks with one part each get what one rank with both gets."""
    whole = normalize_advantages(PARTS, MASKS, "full")
    moments = []
    for part, mask in zip(PARTS, MASKS, strict=True):
        normalize_advantages([part], [mask], "full", lambda m: moments.append(m) or m)
    shared = sum(moments)
    apart = [
        normalize_advantages([part], [mask], "full", lambda m: shared)[0]
        for part, mask in zip(PARTS, MASKS, strict=True)
    ]
    for one, other in zip(whole, apart, strict=True):
        torch.testing.assert_close(one, other)
    alone = normalize_advantages(PARTS[:1], MASKS[:1], "full")[0]
    assert (alone - whole[0]).abs().max() > 0.1


def test_full_blows_noise_up_and_center_does_not() -> None:
    noise = torch.tensor([[1e-5, -1e-5, 0.0]])
    assert normalize_advantages([noise], [MASK[:1]], "center")[0].abs().max() < 2e-5
    assert normalize_advantages([noise], [MASK[:1]], "full")[0].abs().max() > 1


# Losses


def test_the_clipped_policy_loss_by_hand() -> None:
    """Ratios 1.5, 0.5, 0.5, 1.5 with advantages 1, 1, −1, −1 and a clip of 0.2."""
    ratios = torch.tensor([[1.5, 0.5, 0.5, 1.5, 1.1, 7.0]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, 2.0, 1e3]], dtype=torch.float64)
    mask = torch.tensor([[True] * 5 + [False]])
    logp = ratios.log().requires_grad_()
    loss, clipped = policy_loss(logp, torch.zeros_like(logp), advantages, mask, 0.2)
    # −1.2 (clipped), −0.5, 0.8 (clipped), 1.5, −2.2
    assert loss.item() == pytest.approx(-1.2 - 0.5 + 0.8 + 1.5 - 2.2, rel=1e-12)
    assert clipped.item() == 2
    loss.backward()
    # −A · ratio where not clipped, exactly 0 where clipped or masked
    assert logp.grad.tolist() == [pytest.approx([0.0, -0.5, 0.0, 1.5, -2.2, 0.0], rel=1e-12)]


def test_on_policy_the_gradient_is_reinforces() -> None:
    logp = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    advantages = torch.tensor([[0.5, -1.5, 2.0]])
    loss, clipped = policy_loss(logp, logp.detach(), advantages, MASK[:1], 0.2)
    loss.backward()
    torch.testing.assert_close(logp.grad, -advantages)
    assert clipped == 0


def test_the_clipped_value_loss_by_hand() -> None:
    values = torch.tensor([[2.0, 0.0, 1.1, 5.0]], dtype=torch.float64, requires_grad=True)
    old = torch.ones(1, 4, dtype=torch.float64)
    returns = torch.tensor([[0.0, 0.0, 3.0, 1e3]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False]])
    loss, clipped = value_loss(values, old, returns, mask, 0.2)
    # ½ 2² > ½ 1.2²; ½ 0² < ½ 0.8² (clipped); ½ 1.9² inside the clip
    assert loss.item() == pytest.approx(2.0 + 0.32 + 1.805, rel=1e-12)
    assert clipped.item() == 1
    loss.backward()
    assert values.grad.tolist() == [pytest.approx([2.0, 0.0, -1.9, 0.0], rel=1e-12)]


# RLOO


def test_the_other_responses_are_the_baseline() -> None:
    """Two prompts of three responses with credits 3, 5, 10 and 1, 1, 1."""
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 0], [1, 1], [1, 1]]).bool()
    rewards = [[1.0, 2.0], [5.0, NAN], [4.0, 6.0], [1.0, NAN], [0.5, 0.5], [2.0, -1.0]]
    advantages, credits = leave_one_out(torch.tensor(rewards), mask, each=3)
    assert advantages.tolist() == [[-4.5, -4.5], [-1.5, 0.0], [6.0, 6.0], *[[0.0, 0.0]] * 3]
    assert credits.tolist() == [[3.0, 3.0], [5.0, 0.0], [10.0, 10.0], [1, 0], [1, 1], [1, 1]]
    (pairs,) = {tuple(leave_one_out(torch.tensor(rewards), mask, each=2)[0][:2, 0].tolist())}
    assert pairs == (-2.0, 2.0)  # other groups are other baselines


# What the sums are divided by

LENGTHS = (1, 10)
"""Of the two responses; the optimum of pm with equal rewards gives each a probability of ½."""


def mean_gradient(p: float, batch: int, divisor: Callable[[torch.Tensor], float]) -> float:
    """Mean gradient of the policy loss over all batches, by the logit of the short response.

    The response is chosen by its first token; the others are certain. The critic says log 2 − 1 of
    every state, 1 nat less than the optimum is worth.
    """
    logit = torch.tensor(math.log(p / (1 - p)), dtype=torch.float64, requires_grad=True)
    mask = torch.arange(10) < torch.tensor(LENGTHS)[:, None]
    log_first = torch.nn.functional.logsigmoid(torch.stack([logit, -logit]))
    logp = torch.where(torch.arange(10) == 0, log_first[:, None], 0.0)
    values = torch.full((2, 10), math.log(2) - 1).double()
    rewards = place_rewards(-logp.detach(), torch.zeros(2), mask)  # marginal of pm: −log π
    advantages, _ = advantages_and_returns(rewards, values, mask, 1.0, 1.0)
    total = torch.zeros((), dtype=torch.float64)
    for short in range(batch + 1):
        rows = torch.tensor([0] * short + [1] * (batch - short))
        loss, _ = policy_loss(
            logp[rows], logp[rows].detach(), advantages[rows], mask[rows], cliprange=0.2
        )
        chance = math.comb(batch, short) * p**short * (1 - p) ** (batch - short)
        total = total + chance * loss / divisor(mask[rows])
    (gradient,) = torch.autograd.grad(total, logit)
    return gradient.item()


def rest_point(batch: int, divisor: Callable[[torch.Tensor], float]) -> float:
    """The probability of the short response at which the mean gradient is 0."""
    low, high = 0.01, 0.99
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if mean_gradient(middle, batch, divisor) > 0 else (middle, high)
    return low


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_a_wrong_critic_does_not_move_the_rest_point(batch: int) -> None:
    found = rest_point(batch, lambda mask: loss_divisor(len(mask), 10))
    assert found == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize(("batch", "moved"), [(1, 0.96), (4, 0.72), (16, 0.53)])
def test_divided_by_the_drawn_tokens_it_would(batch: int, moved: float) -> None:
    """The wrong variant: a mean over the batch's tokens."""
    assert rest_point(batch, lambda mask: mask.sum().item()) == pytest.approx(moved, abs=6e-3)
