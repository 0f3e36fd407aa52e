"""Ties and partial rankings: closed forms, the sum over all outcomes, what is estimated."""

import math
from collections.abc import Callable, Iterator
from itertools import combinations

import pytest
import torch
from lbfgs import lowest
from torch import Tensor

from training.preferences.davidson_luce import davidson_luce_loss
from training.preferences.plackett_luce import plackett_luce_loss

Outcome = tuple[tuple[int, ...], ...]
"""Sets of tied responses, best first."""


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def loss_of(
    outcome: Outcome, scores: Tensor, log_ties: Tensor, order: int, rest: tuple[int, ...] = ()
) -> Tensor:
    """−log P of one outcome, followed by `rest` in unknown order."""
    level = [number for number, tied in enumerate(outcome) for _ in tied]
    level += [len(outcome)] * len(rest)
    places = [member for tied in outcome for member in tied] + list(rest)
    ranked = torch.tensor([[True] * (len(places) - len(rest)) + [False] * len(rest)])
    (loss,) = davidson_luce_loss(
        scores[places][None],
        torch.tensor([level]),
        ranked,
        torch.ones_like(ranked),
        log_ties,
        torch.tensor([order]),
    )
    return loss


def outcomes(members: tuple[int, ...], order: int) -> Iterator[Outcome]:
    """All rankings with ties of at most `order` responses."""
    if not members:
        yield ()
    for size in range(1, min(order, len(members)) + 1):
        for best in combinations(members, size):
            left = tuple(member for member in members if member not in best)
            for rest in outcomes(left, order):
                yield (best, *rest)


def test_a_pair_is_davidsons() -> None:
    v, delta = (3.0, 1.0), 0.5
    total = 3 + 1 + 0.5 * math.sqrt(3)
    scores = tensor(*v).log()
    for outcome, share in {((0,), (1,)): 3.0, ((1,), (0,)): 1.0, ((0, 1),): 0.5 * 3**0.5}.items():
        found = loss_of(outcome, scores, tensor(delta).log(), 2)
        assert found.item() == pytest.approx(-math.log(share / total), rel=1e-12)


def test_a_choice_among_three_by_hand() -> None:
    """v = 1, 4, 9, δ_2 = 2, δ_3 = 3: singles 14, pairs 2(2 + 3 + 6) = 22, all three 3·36^{1/3}."""
    scores, log_ties = tensor(1.0, 4.0, 9.0).log(), tensor(2.0, 3.0).log()
    total = 14 + 22 + 3 * 36 ** (1 / 3)
    # {4, 9} tied and best: 2·6; then 1 alone is left
    found = loss_of(((1, 2), (0,)), scores, log_ties, 3)
    assert found.item() == pytest.approx(-math.log(12 / total), rel=1e-12)
    # 9 is best: 9; then 1 and 4 are tied: 2·2 of 1 + 4 + 4
    found = loss_of(((2,), (0, 1)), scores, log_ties, 3)
    assert found.item() == pytest.approx(-math.log(9 / total) - math.log(4 / 9), rel=1e-12)
    # where only pairs can be tied, the third kind is not there
    found = loss_of(((1, 2), (0,)), scores, log_ties, 2)
    assert found.item() == pytest.approx(-math.log(12 / 36), rel=1e-12)


@pytest.mark.parametrize(("count", "order"), [(2, 2), (3, 2), (3, 3), (4, 2), (4, 4)])
def test_all_outcomes_together_are_certain(count: int, order: int) -> None:
    generator = torch.Generator().manual_seed(count)
    scores = 2 * torch.randn(count, generator=generator, dtype=torch.float64)
    log_ties = torch.randn(order - 1, generator=generator, dtype=torch.float64)
    every = list(outcomes(tuple(range(count)), order))
    total = sum((-loss_of(outcome, scores, log_ties, order)).exp() for outcome in every)
    assert total.item() == pytest.approx(1, rel=1e-12)
    # Efron's approximation has too much: the decisions alone are certain.
    if count == 2:
        a, b = scores.exp().tolist()
        assert a / (a + b) + b / (a + b) + 2 * a * b / (a + b) ** 2 > 1.01


def test_the_best_of_several_is_the_sum_over_the_orders_of_the_others() -> None:
    scores, log_ties = tensor(0.3, -1.0, 2.0, 0.5), tensor(0.7).log()
    best = ((2,), (0,))
    found = loss_of(best, scores, log_ties, 2, rest=(1, 3))
    whole = [(*best, *rest) for rest in outcomes((1, 3), 2)]
    total = sum((-loss_of(outcome, scores, log_ties, 2)).exp() for outcome in whole)
    assert found.item() == pytest.approx(-total.log().item(), rel=1e-12)
    assert abs(found.item() - loss_of(((2,), (0,), (1, 3)), scores, log_ties, 2).item()) > 0.1
    # without ties: e^s of the best over the sum of all, then of what is left
    v = scores.exp().tolist()
    expected = -math.log(v[2] / sum(v)) - math.log(v[0] / (v[0] + v[1] + v[3]))
    plain = loss_of(best, scores, tensor(), 1, rest=(1, 3)).item()
    assert plain == pytest.approx(expected, rel=1e-12)


def test_without_ties_it_is_plackett_luce_gradient_included() -> None:
    torch.manual_seed(0)
    scores = (5 * torch.randn(6, 4, dtype=torch.float64)).requires_grad_()
    present = torch.arange(4) < torch.tensor([4, 3, 2, 1, 0, 4])[:, None]
    level = torch.arange(4).expand(6, 4)
    everywhere = torch.ones(6, 4, dtype=torch.bool)

    def gradient(losses: Tensor) -> Tensor:
        return torch.autograd.grad(losses.sum(), scores)[0]

    expected = plackett_luce_loss(scores, present)
    slope = gradient(expected)
    for order, log_ties in ((1, tensor(0.5)), (1, tensor())):
        orders = torch.full((6,), order)
        found = davidson_luce_loss(scores, level, everywhere, present, log_ties, orders)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient(found), slope, rtol=1e-10, atol=1e-12)
    orders = torch.full((6,), 2)  # a tie was possible, though nobody gave one
    found = davidson_luce_loss(scores, level, everywhere, present, tensor(0.5), orders)
    assert (found - expected)[present.sum(-1) > 1].min() > 1e-4
    assert gradient(found).isfinite().all()


WORTHS = tensor(0.6, 0.3, 0.1)
PREVALENCE = 0.8


def estimated(loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, float]:
    """softmax(s) and δ_2 at the smallest mean loss over all pairs of a Davidson population.

    Args:
        loss: of the scores of two responses and log δ_2: [3] −log of i wins, j wins and a tie.
    """

    def total(parameters: Tensor) -> Tensor:
        losses = tensor(0.0)
        for i, j in combinations(range(3), 2):
            a, b = WORTHS[i], WORTHS[j]
            shares = torch.stack([a, b, PREVALENCE * (a * b).sqrt()])
            losses = losses + shares / shares.sum() @ loss(parameters[[i, j]], parameters[3:])
        return losses.sum()

    found = lowest(total, 4, tolerance=1e-13)
    return found[:3].softmax(0), found[3].exp().item()


def davidson(scores: Tensor, log_ties: Tensor) -> Tensor:
    every: list[Outcome] = [((0,), (1,)), ((1,), (0,)), ((0, 1),)]
    return torch.stack([loss_of(outcome, scores, log_ties, 2) for outcome in every])


def decided(scores: Tensor) -> Tensor:
    return torch.nn.functional.softplus(torch.stack([scores[1] - scores[0], scores[0] - scores[1]]))


def test_worths_are_recovered_and_by_half_wins_and_efron_they_are_not() -> None:
    found, prevalence = estimated(davidson)
    torch.testing.assert_close(found, WORTHS, rtol=0, atol=1e-6)
    assert prevalence == pytest.approx(PREVALENCE, abs=1e-5)

    def left_out(scores: Tensor, log_ties: Tensor) -> Tensor:
        return torch.cat([decided(scores), tensor(0.0)])

    def half_wins(scores: Tensor, log_ties: Tensor) -> Tensor:
        wins = decided(scores)
        return torch.cat([wins, wins.mean()[None]])

    def efron(scores: Tensor, log_ties: Tensor) -> Tensor:
        wins = decided(scores)
        return torch.cat([wins, wins.sum()[None] - math.log(2)])

    # Leaving ties out is sound too, but wastes what they say about the worths.
    torch.testing.assert_close(estimated(left_out)[0], WORTHS, rtol=0, atol=1e-6)
    for wrong in (half_wins, efron):
        assert 0.5 * (estimated(wrong)[0] - WORTHS).abs().sum() > 0.05
