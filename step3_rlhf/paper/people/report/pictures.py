"""The report's pictures: bars for a panel of questions, and minorities against majorities."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from step3_rlhf.paper.bars import abbreviated, draw_bars, draw_legend
from step3_rlhf.paper.people.boards import Board
from step3_rlhf.paper.people.measure import minority_share, top_share
from step3_rlhf.paper.people.report.findings import GROUPS, Run
from step3_rlhf.paper.people.report.word_list import fit_to_show
from training.plotting import KL, MUTED, PM, POPULATION, REFERENCE, REWARD, new_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = 12
"""Questions that the panel shows."""

DISTRIBUTIONS = {
    "people": ("People", POPULATION),
    "reward": ("Reward model", REWARD),
    "sft": ("SFT", REFERENCE),
    "kl": ("KL", KL),
    "conditional_pm": ("Conditional PM", PM),
}
"""Name and colour of what the bars compare."""

COLUMNS, WIDTH = 3, 12.6

ANSWER, HEAD = 0.36, 0.95
"""Inches: the height of an answer's five bars; of a question with its ticks."""


def panel(boards: Sequence[Board]) -> list[Board]:
    """The questions that are shown: the first twelve, in an order drawn at random before anything
    was trained, whose words and answers are not on the word list."""
    fit = [board for board in boards if fit_to_show(board.prompt, *board.answers)]
    return fit[:PANEL]


def draw_panel(runs: dict[str, Run], shown: Sequence[Board]) -> "Figure":
    """A group of bars for each answer, a bar for each distribution; policies in their first seed's
    mean over seeds."""
    rows = [shown[first : first + COLUMNS] for first in range(0, len(shown), COLUMNS)]
    heights = [HEAD + ANSWER * max(len(board.answers) for board in row) for row in rows]
    figure = new_figure(WIDTH, sum(heights) + 0.5)
    grid = figure.subplots(len(rows), COLUMNS, squeeze=False, height_ratios=heights)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    for axes, board in zip(grid.flat, shown, strict=False):
        draw_question(axes, board, shares_of(runs, board))
    draw_legend(figure, DISTRIBUTIONS, "outside upper center")
    return figure


def shares_of(runs: dict[str, Run], board: Board) -> dict[str, list[float]]:
    """Each distribution over the board's answers; those of policies are means over seeds."""
    found = {"people": board.people.tolist(), "reward": board.reward.tolist()}
    for name, run in runs.items():
        same = [
            other.policy
            for boards in run.boards.values()
            for other in boards
            if (other.group, other.id) == (board.group, board.id)
        ]
        found[name] = torch.stack(same).mean(0).tolist()
    return found


def draw_question(axes: "Axes", board: Board, shares: dict[str, list[float]]) -> None:
    """The panel of one question."""
    question = textwrap.fill(board.question, 44)
    axes.set_title(question, fontsize=9.5, fontweight="bold", loc="left", pad=4)
    labels = [abbreviated(answer, 18) for answer in board.answers]
    axes.set_yticks(range(len(labels)), labels, fontsize=8.5)
    limit = 1.04 * max(max(values) for values in shares.values())
    draw_bars(axes, shares, DISTRIBUTIONS, limit)


def draw_minorities(runs: dict[str, Run]) -> "Figure":
    """What the policies give minorities' answers and the majority's, against the reward model.

    One dot is one question; on the diagonal a policy matches the reward model.
    """
    figure = new_figure(10.4, 9.6)
    grid = figure.subplots(2, len(GROUPS), squeeze=False)
    for column, (group, title) in enumerate(GROUPS.items()):
        for row, what in enumerate(("minorities'", "majority's")):
            axes = grid[row, column]
            share = minority_share if row == 0 else top_share
            for name in ("kl", "conditional_pm"):
                boards = [board for seed in runs[name].of(group) for board in seed]
                points = [
                    (share(board.reward, board.people), share(board.policy, board.people))
                    for board in boards
                    if share(board.people, board.people) is not None
                ]
                label, colour = DISTRIBUTIONS[name]
                axes.scatter(
                    [x for x, _ in points],
                    [y for _, y in points],
                    s=16,
                    color=colour,
                    alpha=0.65,
                    linewidth=0,
                    label=label,
                )
            axes.plot([0, 1], [0, 1], color=MUTED, linestyle="--", linewidth=1)
            axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", title=title if row == 0 else None)
            axes.set_xlabel(f"share of the {what} answers under the reward model")
            axes.set_ylabel("under the policy" if column == 0 else None)
            style_axes(axes)
            axes.legend(loc="upper left", frameon=False, fontsize=9)
    return figure
