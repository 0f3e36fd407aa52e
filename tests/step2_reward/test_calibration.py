"""Accuracy, log-loss and calibration error by hand."""

import math
from pathlib import Path

import pytest
import torch

from step2_reward.calibration import (
    accuracy,
    calibration_figures,
    correct,
    draw_reliability,
    expected_calibration_error,
    log_loss,
    losses,
    reliability,
)
from training.statistics import mean_ci95

NINE_TO_ONE, SIX_TO_FOUR = math.log(9.0), math.log(1.5)
MARGINS = torch.tensor([NINE_TO_ONE, NINE_TO_ONE, -NINE_TO_ONE, SIX_TO_FOUR], dtype=torch.float64)


def test_by_hand() -> None:
    assert accuracy(MARGINS) == 0.75
    expected = -(2 * math.log(0.9) + math.log(0.1) + math.log(0.6)) / 4
    assert log_loss(MARGINS) == pytest.approx(expected, rel=1e-12)
    low, high = reliability(MARGINS, bins=2)
    assert (low.low, low.high, low.pairs, low.accuracy) == (0.5, 0.75, 1, 1.0)
    assert low.confidence == pytest.approx(0.6, rel=1e-12)
    assert (high.low, high.high, high.pairs) == (0.75, 1.0, 3)
    assert high.confidence == pytest.approx(0.9, rel=1e-12)
    assert high.accuracy == pytest.approx(2 / 3, rel=1e-12)
    # 1/4 · |1 − 0.6| + 3/4 · |2/3 − 0.9|
    assert expected_calibration_error([low, high]) == pytest.approx(0.275, rel=1e-9)


def test_ties_count_half() -> None:
    ties = torch.zeros(3)
    assert accuracy(ties) == 0.5
    assert log_loss(ties) == pytest.approx(math.log(2), rel=1e-12)
    (only,) = reliability(ties, bins=10)
    assert (only.low, only.confidence, only.accuracy, only.pairs) == (0.5, 0.5, 0.5, 3)
    assert expected_calibration_error([only]) == 0.0


def test_a_calibrated_model_has_no_error_and_an_overconfident_one_has() -> None:
    calibrated = torch.tensor([NINE_TO_ONE] * 9 + [-NINE_TO_ONE])
    assert calibration_figures(calibrated, torch.arange(10), 10)["ece"] == pytest.approx(
        0, abs=1e-6
    )
    overconfident = torch.tensor([20.0] * 9 + [-20.0])
    found = calibration_figures(overconfident, torch.arange(10), 10)
    assert found["ece"] == pytest.approx(0.1, abs=1e-6)


def test_certainty_falls_into_the_last_bin() -> None:
    (only,) = reliability(torch.tensor([1000.0, -1000.0]), bins=10)
    assert (only.low, only.pairs, only.accuracy) == (pytest.approx(0.95), 2, 0.5)


def test_log_loss_of_a_wrong_certainty_is_finite() -> None:
    assert log_loss(torch.tensor([-1000.0])) == pytest.approx(1000.0)


def test_intervals_by_hand() -> None:
    """Right, right, wrong, right: x̄ = 3/4, s² = 1/4, so t(3) · ½/√4, t(3) = 3.1824463."""
    report = calibration_figures(MARGINS, torch.tensor([3, 1, 0, 2]), 10)
    assert (report["pairs"], report["clusters"]) == (4, 4)
    assert report["accuracy_ci95"] == pytest.approx(3.18244630528 / 4, rel=1e-10)
    # −log of 0.9, 0.9, 0.1, 0.6: 0.105361, 0.105361, 2.302585, 0.510826; s = 1.0486021
    assert report["log_loss_ci95"] == pytest.approx(3.18244630528 * 1.0486021 / 2, rel=1e-7)
    assert "ece_ci95" not in report


def test_pairs_of_one_prompt_are_not_independent() -> None:
    """Two prompts, right 2 of 2 and 1 of 2: residuals ¼ + ¼ and −¾ + ¼; √(2 · (¼ + ¼)) / 4."""
    report = calibration_figures(MARGINS, torch.tensor([7, 7, 9, 9]), 10)
    assert report["clusters"] == 2
    assert report["accuracy_ci95"] == pytest.approx(12.7062047362 * 0.25, rel=1e-10)
    # 0.105361 twice, and 2.302585 with 0.510826, about the mean 0.756033: sums ∓ 1.3013448
    assert report["log_loss_ci95"] == pytest.approx(12.7062047362 * 2 * 1.3013448 / 4, rel=1e-6)


def test_repeated_pairs_add_no_certainty() -> None:
    """Every pair ten times: the same interval, where √n would make it √10 times narrower."""
    again = mean_ci95(correct(MARGINS).repeat(10), torch.arange(4).repeat(10))
    assert again == pytest.approx(3.18244630528 / 4, rel=1e-10)
    independent = mean_ci95(correct(MARGINS).repeat(10), torch.arange(40))
    assert independent == pytest.approx(2.0226909 * math.sqrt(0.1875 * 40 / 39 / 40), rel=1e-7)


def test_one_prompt_has_no_interval() -> None:
    assert mean_ci95(losses(MARGINS), torch.zeros(4, dtype=torch.long)) is None


def test_intervals_cover_95_percent() -> None:
    """2,000 samples of 100 prompts, 1 to 4 pairs each that are right or wrong together."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(2000):
        pairs = torch.randint(1, 5, (100,), generator=generator)
        right = (torch.rand(100, generator=generator) < 0.7).double()
        values = right.repeat_interleave(pairs)
        half = mean_ci95(values, torch.arange(100).repeat_interleave(pairs))
        assert half is not None
        covered += int(abs(values.mean().item() - 0.7) <= half)
    assert 0.93 < covered / 2000 < 0.965


def test_report_and_diagram(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = calibration_figures(MARGINS, torch.arange(4), 10)
    assert report["pairs"] == sum(b["pairs"] for b in report["reliability"]) == 4
    draw_reliability(report, tmp_path / "reliability.png")
    assert (tmp_path / "reliability.png").read_bytes().startswith(b"\x89PNG")
