"""The test of BTL's fit: right under BTL, also with few comparisons; rejects a mixed population."""

import math
from itertools import product

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from step2_reward.btl_fit import (
    btl_probabilities,
    count_wins,
    degrees_of_freedom,
    deviance,
    lack_of_fit,
    with_circles_reversed,
)
from step2_reward.main import fit_of_one_model, report_of
from training.preferences.links import LOG_LINKS

CONDORCET = torch.tensor([[0.89, 0.10, 0.01], [0.01, 0.89, 0.10]], dtype=torch.float64)
"""Two groups: A > B > C and B > C > A."""
MIRRORED = torch.tensor([[0.89, 0.10, 0.01], [0.01, 0.10, 0.89]], dtype=torch.float64)


def choices(groups: list[Tensor], each: int, generator: torch.Generator) -> Tensor:
    """[P, K, K] wins if each pair is compared `each` times by members of random groups.

    Args:
        groups: [P, K] utilities of each of the equally large groups.
    """
    chances = [(r[..., :, None] - r[..., None, :]).sigmoid() for r in groups]
    probability = torch.stack(chances).mean(0)
    upper = torch.full_like(probability, each).triu(1)
    won = torch.binomial(upper, probability, generator=generator)
    return won + (upper - won).mT


def test_wins_are_counted_by_prompt() -> None:
    """Of prompts with three responses whose pairs were compared twice on average."""
    x = [("x", [1], [2]), ("x", [2], [1]), ("x", [1], [3]), ("x", [1], [2])]
    y = [("y", [5], [6])] * 9
    z = [("z", [1], [2]), ("z", [2], [3]), ("z", [3], [1]), ("z", [4], [4])]
    wins = count_wins([*y, x[0], *z, *x[1:]])
    assert wins.tolist() == [[[0, 2, 1], [1, 0, 0], [0, 0, 0]]]
    assert count_wins([*x, *z, *z]).shape == (2, 3, 3)
    assert count_wins([]).shape == (0, 0, 0)


def test_degrees_of_freedom() -> None:
    """K(K − 1)/2 − (K − 1) if all pairs were compared; circles of the graph in general."""

    def of(size: int, *pairs: tuple[int, int]) -> int:
        wins = torch.zeros(1, size, size, dtype=torch.float64)
        for i, j in pairs:
            wins[0, i, j] = 1
        return int(degrees_of_freedom(wins))

    for size in (2, 3, 4, 6):
        every = [(i, j) for i in range(size) for j in range(i)]
        assert of(size, *every) == size * (size - 1) // 2 - (size - 1)
    assert of(5, (0, 1), (1, 2), (2, 3)) == 0  # a chain, and one response alone
    assert of(5, (0, 1), (1, 2), (2, 3), (3, 0)) == 1
    assert of(6, (0, 1), (1, 2), (2, 0), (3, 4), (4, 5), (5, 3)) == 2  # two parts


def test_the_fit_is_the_maximum_of_the_likelihood() -> None:
    """Every response wins as often as the fitted model expects (the score equations)."""
    generator = torch.Generator().manual_seed(0)
    utilities = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    wins = choices([utilities], 200, generator)
    fitted = btl_probabilities(wins)
    expected = ((wins + wins.mT) * fitted).sum(-1)
    torch.testing.assert_close(wins.sum(-1), expected, rtol=1e-6, atol=1e-6)
    log_odds = fitted.logit()
    torch.testing.assert_close(
        log_odds[:, 0, 1] + log_odds[:, 1, 2], log_odds[:, 0, 2], rtol=0, atol=1e-9
    )


def test_the_deviance_by_hand() -> None:
    """A circle: each of three responses beats the next 3 to 1; BTL can only say one half."""
    wins = torch.tensor([[0, 3, 1], [1, 0, 3], [3, 1, 0]], dtype=torch.float64)
    found = deviance(wins, btl_probabilities(wins)).item()
    assert found == pytest.approx(2 * 3 * (3 * math.log(1.5) + math.log(0.5)), abs=1e-9)


def test_chains_draw_what_btl_says_given_the_numbers_of_wins() -> None:
    """Against the enumeration of all outcomes of three pairs, compared twice, twice and thrice."""
    totals = {(0, 1): 2, (1, 2): 2, (0, 2): 3}
    start = torch.tensor([[0, 1, 2], [1, 0, 1], [1, 1, 0]], dtype=torch.float64)
    weights = {}
    for won in product(*(range(n + 1) for n in totals.values())):
        wins = torch.zeros(3, 3, dtype=torch.float64)
        for ((i, j), n), k in zip(totals.items(), won, strict=True):
            wins[i, j], wins[j, i] = k, n - k
        if torch.equal(wins.sum(-1), start.sum(-1)):
            weights[won] = math.prod(
                math.comb(n, k) for n, k in zip(totals.values(), won, strict=True)
            )
    assert len(weights) > 1
    chains = start.expand(20_000, 1, 3, 3)
    drawn = with_circles_reversed(chains, torch.Generator().manual_seed(0))[:, 0]
    assert torch.equal(drawn.sum(-1), start.sum(-1).expand(20_000, 3))
    for won, weight in weights.items():
        same = [drawn[:, i, j] == k for (i, j), k in zip(totals, won, strict=True)]
        share = torch.stack(same).all(0).double().mean().item()
        assert share == pytest.approx(weight / sum(weights.values()), abs=0.015)


@pytest.mark.parametrize("each", [2, 8])
def test_p_values_are_uniform_under_btl(each: int) -> None:
    """Kolmogorov–Smirnov at 1 %; the chi-square with these degrees of freedom would fail at 2."""
    generator = torch.Generator().manual_seed(1)
    p_values, chi_square = [], []
    for _ in range(40):
        utilities = 1.5 * torch.randn(8, 4, generator=generator, dtype=torch.float64)
        found = lack_of_fit(choices([utilities], each, generator))
        p_values.append(found.p_value)
        half = torch.tensor([found.degrees_of_freedom / 2, found.deviance / 2])
        chi_square.append(torch.special.gammaincc(half[0], half[1]).item())

    def distance(values: list[float]) -> float:
        ordered = torch.tensor(sorted(values))
        steps = torch.arange(41) / 40
        return torch.maximum(steps[1:] - ordered, ordered - steps[:-1]).max().item()

    bound = 1.63 / math.sqrt(40)
    assert distance(p_values) < bound
    if each == 2:
        assert distance(chi_square) > bound


def test_a_population_of_two_groups_is_rejected_unless_they_are_mirror_images() -> None:
    generator = torch.Generator().manual_seed(2)
    taste = [shares.log().expand(10, 3) for shares in CONDORCET]
    found = lack_of_fit(choices(taste, 20, generator))
    assert (found.prompts, found.comparisons, found.degrees_of_freedom) == (10, 600, 10)
    assert found.p_value < 1e-4
    assert "no single reward model can hold this population" in found.meaning
    # Pooled, mirrored tastes cancel out to (.33, .34, .33), which is a BTL model.
    taste = [shares.log().expand(10, 3) for shares in MIRRORED]
    found = lack_of_fit(choices(taste, 20, generator))
    assert found.p_value > 0.01
    assert "does not rule out groups of people who disagree" in found.meaning


def test_it_is_every_links_test() -> None:
    """Wins under softplus are those of BTL with rewards log g(r), which the same test accepts."""
    generator = torch.Generator().manual_seed(3)
    rewards = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    wins = choices([LOG_LINKS["softplus"](rewards)], 20, generator)
    exponential, softplus = lack_of_fit(wins), lack_of_fit(wins, "softplus")
    assert exponential.p_value == softplus.p_value > 0.01
    assert "one preference model of the link softplus, or of any other" in softplus.meaning
    assert "one Bradley-Terry-Luce model" in exponential.meaning
    assert (softplus.link, exponential.link) == ("softplus", "exponential")


def test_too_few_comparisons_are_no_test() -> None:
    circle = [("x", [1], [2]), ("x", [2], [3]), ("x", [3], [1])]
    chain = [("x", [1], [2]), ("x", [2], [3])] * 9
    for comparisons in (circle, [*circle, *circle[:2]], chain, [("x", [1], [2])] * 9, []):
        found = lack_of_fit(count_wins(comparisons))
        assert (found.p_value, found.deviance, found.degrees_of_freedom) == (None, None, 0)
        assert "was not tested: it needs prompts with three or more responses" in found.meaning
    assert lack_of_fit(count_wins(circle * 2)).p_value is not None


def test_what_stage_2_reports() -> None:
    """Comparisons of two responses in all held-out data; rankings take no part."""
    pairs = [[[1], [2]], [[2], [3]], [[3], [1]]] * 4 + [[[1], [3]], [[2], [1]]]
    rows = {"prompt": ["x"] * 16, "responses_ids": [*pairs, [[1], [2], [3]], [[1], [2]]]}
    rows["levels"] = [*[[0, 1]] * 14, [0, 1, 2], [0, 0]]  # the last one is a tie
    data = Dataset.from_dict(rows)
    fit = fit_of_one_model([data.select(range(5)), data.select(range(5, 16))])
    assert (fit.prompts, fit.comparisons, fit.degrees_of_freedom) == (1, 14, 1)
    report = report_of(fit)
    assert report["meaning"] == fit.meaning
    assert report["p_value"] == fit.p_value < 0.1  # a circle


def test_every_circle_is_a_move() -> None:
    """The wrong variant: moves along pairs would change the numbers of wins."""
    start = torch.tensor([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]], dtype=torch.float64)
    drawn = with_circles_reversed(start.expand(500, 1, 3, 3), torch.Generator().manual_seed(4))[
        :, 0
    ]
    assert {tuple(outcome.flatten().tolist()) for outcome in drawn} == {
        tuple(start.flatten().tolist()),
        tuple(start.mT.flatten().tolist()),
    }
