"""Preference losses against literal numbers and closed forms."""

import math

import pytest
import torch
from lbfgs import lowest

from step2_reward.losses import btl_loss, plackett_luce_loss
from training.preferences.links import LOG_LINKS, LinkName


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


def test_a_generalized_choice_by_hand() -> None:
    """Softplus: g(1) = log(1 + e) = 1.3132617, g(0) = log 2 = 0.6931472, g(−1) = 0.3132617."""
    g = [1.3132616875182228, 0.6931471805599453, 0.31326168751822286]
    rewards = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    loss = plackett_luce_loss(LOG_LINKS["softplus"](rewards), all_present(rewards))
    # the best of three, and then the best of the two that are left
    expected = -math.log(g[0] / sum(g)) - math.log(g[1] / (g[1] + g[2]))
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    exponential = plackett_luce_loss(rewards, all_present(rewards))
    assert abs(loss.item() - exponential.item()) > 0.05
    # ∂loss/∂r_i = (g'_i/g_i)·(expected times of being chosen − times chosen)
    loss.backward()
    slopes = [1 / (1 + math.exp(-r)) / g_i for r, g_i in zip((1, 0, -1), g, strict=True)]
    first = [g_i / sum(g) for g_i in g]
    second = [0.0, g[1] / (g[1] + g[2]), g[2] / (g[1] + g[2])]
    chosen = [1.0, 1.0, 0.0]
    for k, found in enumerate(rewards.grad[0].tolist()):
        expected = slopes[k] * (first[k] + second[k] - chosen[k])
        assert found == pytest.approx(expected, rel=1e-12)


POPULATION = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
"""Proportions of first choices."""


def expected_loss(scores: torch.Tensor) -> torch.Tensor:
    """Mean loss over all pairs of the population, whose choices are Luce's: p_i/(p_i + p_j)."""
    i, j = torch.triu_indices(len(scores), len(scores), offset=1)
    wins = POPULATION[i] / (POPULATION[i] + POPULATION[j])
    losses = wins * btl_loss(scores[i], scores[j]) + (1 - wins) * btl_loss(scores[j], scores[i])
    return losses.mean()


@pytest.mark.parametrize("link", LOG_LINKS)
def test_a_table_of_rewards_recovers_the_population_under_its_link(link: LinkName) -> None:
    log_g = LOG_LINKS[link]
    rewards = lowest(lambda r: expected_loss(log_g(r)), 4)
    torch.testing.assert_close(log_g(rewards).softmax(0), POPULATION, rtol=0, atol=1e-6)
    if link != "exponential":  # the same rewards read as those of Bradley-Terry
        assert 0.5 * (rewards.softmax(0) - POPULATION).abs().sum() > 0.05


def test_the_exponential_link_cannot_hold_what_softplus_made() -> None:
    """Rewards that share a parameter, r_i = θ x_i, as those of a model do."""
    x = torch.tensor([2.0, 1.0, -1.0, -3.0], dtype=torch.float64)
    true = LOG_LINKS["softplus"](1.5 * x).softmax(0)
    i, j = torch.triu_indices(4, 4, offset=1)
    wins = true[i] / (true[i] + true[j])

    def fitted(link: LinkName) -> torch.Tensor:
        def loss(theta: torch.Tensor) -> torch.Tensor:
            s = LOG_LINKS[link](theta * x)
            return (wins * btl_loss(s[i], s[j]) + (1 - wins) * btl_loss(s[j], s[i])).mean()

        theta = lowest(loss, start=torch.ones(1, dtype=torch.float64))
        return LOG_LINKS[link](theta * x).softmax(0)

    torch.testing.assert_close(fitted("softplus"), true, rtol=0, atol=1e-6)
    assert 0.5 * (fitted("exponential") - true).abs().sum() > 0.05
