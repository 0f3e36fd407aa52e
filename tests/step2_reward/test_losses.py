"""Preference losses against literal numbers and closed forms."""

import math

import pytest
import torch

from step2_reward.losses import btl_loss, plackett_luce_loss


def all_present(rewards: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(rewards, dtype=torch.bool)


@pytest.mark.parametrize(
    ("margin", "loss"),
    [
        (0.0, 0.6931471805599453),  # log 2
        (1.0, 0.3132616875182228),  # log(1 + 1/e)
        (-1.0, 1.3132616875182228),
        (math.log(3.0), 0.2876820724517809),  # the chosen one with probability 3/4
        (-1000.0, 1000.0),
        (1000.0, 0.0),
    ],
)
def test_btl_literal(margin: float, loss: float) -> None:
    rewards = torch.tensor([margin + 5.0], dtype=torch.float64)
    found = btl_loss(rewards, torch.tensor([5.0], dtype=torch.float64))
    assert found.item() == pytest.approx(loss, rel=1e-12, abs=1e-12)


def test_btl_gradient_is_the_probability_of_the_other_choice() -> None:
    chosen = torch.tensor([math.log(3.0)], dtype=torch.float64, requires_grad=True)
    rejected = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    btl_loss(chosen, rejected).sum().backward()
    assert chosen.grad.item() == pytest.approx(-0.25, rel=1e-12)
    assert rejected.grad.item() == pytest.approx(0.25, rel=1e-12)


def test_plackett_luce_of_two_is_btl() -> None:
    torch.manual_seed(0)
    rewards = 10 * torch.randn(100, 2, dtype=torch.float64)
    found = plackett_luce_loss(rewards, all_present(rewards))
    torch.testing.assert_close(found, btl_loss(*rewards.unbind(1)), rtol=1e-12, atol=1e-14)


def test_plackett_luce_literal() -> None:
    rewards = torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    found = plackett_luce_loss(rewards, all_present(rewards))
    # log(1 + e^-1 + e^-2) + log(1 + e^-1), and log 3!
    assert found.tolist() == pytest.approx([0.7208676519626034, math.log(6)], rel=1e-12)
    worst_first = plackett_luce_loss(rewards.flip(-1), all_present(rewards))
    assert worst_first[0] > found[0] + 1


def test_probabilities_of_all_rankings_sum_to_one() -> None:
    utilities = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)
    orders = torch.cartesian_prod(*[torch.arange(4)] * 4)
    permutations = orders[[len(set(order.tolist())) == 4 for order in orders]]
    rewards = utilities[permutations]
    assert len(rewards) == 24
    total = plackett_luce_loss(rewards, all_present(rewards)).neg().exp().sum()
    assert total.item() == pytest.approx(1.0, rel=1e-12)


def test_rankings_of_different_lengths() -> None:
    nothing = 123.0  # what stands where no response is
    rewards = torch.tensor(
        [[1.0, 0.0, -1.0], [1.0, 0.0, nothing], [2.0, nothing, nothing], [nothing] * 3],
        dtype=torch.float64,
        requires_grad=True,
    )
    present = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    losses = plackett_luce_loss(rewards, present)
    assert losses.tolist() == pytest.approx([0.7208676519626034, 0.3132616875182228, 0.0, 0.0])
    losses.sum().backward()
    assert rewards.grad.isfinite().all()
    assert (rewards.grad[~present] == 0).all()
    # softmax over what remains, minus one for what was taken
    expected = [-0.2689414213699951, 0.2689414213699951]
    assert rewards.grad[1, :2].tolist() == pytest.approx(expected, rel=1e-9)


def test_a_common_constant_changes_nothing() -> None:
    rewards = torch.tensor([[0.5, 0.1, -2.0]], dtype=torch.float64)
    shifted = plackett_luce_loss(rewards + 50, all_present(rewards))
    torch.testing.assert_close(shifted, plackett_luce_loss(rewards, all_present(rewards)))


def test_extreme_rewards_stay_finite() -> None:
    rewards = torch.tensor([[-1e4, 1e4, 0.0]], requires_grad=True)
    loss = plackett_luce_loss(rewards, all_present(rewards))
    loss.sum().backward()
    assert loss.item() == pytest.approx(2e4, rel=1e-6)
    assert rewards.grad.isfinite().all()
