"""How the cost of an iteration grows with the number of responses and with their length."""

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from step3_rlhf.benchmark.shapes import Shape
from training.plotting import IDEAL, REWARD_LINE, new_figure, style_axes

FACTORS = (0.25, 0.5, 1.0, 2.0)
"""Of a shape: 8 times as much at the end as at the start."""


def scaled(shape: Shape, factor: float) -> dict[str, Shape]:
    """The shape with more responses, and with longer prompts and responses."""
    return {
        "responses": replace(shape, batch=round(factor * shape.batch)),
        "tokens per response": replace(
            shape,
            prompt=round(factor * shape.prompt),
            response=round(factor * shape.response),
        ),
    }


def measure_scaling(shape: Shape, seconds: Callable[[Shape], float]) -> dict[str, Any]:
    """Measure an iteration at every factor.

    Args:
        seconds: per iteration of a shape; a shape that occurs twice is measured once.

    Returns:
        For each of what grows: how much of it, the seconds, and the exponent of `power_law`.
    """
    known: dict[Shape, float] = {}
    found: dict[str, Any] = {}
    for what in scaled(shape, 1.0):
        shapes = [scaled(shape, factor)[what] for factor in FACTORS]
        for each in shapes:
            known[each] = known[each] if each in known else seconds(each)
        amounts = [s.batch if what == "responses" else s.prompt + s.response for s in shapes]
        times = [known[each] for each in shapes]
        found[what] = {
            "amounts": amounts,
            "seconds": times,
            "exponent": power_law(amounts, times),
        }
    return found


def power_law(amounts: list[int], seconds: list[float]) -> float:
    """The exponent k of seconds ∝ amount^k, by least squares of the logarithms; 1 is linear."""
    logs = [math.log(amount) for amount in amounts]
    return statistics.linear_regression(logs, [math.log(s) for s in seconds]).slope


def draw_scaling(found: dict[str, Any], path: Path) -> None:
    """Draw one panel for each of what grows, with the straight line that fits best."""
    figure = new_figure(8.0, 3.4)
    panels = figure.subplots(1, len(found))
    for axes, (what, measured) in zip(panels, found.items(), strict=True):
        amounts, seconds = measured["amounts"], measured["seconds"]
        line = statistics.linear_regression(amounts, seconds)
        ends = [0, amounts[-1]]
        axes.plot(
            ends,
            [line.intercept + line.slope * amount for amount in ends],
            color=IDEAL,
            linestyle="--",
            label="straight line",
        )
        axes.plot(amounts, seconds, "o", color=REWARD_LINE, label="measured")
        axes.set(xlabel=what, ylabel="seconds per iteration", xticks=amounts)
        axes.set(xlim=(0, 1.05 * amounts[-1]), ylim=(0, 1.1 * max(seconds)))
        axes.set_title(f"seconds grow as amount^{measured['exponent']:.2f}", fontsize=10)
        style_axes(axes)
        axes.legend(loc="upper left", fontsize=9, frameon=False)
    figure.savefig(path, dpi=150)


def scaling_text(found: dict[str, Any]) -> str:
    """One line for each of what grows."""
    return "\n".join(
        f"{what} {' / '.join(map(str, measured['amounts']))}: "
        f"{' / '.join(f'{s:.3g}' for s in measured['seconds'])} s per iteration, "
        f"amount^{measured['exponent']:.2f}"
        for what, measured in found.items()
    )
