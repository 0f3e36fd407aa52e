"""The calibrating temperature under any link: a closed form, the exponential's, the truth."""

import math

import pytest
import torch
from torch import Tensor

from step2_reward.calibrate.__main__ import calibration
from step2_reward.calibrate.linked import (
    estimand,
    held_out_log_odds,
    linked_temperature,
    tempered,
)
from step2_reward.calibrate.temperature import NoTemperatureError, calibrated_temperature
from training.preferences.links import LOG_LINKS, LinkName

REWARDS = torch.tensor([2.0, 1.0, -0.5, -2.0], dtype=torch.float64)


def choices(link: LinkName, groups: int, factor: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rewards factor · r* of ten choices of each group, by g(r*)/(g(r*) + g(r*'))."""
    random = torch.Generator().manual_seed(seed)
    first = torch.randint(4, (10 * groups,), generator=random)
    second = (first + torch.randint(1, 4, first.shape, generator=random)) % 4
    s = LOG_LINKS[link](REWARDS)
    wins = torch.rand(first.shape, generator=random, dtype=torch.float64)
    won = wins < (s[first] - s[second]).sigmoid()
    chosen, rejected = torch.where(won, first, second), torch.where(won, second, first)
    pairs = factor * torch.stack([REWARDS[chosen], REWARDS[rejected]], dim=-1)
    return pairs, torch.arange(groups).repeat_interleave(10)


def test_one_pair_of_rewards_has_a_closed_form() -> None:
    """Sigmoid, rewards ±1: the log-odds are 1/T; seven of ten right: T = 1/log(7/3)."""
    right, wrong = [[1.0, -1.0]] * 7, [[-1.0, 1.0]] * 3
    pairs = torch.tensor(right + wrong, dtype=torch.float64)
    found = linked_temperature(pairs, torch.arange(10), "sigmoid")
    assert found.mean == pytest.approx(1 / math.log(7 / 3), rel=1e-10)
    # The same as the exponential's of rewards ±1/2, the interval included.
    same = calibrated_temperature(torch.tensor([1.0] * 7 + [-1.0] * 3), torch.arange(10))
    assert (found.low, found.high) == pytest.approx((same.low, same.high), rel=1e-8)
    assert (found.count, found.clusters, found.method) == (10, 10, "log t")
    alone = linked_temperature(pairs, torch.zeros(10).long(), "sigmoid")
    assert alone.low is None


def test_where_softplus_is_exponential_the_temperatures_are_equal() -> None:
    pairs, clusters = choices("exponential", 100, 1.0)
    low = pairs - 60  # g(r/T) = e^{r/T} there
    found = linked_temperature(low, clusters, "softplus")
    expected = calibrated_temperature(pairs[:, 0] - pairs[:, 1], clusters)
    assert found.mean == pytest.approx(expected.mean, rel=1e-6)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-6)
    assert linked_temperature(pairs, clusters, "exponential") == expected


@pytest.mark.parametrize("link", ["softplus", "sigmoid"])
def test_rewards_times_three_are_calibrated_at_three_under_their_link(link: LinkName) -> None:
    for seed in range(3):
        found = linked_temperature(*choices(link, 300, 3.0, seed), link)
        assert found.low < 3 < found.high
    # Read as rewards of Bradley-Terry, the same choices have another temperature.
    pairs, clusters = choices(link, 300, 3.0)
    other = calibrated_temperature(pairs[:, 0] - pairs[:, 1], clusters)
    assert not other.low < 3 < other.high


def test_after_is_measured_on_other_groups_and_named() -> None:
    pairs, clusters = choices("softplus", 100, 3.0)
    report = calibration(pairs, clusters, 10, "softplus")
    assert report["link"] == "softplus"
    assert "g(r_w/T)/(g(r_w/T) + g(r_l/T)), g = softplus, has the highest" in report["estimand"]
    assert "sigma((r_w - r_l)/T)" in estimand("exponential")
    assert report["after"]["log_loss"] < report["before"]["log_loss"]
    found = held_out_log_odds(pairs, clusters, "softplus")
    at = torch.tensor(report["beta"]["mean"], dtype=torch.float64).log()
    in_sample = tempered(pairs, "softplus", at)
    assert (found - in_sample).abs().max() > 1e-4
    softplus = torch.nn.functional.softplus
    assert softplus(-in_sample).mean() < softplus(-found).mean()


def test_what_has_no_temperature_is_refused() -> None:
    pairs, clusters = choices("softplus", 50, 1.0)
    with pytest.raises(NoTemperatureError, match="no better than chance"):
        linked_temperature(pairs.flip(-1), clusters, "softplus")
    below = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    with pytest.raises(NoTemperatureError, match="Too few choices contradict"):
        linked_temperature(below, torch.arange(2), "softplus")
