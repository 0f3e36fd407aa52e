"""Proposition A.2: what the population's comparisons determine about the reward.

The paper says that the global solution is the true reward r*(x, y). It is so up to a constant c(x),
and only among responses that are connected by comparisons.
"""

from collections.abc import Callable

import pytest
import torch
from lbfgs import lowest
from torch import Tensor

from step2_reward.losses import btl_loss

TRUE = torch.tensor([1.2, -0.4, 0.3, 2.0, -1.5], dtype=torch.float64)
CHAIN = ((0, 1), (1, 2), (2, 3), (3, 4))
PARTS = ((0, 1), (1, 2), (0, 2), (3, 4))


def probabilities(rewards: Tensor, pairs: tuple[tuple[int, int], ...]) -> Tensor:
    i, j = torch.tensor(pairs).T
    return (rewards[i] - rewards[j]).sigmoid()


def population_loss(
    rewards: Tensor,
    pairs: tuple[tuple[int, int], ...],
    loss: Callable[[Tensor, Tensor], Tensor] = btl_loss,
) -> Tensor:
    """E of the loss over P_comp: the pairs with weights 1, 2, …, the choices by the true reward."""
    i, j = torch.tensor(pairs).T
    weight = torch.arange(1.0, len(pairs) + 1, dtype=torch.float64)
    wins = probabilities(TRUE, pairs)
    both = wins * loss(rewards[i], rewards[j]) + (1 - wins) * loss(rewards[j], rewards[i])
    return (weight * both).sum() / weight.sum()


def solution(
    pairs: tuple[tuple[int, int], ...],
    start: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor] = btl_loss,
) -> Tensor:
    return lowest(
        lambda rewards: population_loss(rewards, pairs, loss),
        start=start,
        iterations=1000,
        tolerance=1e-14,
    )


@pytest.mark.parametrize("level", [0.0, 7.0])
def test_connected_comparisons_give_the_true_reward_up_to_a_constant(level: float) -> None:
    found = solution(CHAIN, torch.full((5,), level, dtype=torch.float64))
    shift = found - TRUE
    torch.testing.assert_close(shift, shift.mean().expand(5), rtol=0, atol=1e-6)
    assert shift.mean().item() == pytest.approx(level - TRUE.mean().item(), abs=1e-6)  # c(x)
    assert population_loss(TRUE + 3, CHAIN).item() == pytest.approx(
        population_loss(TRUE, CHAIN).item(), rel=1e-14
    )
    torch.testing.assert_close(found.softmax(0), TRUE.softmax(0), rtol=0, atol=1e-6)


def test_what_is_lost_is_the_divergence_from_the_true_choices() -> None:
    """The proof's cross-entropy: L(r) − L(r*) = E KL(p_reward* ‖ p_reward) ≥ 0."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.arange(1.0, 5, dtype=torch.float64) / 10
    true = probabilities(TRUE, CHAIN)
    for _ in range(5):
        rewards = torch.randn(5, generator=generator, dtype=torch.float64)
        other = probabilities(rewards, CHAIN)
        divergence = true * (true / other).log() + (1 - true) * ((1 - true) / (1 - other)).log()
        excess = population_loss(rewards, CHAIN) - population_loss(TRUE, CHAIN)
        assert excess.item() == pytest.approx((weight @ divergence).item(), rel=1e-10)
        assert excess > 0


def test_parts_that_were_not_compared_have_no_common_zero() -> None:
    """Two parts: the reward is right within each, and whatever it started from between them."""
    apart = []
    for offset in (0.0, 5.0):
        start = torch.tensor([0.0, 0, 0, offset, offset], dtype=torch.float64)
        shift = solution(PARTS, start) - TRUE
        for part in (shift[:3], shift[3:]):
            torch.testing.assert_close(part, part.mean().expand(len(part)), rtol=0, atol=1e-6)
        apart.append((shift[3:].mean() - shift[:3].mean()).item())
    assert apart[1] - apart[0] == pytest.approx(5, abs=1e-6)


def test_another_loss_has_another_solution() -> None:
    """Wins counted by a squared error of the margin order responses, and are not calibrated."""

    def squared(chosen: Tensor, rejected: Tensor) -> Tensor:
        return (chosen - rejected - 1).square()

    found = solution(CHAIN, torch.zeros(5, dtype=torch.float64), squared)
    assert 0.5 * (found.softmax(0) - TRUE.softmax(0)).abs().sum() > 0.1
