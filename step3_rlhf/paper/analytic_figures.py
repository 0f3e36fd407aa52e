"""The paper's analytic figures, drawn from the exact optimum.

    python -m step3_rlhf.paper.analytic_figures OUT_DIR

writes figure2.png, figure2_f_divergences.png and figure9.png.

All of them plot two responses y_1 and y_2 to one prompt: on the horizontal axis the reward model's
preference p_reward(y_1) = σ(r_1 − r_2), on the vertical one the optimal policy's π*(y_1). A policy
that matches preferences lies on the diagonal.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from step3_rlhf.regularizers.base import Regularizer
from step3_rlhf.regularizers.optimum import optimum_of
from step3_rlhf.regularizers.registry import parse_regularizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


REFERENCES = (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
"""p_ref(y_1), the reference's preference."""


REFERENCE_COLOURS = ("#08306b", "#2171b5", "#6baed6", "#4d4d4d", "#fdae6b", "#e6550d", "#7f2704")


BETAS = (0.1, 0.3, 0.5, 1.0, 2.0, 5.0)


BETA_COLOURS = ("#3f007d", "#6a51a3", "#9e9ac8", "#4d4d4d", "#74c476", "#006d2c")


DESIRED = {"color": "#d62728", "linewidth": 3.0, "alpha": 0.45, "zorder": 1}


def preference_grid(points: int) -> list[float]:
    """`points` preferences inside (0, 1), denser where the curves are steep, at its ends."""
    return [0.5 - 0.5 * math.cos(math.pi * (i + 0.5) / points) for i in range(points)]


def aligned_preference(regularizer: Regularizer, p_reward: float, p_ref: float) -> float:
    """π*(y_1) on two responses with σ(r_1 − r_2) = `p_reward` and π_ref(y_1) = `p_ref`."""
    rewards = torch.tensor([p_reward, 1.0 - p_reward], dtype=torch.float64).log()
    ref_logp = torch.tensor([p_ref, 1.0 - p_ref], dtype=torch.float64).log()
    return optimum_of(regularizer, rewards, ref_logp)[0].exp().item()


def figure2(path: str | Path) -> None:
    """Figure 2: the bias of KL RLHF for several references, β = 1, eq. (5.2)."""
    figure, (axes,) = _panels(1, 1)
    _draw_references(axes, parse_regularizer({"name": "kl"}), points=200)
    axes.set_title("KL RLHF inherits its reference's bias", fontsize=11)
    _finish(figure, path, legend_of=axes)


def figure2_f_divergences(path: str | Path) -> None:
    """Figure 2 for every f-divergence, β = 1, and for preference matching, which has no bias."""
    titles = {
        "reverse_kl": "reverse KL",
        "forward_kl": "forward KL",
        "js_divergence": "Jensen–Shannon",
        "alpha_divergence": "α-divergence, α = 0.5",
        "chi_squared": "χ²",
        "total_variation": "total variation",
        "hellinger": "squared Hellinger",
    }
    figure, panels = _panels(2, 4)
    for axes, (name, title) in zip(panels, titles.items(), strict=False):
        config = {"name": "f_divergence", "divergence": name}
        if name == "alpha_divergence":
            config["alpha"] = 0.5
        _draw_references(axes, parse_regularizer(config), points=80)
        axes.set_title(title, fontsize=11)
    _draw_references(panels[-1], parse_regularizer({"name": "pm"}), points=80)
    panels[-1].set_title("preference matching", fontsize=11)
    _finish(figure, path, legend_of=panels[0])


def figure9(path: str | Path) -> None:
    """Figure 9: the bias of β ≠ 1 with an unbiased reference, p_ref = 0.5 (section A.3)."""
    figure, (axes,) = _panels(1, 1)
    grid = preference_grid(200)
    _draw_desired(axes)
    for beta, colour in zip(BETAS, BETA_COLOURS, strict=True):
        regularizer = parse_regularizer({"name": "kl", "beta": beta})
        curve = [aligned_preference(regularizer, p, 0.5) for p in grid]
        axes.plot(grid, curve, color=colour, linewidth=1.6, label=f"β = {beta:g}")
    axes.set_title("A small β exaggerates the majority", fontsize=11)
    _finish(figure, path, legend_of=axes)


def _draw_references(axes: Axes, regularizer: Regularizer, points: int) -> None:
    grid = preference_grid(points)
    _draw_desired(axes)
    for p_ref, colour in zip(REFERENCES, REFERENCE_COLOURS, strict=True):
        curve = [aligned_preference(regularizer, p, p_ref) for p in grid]
        label = f"$p_{{\\mathrm{{ref}}}}(y_1)$ = {p_ref:g}"
        axes.plot(grid, curve, color=colour, linewidth=1.6, label=label)


def _draw_desired(axes: Axes) -> None:
    axes.plot([0.0, 1.0], [0.0, 1.0], label="desired alignment", **DESIRED)


def _panels(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    # A figure of its own, not pyplot's: no display, no global state.
    from matplotlib.figure import Figure

    width = 2.9 * columns if rows > 1 else 4.6
    figure = Figure(figsize=(width + 1.9, 3.1 * rows if rows > 1 else 4.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat:
        axes.set(xlim=(0, 1), ylim=(-0.01, 1.01), aspect="equal")
        axes.grid(color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("reward model's $p_{\\mathrm{reward}}(y_1)$")
        axes.set_ylabel("optimal policy's $\\pi^*(y_1)$")
        axes.label_outer()
    return figure, list(grid.flat)


def _finish(figure: Figure, path: str | Path, legend_of: Axes) -> None:
    handles, labels = legend_of.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The paper's analytic figures, as PNGs.")
    parser.add_argument("directory", type=Path, help="where the figures go")
    directory: Path = parser.parse_args(arguments).directory
    directory.mkdir(parents=True, exist_ok=True)
    for draw in (figure2, figure2_f_divergences, figure9):
        draw(directory / f"{draw.__name__}.png")
        print(directory / f"{draw.__name__}.png")


if __name__ == "__main__":
    main()
