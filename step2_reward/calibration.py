"""Agreement between a reward model's probabilities and the choices that people made.

Preference matching reproduces the reward model's probabilities, so a miscalibrated reward model is
a wrong target. All functions take the log-odds m of the recorded choices: log g(r_w) − log g(r_l)
under the link g, which is r(x, y_w) − r(x, y_l) for e^r.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid

from training.plotting import reliability_diagram
from training.statistics import mean_ci95


@dataclass(frozen=True)
class Bin:
    """The pairs whose confidence lies in [low, high), or is 1 in the last bin."""

    low: float
    high: float
    pairs: int
    confidence: float
    """Mean predicted probability of the response that the model prefers."""
    accuracy: float
    """Fraction of pairs in which that response was chosen."""


def correct(margins: Tensor) -> Tensor:
    """1 for m > 0, one half for a tie (m = 0), 0 otherwise."""
    return (margins > 0).double() + 0.5 * (margins == 0).double()


def losses(margins: Tensor) -> Tensor:
    """−log σ(m) of each pair, in nats."""
    return -logsigmoid(margins.double())


def accuracy(margins: Tensor) -> float:
    """Fraction of pairs with m > 0; a tie (m = 0) counts one half."""
    return correct(margins).mean().item()


def log_loss(margins: Tensor) -> float:
    """Mean of −log σ(m), in nats."""
    return losses(margins).mean().item()


def reliability(margins: Tensor, bins: int) -> list[Bin]:
    """Sort pairs by confidence σ(|m|) into equally wide bins over [1/2, 1]; omit empty bins."""
    confidence = margins.double().abs().sigmoid()
    right = correct(margins)
    width = 0.5 / bins
    index = ((confidence - 0.5) / width).long().clamp(max=bins - 1)
    found = []
    for number in range(bins):
        inside = index == number
        if inside.any():
            low = 0.5 + number * width
            found.append(
                Bin(
                    low,
                    low + width,
                    int(inside.sum()),
                    confidence[inside].mean().item(),
                    right[inside].mean().item(),
                )
            )
    return found


def expected_calibration_error(bins: list[Bin]) -> float:
    """Σ_b (n_b / n) · |accuracy_b − confidence_b| (Guo et al., 2017).

    It has no interval: chance alone makes it positive, the more so the fewer pairs a bin has, and a
    bootstrap would add this bias once more. For a calibrated model the bootstrap is not even
    consistent, because |·| has a kink at 0.
    """
    pairs = sum(b.pairs for b in bins)
    return sum(b.pairs / pairs * abs(b.accuracy - b.confidence) for b in bins)


def calibration_figures(margins: Tensor, clusters: Tensor, bins: int) -> dict[str, Any]:
    """Compute accuracy and log-loss with their intervals, ECE, and the reliability diagram's bins.

    Args:
        margins: [pairs].
        clusters: [pairs] long, the number of the group that each pair belongs to, by default its
            prompt.
    """
    found = reliability(margins, bins)
    return {
        "pairs": len(margins),
        "clusters": len(clusters.unique()),
        "accuracy": accuracy(margins),
        "accuracy_ci95": mean_ci95(correct(margins), clusters),
        "log_loss": log_loss(margins),
        "log_loss_ci95": mean_ci95(losses(margins), clusters),
        "ece": expected_calibration_error(found),
        "reliability": [asdict(b) for b in found],
    }


def draw_reliability(report: dict[str, Any], path: Path) -> None:
    """Draw the reliability diagram into a PNG file."""
    reliability_diagram(report["reliability"], report["ece"]).savefig(path, dpi=150)
