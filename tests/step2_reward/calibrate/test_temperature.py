"""The calibrating temperature against closed forms, and what it does to preference matching."""

import math

import pytest
import torch

from step2_reward.calibrate.__main__ import calibration
from step2_reward.calibrate.temperature import (
    NoTemperatureError,
    calibrated_temperature,
    held_out_margins,
)
from step3_rlhf.regularizers import parse_regularizer
from step3_rlhf.regularizers.base import ResponseSet
from step3_rlhf.regularizers.optimum import optimum

POPULATION = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def choices(
    groups: int, pairs: int, factor: float, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Margins under the rewards factor · r* of choices of a population softmax(r*), and groups."""
    random = torch.Generator().manual_seed(seed)
    utility = POPULATION.log()
    first = torch.randint(4, (groups * pairs,), generator=random)
    second = (first + torch.randint(1, 4, first.shape, generator=random)) % 4
    gap = utility[first] - utility[second]
    won = torch.rand(first.shape, generator=random, dtype=torch.float64) < gap.sigmoid()
    margins = factor * torch.where(won, gap, -gap)
    return margins, torch.arange(groups).repeat_interleave(pairs)


def test_one_size_of_margin_has_a_closed_form() -> None:
    """Of ten margins ±2, eight are right: σ(2/T) = 0.8, so T = 2/log 4."""
    margins = tensor(*[2.0] * 8, *[-2.0] * 2)
    found = calibrated_temperature(margins, torch.arange(10))
    assert found.mean == pytest.approx(2 / math.log(4), rel=1e-12)
    # Scores 2 · 0.2 eight times and −2 · 0.8 twice, H = 10 · 4 · 0.16, a = log 4 / 2.
    error = math.sqrt(10 / 9 * (8 * 0.16 + 2 * 2.56)) / 6.4 / (math.log(4) / 2)
    factor = math.exp(2.26215716274 * error)
    assert (found.low, found.high) == pytest.approx((found.mean / factor, found.mean * factor))
    assert (found.count, found.clusters, found.method) == (10, 10, "log t")


def test_the_gradient_is_zero_at_the_optimum() -> None:
    margins, clusters = choices(50, 4, 2.0)
    inverse = tensor(1 / calibrated_temperature(margins, clusters).mean).requires_grad_()
    torch.nn.functional.softplus(-inverse * margins).mean().backward()
    assert abs(inverse.grad.item()) < 1e-12


def test_repeated_pairs_add_no_certainty() -> None:
    margins = tensor(*[2.0] * 8, *[-2.0] * 2)
    once = calibrated_temperature(margins, torch.arange(10))
    again = calibrated_temperature(margins.repeat(9), torch.arange(10).repeat(9))
    assert (again.low, again.high) == pytest.approx((once.low, once.high), rel=1e-12)
    naive = calibrated_temperature(margins.repeat(9), torch.arange(90))  # pairs as independent
    assert math.log(naive.high / naive.low) < 0.4 * math.log(once.high / once.low)


def test_a_reward_times_three_is_calibrated_at_three() -> None:
    """The interval covers the truth, which is 3; and in 95 % of all data sets."""
    found = calibrated_temperature(*choices(200, 10, 3.0))
    assert found.low < 3 < found.high
    assert found.mean == pytest.approx(3, abs=0.3)
    assert not found.low < 1 < found.high
    covered = 0
    for seed in range(10_000, 10_400):
        drawn = calibrated_temperature(*choices(40, 8, 3.0, seed))
        covered += drawn.low < 3 < drawn.high
    assert 0.92 < covered / 400 < 0.975


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_it_scales_with_the_rewards(scale: float) -> None:
    margins, clusters = choices(50, 4, 1.0)
    once = calibrated_temperature(margins, clusters).mean
    assert calibrated_temperature(scale * margins, clusters).mean == pytest.approx(scale * once)


def test_preference_matching_at_it_reaches_the_population_and_at_one_does_not() -> None:
    """Exactly, on an enumerable set: the optimum of PM under the reward 3 r*."""
    beta = calibrated_temperature(*choices(400, 20, 3.0)).mean
    rewards = 3 * POPULATION.log()
    mask = torch.ones(4, 1).bool()
    uniform = torch.full((4, 1), 0.25, dtype=torch.float64).log()
    responses = ResponseSet(torch.arange(4)[:, None], uniform, mask, rewards)

    def distance(beta: float) -> float:
        reached = optimum(parse_regularizer({"name": "pm", "beta": beta}), responses).exp()
        return 0.5 * (reached - POPULATION).abs().sum().item()

    assert distance(beta) < 0.02
    assert distance(1.0) > 0.25
    assert distance(3.0) < 1e-12


def test_after_is_measured_on_other_groups_than_those_that_calibrated() -> None:
    margins, clusters = choices(30, 3, 3.0)
    found = held_out_margins(margins, clusters)
    factors = margins / found
    assert len(factors.round(decimals=9).unique()) == 2
    for group in range(30):
        assert len(factors[clusters == group].round(decimals=9).unique()) == 1
    # In sample, no other temperature has a lower loss; out of sample, calibration may cost.
    whole = margins / calibrated_temperature(margins, clusters).mean
    in_sample = torch.nn.functional.softplus(-whole).mean()
    assert in_sample < torch.nn.functional.softplus(-found).mean()


def test_the_report_shows_what_it_mends() -> None:
    margins, clusters = choices(200, 10, 3.0)
    pairs = torch.stack([margins + 5, torch.full_like(margins, 5)], dim=-1)
    report = calibration(pairs, clusters, bins=10)
    assert report["beta"]["mean"] == pytest.approx(calibrated_temperature(margins, clusters).mean)
    assert report["after"]["log_loss"] < report["before"]["log_loss"] - 0.05
    assert report["after"]["ece"] < 0.5 * report["before"]["ece"]
    assert report["after"]["accuracy"] == report["before"]["accuracy"]
    assert report["split"] == "test"


def test_what_has_no_temperature_is_refused() -> None:
    with pytest.raises(NoTemperatureError, match="no better than chance"):
        calibrated_temperature(tensor(1.0, -1.0), torch.arange(2))
    with pytest.raises(NoTemperatureError, match="None of the 2 choices contradicts"):
        calibrated_temperature(tensor(1.0, 2.0), torch.arange(2))
    alone = calibrated_temperature(tensor(1.0, 1.0, -1.0), torch.zeros(3).long())
    assert alone.mean == pytest.approx(1 / math.log(2))
    assert alone.ci95 is alone.low is alone.high is None
    with pytest.raises(NoTemperatureError, match="two groups"):
        held_out_margins(tensor(1.0, 1.0, -1.0), torch.zeros(3).long())
