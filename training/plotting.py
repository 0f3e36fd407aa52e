"""One style for every figure: colours, axes, and the reliability diagram.

matplotlib is an optional extra, so it is imported only inside functions, and figures are drawn
without pyplot: no display, no global state.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypedDict

from training.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POPULATION, REWARD, REFERENCE, KL, PM = "#222222", "#5FB3E8", "#F0BE3C", "#C8501E", "#0B7A5B"
"""The colour of each distribution wherever it is drawn. Readers with any kind of colour blindness
can tell the five apart."""


REWARD_LINE = "#1F6FB2"
"""A darker `REWARD`, for lines on white."""


IDEAL = "#D62728"
"""The line on which a policy matches preferences exactly."""


MUTED, BACKDROP = "#666666", "#DDE1E7"
"""For secondary labels and lines, and for bars behind the curves of a figure."""


BLUE_TO_BROWN = ("#08306b", "#2171b5", "#6baed6", "#4d4d4d", "#fdae6b", "#e6550d", "#7f2704")
"""Seven curves on either side of a neutral one in the middle."""


PURPLE_TO_GREEN = ("#3f007d", "#6a51a3", "#9e9ac8", "#4d4d4d", "#74c476", "#006d2c")
"""Six curves, the fourth of which is the neutral one."""


COLOURED_LINES = (("#0B3C5D", "-"), (PM, "--"), ("#56B4E9", "-."), ("#8F5FB0", ":"))
"""Colour and line style of several curves, which stay distinct in black and white."""


class ReliabilityBin(TypedDict):
    """The pairs whose predicted probability for the preferred response is in [low, high)."""

    low: float
    high: float
    pairs: int
    confidence: float
    """Mean predicted probability of the response that the model prefers."""
    accuracy: float
    """Fraction of pairs in which that response was chosen."""


def require_matplotlib() -> None:
    """Check that figures can be drawn.

    Raises:
        UserError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("The figures need matplotlib: pip install -e '.[plots]'")


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure of so many inches, whose panels share the space without overlaps."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def style_axes(axes: Axes, grid: Literal["x", "y", "both"] = "both") -> None:
    """Give `axes` the house style: a faint grid behind the data, no lines at the top and right.

    Args:
        grid: the axis whose values the grid marks.
    """
    axes.grid(axis=grid, color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def reliability_diagram(bins: Sequence[ReliabilityBin], ece: float) -> Figure:
    """How often the reward model's preferred response was chosen, by predicted probability.

    Bars behind the curve show each bin's share of the pairs.

    Args:
        bins: the non-empty bins in rising order.
        ece: the expected calibration error, for the legend.
    """
    pairs = sum(b["pairs"] for b in bins)
    figure = new_figure(5.0, 4.0)
    axes = figure.subplots()
    axes.bar(
        [b["low"] for b in bins],
        [b["pairs"] / pairs for b in bins],
        width=[b["high"] - b["low"] for b in bins],
        align="edge",
        color=BACKDROP,
        edgecolor="white",
        label="share of the pairs",
    )
    axes.plot([0.5, 1], [0.5, 1], color=MUTED, linestyle="--", label="perfectly calibrated")
    axes.plot(
        [b["confidence"] for b in bins],
        [b["accuracy"] for b in bins],
        marker="o",
        color=REWARD_LINE,
        label=f"reward model (ECE {ece:.3f})",
    )
    axes.set(xlabel="predicted probability of the preferred response")
    axes.set(ylabel="how often it was chosen", xlim=(0.5, 1), ylim=(0, 1))
    style_axes(axes)
    axes.legend(loc="upper left", fontsize=9, frameon=False)
    return figure
