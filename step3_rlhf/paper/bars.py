"""Bars of how often each answer is given: a group for each answer, a bar for each distribution."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from training.plotting import MUTED, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Distributions = Mapping[str, tuple[str, str]]
"""Name and colour of what the bars compare, in their order."""


def draw_bars(
    axes: "Axes", shares: Mapping[str, Sequence[float]], distributions: Distributions, limit: float
) -> None:
    """One panel; an answer's bars lie one below the other, in the order of the legend.

    Args:
        shares: for each distribution one share per answer.
        limit: the share at the right end of the axis.
    """
    thickness = 0.8 / len(distributions)
    for place, (name, (_, colour)) in enumerate(distributions.items()):
        offset = (place - (len(distributions) - 1) / 2) * thickness
        rows = [number + offset for number in range(len(shares[name]))]
        axes.barh(rows, shares[name], height=0.92 * thickness, color=colour, zorder=2)
    answers = max(map(len, shares.values()))
    axes.set(xlim=(0, limit), ylim=(answers - 0.5, -0.5))
    ticks = [tick / 5 for tick in range(6) if tick / 5 <= limit]
    axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks], fontsize=8, color=MUTED)
    axes.tick_params(length=0)
    style_axes(axes, grid="x")
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set_color("0.7")


def draw_legend(figure: "Figure", distributions: Distributions, place: str) -> None:
    """The legend of all panels, in one row."""
    from matplotlib.patches import Patch

    figure.legend(
        handles=[Patch(color=colour, label=name) for name, colour in distributions.values()],
        loc=place,
        ncols=len(distributions),
        frameon=False,
        fontsize=12,
        handlelength=1.2,
    )


def abbreviated(answer: str, width: int = 22, lines: int = 2) -> str:
    """The answer in at most `lines` lines of `width` characters."""
    return "\n".join(textwrap.wrap(answer, width, max_lines=lines, placeholder=" …"))
