"""The temperature at which the reward model is calibrated, as `scripts/calibrate.sh` found it."""

from dataclasses import dataclass
from typing import Any

from training.plotting import ReliabilityBin


@dataclass(frozen=True)
class Calibration:
    """β with its 95 % interval, and what the reward model's figures are with its rewards over β.

    Each half of the groups of comparisons is measured at the β of the other half.
    """

    beta: float
    low: float | None
    high: float | None
    clusters: int
    """Number of groups of comparisons; with a single one there is no interval."""
    log_loss: float
    ece: float
    reliability: list[ReliabilityBin]


def calibration_of(content: dict[str, Any]) -> Calibration:
    """What a calibration.json says."""
    beta, after = content["beta"], content["after"]
    return Calibration(
        beta["mean"],
        beta["low"],
        beta["high"],
        beta["clusters"],
        after["log_loss"],
        after["ece"],
        after["reliability"],
    )
