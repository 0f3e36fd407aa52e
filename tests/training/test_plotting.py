"""The reliability diagram shows the bins that it is given, in the house style."""

import subprocess
import sys

import pytest

from training.plotting import MUTED, REWARD_LINE, ReliabilityBin, reliability_diagram, style_axes

pytest.importorskip("matplotlib")

BINS: list[ReliabilityBin] = [
    {"low": 0.5, "high": 0.6, "pairs": 3, "confidence": 0.55, "accuracy": 0.5},
    {"low": 0.8, "high": 0.9, "pairs": 1, "confidence": 0.85, "accuracy": 1.0},
]


def test_the_reliability_diagram_shows_the_bins() -> None:
    (axes,) = reliability_diagram(BINS, ece=0.0625).axes
    bars = [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in axes.patches]
    assert bars == [pytest.approx((0.5, 0.1, 0.75)), pytest.approx((0.8, 0.1, 0.25))]
    ideal, measured = axes.lines
    assert (list(ideal.get_xdata()), list(ideal.get_ydata())) == ([0.5, 1], [0.5, 1])
    assert (list(measured.get_xdata()), list(measured.get_ydata())) == ([0.55, 0.85], [0.5, 1.0])
    assert (ideal.get_color(), measured.get_color()) == (MUTED, REWARD_LINE)
    assert "reward model (ECE 0.062)" in [text.get_text() for text in axes.get_legend().texts]


@pytest.mark.parametrize(("grid", "marked"), [("x", (True, False)), ("both", (True, True))])
def test_the_house_style(grid: str, marked: tuple[bool, bool]) -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    style_axes(axes, grid)
    visible = tuple(axis.get_gridlines()[0].get_visible() for axis in (axes.xaxis, axes.yaxis))
    assert visible == marked
    hidden = {side for side, spine in axes.spines.items() if not spine.get_visible()}
    assert hidden == {"top", "right"}
    assert axes.get_axisbelow() is True


def test_neither_importing_nor_drawing_needs_pyplot() -> None:
    """Importing the module loads no matplotlib; drawing changes no global state."""
    program = (
        "import sys, training.plotting as plotting\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"plotting.reliability_diagram({BINS!r}, 0.1)\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
