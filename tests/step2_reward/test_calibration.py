"""Accuracy, log-loss and calibration error by hand."""

import math
from pathlib import Path

import pytest
import torch

from step2_reward.calibration import (
    accuracy,
    calibration_report,
    draw_reliability,
    expected_calibration_error,
    log_loss,
    reliability,
)

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
    chosen, other = [NINE_TO_ONE] * 9, [-NINE_TO_ONE]
    assert calibration_report(torch.tensor(chosen + other), 10)["ece"] == pytest.approx(0, abs=1e-6)
    overconfident = torch.tensor([20.0] * 9 + [-20.0])
    assert calibration_report(overconfident, 10)["ece"] == pytest.approx(0.1, abs=1e-6)


def test_certainty_falls_into_the_last_bin() -> None:
    (only,) = reliability(torch.tensor([1000.0, -1000.0]), bins=10)
    assert (only.low, only.pairs, only.accuracy) == (pytest.approx(0.95), 2, 0.5)


def test_log_loss_of_a_wrong_certainty_is_finite() -> None:
    assert log_loss(torch.tensor([-1000.0])) == pytest.approx(1000.0)


def test_report_and_diagram(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = calibration_report(MARGINS, 10)
    assert report["pairs"] == sum(b["pairs"] for b in report["reliability"]) == 4
    draw_reliability(report, tmp_path / "reliability.png")
    assert (tmp_path / "reliability.png").read_bytes().startswith(b"\x89PNG")
