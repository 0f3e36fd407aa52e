"""Draws the paper's analytic figures from the exact optimum.

    python -m step3_rlhf.paper.analytic_figures OUT_DIR

writes figure2.png, figure2_f_divergences.png, figure9.png, two_groups.png and figure_length.png.

The first three show two responses y_1 and y_2 to one prompt. The horizontal axis is the reward
model's preference p_reward(y_1) = σ(r_1 − r_2), the vertical axis the optimal policy's π*(y_1). A
policy that matches preferences lies on the diagonal. The fourth, which the paper does not have,
shows three responses on which two groups of people disagree; the last one is described in
length_figure.py.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from step3_rlhf.paper.length_figure import figure_length
from step3_rlhf.regularizers.base import Regularizer
from step3_rlhf.regularizers.optimum import optimum_of
from step3_rlhf.regularizers.registry import parse_regularizer
from step3_rlhf.rewards.mixture import mixture_reward
from training.cli import errors_end_cleanly
from training.plotting import (
    BLUE_TO_BROWN,
    IDEAL,
    PURPLE_TO_GREEN,
    new_figure,
    require_matplotlib,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REFERENCES = (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
"""p_ref(y_1), the reference's preference."""


BETAS = (0.1, 0.3, 0.5, 1.0, 2.0, 5.0)


DIVERGENCES = {
    "reverse_kl": "reverse KL",
    "forward_kl": "forward KL",
    "js_divergence": "Jensen–Shannon",
    "alpha_divergence": "α-divergence, α = 0.5",
    "chi_squared": "χ²",
    "total_variation": "total variation",
    "hellinger": "squared Hellinger",
}
"""Titles of the f-divergences' panels."""


TASTE = (0.89, 0.10, 0.01)
"""What one of two groups says, in shares; the other group says the reverse."""


def preference_grid(points: int) -> list[float]:
    """`points` preferences inside (0, 1), denser near 0 and 1, where the curves are steep."""
    return [0.5 - 0.5 * math.cos(math.pi * (i + 0.5) / points) for i in range(points)]


def aligned_preference(regularizer: Regularizer, p_reward: float, p_ref: float) -> float:
    """π*(y_1) on two responses with σ(r_1 − r_2) = `p_reward` and π_ref(y_1) = `p_ref`."""
    rewards = torch.tensor([p_reward, 1.0 - p_reward], dtype=torch.float64).log()
    ref_logp = torch.tensor([p_ref, 1.0 - p_ref], dtype=torch.float64).log()
    return optimum_of(regularizer, rewards, ref_logp)[0].exp().item()


def figure2() -> Figure:
    """Figure 2: the bias of KL RLHF for several references, β = 1, eq. (5.2)."""
    figure, axes = _one_panel("KL RLHF inherits its reference's bias")
    _draw_references(axes, parse_regularizer({"name": "kl"}), points=200)
    return _with_legend(figure, axes)


def figure2_f_divergences() -> Figure:
    """Figure 2 for every f-divergence, β = 1, and for preference matching, which has no bias."""
    figure = new_figure(13.5, 6.2)
    panels = list(figure.subplots(2, 4, sharex=True, sharey=True).flat)
    for axes, (name, title) in zip(panels, DIVERGENCES.items(), strict=False):
        config: dict[str, Any] = {"name": "f_divergence", "divergence": name}
        if name == "alpha_divergence":
            config["alpha"] = 0.5
        _prepare(axes, title)
        _draw_references(axes, parse_regularizer(config), points=80)
    _prepare(panels[-1], "preference matching")
    _draw_references(panels[-1], parse_regularizer({"name": "pm"}), points=80)
    return _with_legend(figure, panels[0])


def figure9() -> Figure:
    """Figure 9: the bias of β ≠ 1 with an unbiased reference, p_ref = 0.5 (section A.3)."""
    figure, axes = _one_panel("A small β exaggerates the majority")
    grid = preference_grid(200)
    _draw_ideal(axes)
    for beta, colour in zip(BETAS, PURPLE_TO_GREEN, strict=True):
        regularizer = parse_regularizer({"name": "kl", "beta": beta})
        curve = [aligned_preference(regularizer, p, 0.5) for p in grid]
        axes.plot(grid, curve, color=colour, linewidth=1.6, label=f"β = {beta:g}")
    return _with_legend(figure, axes)


def two_groups(share: float, taste: tuple[float, ...] = TASTE) -> dict[str, torch.Tensor]:
    """What preference matching (β = 1) ends at if the people are of two groups, by reward.

    Args:
        share: of the group that says `taste`; the other group says the reverse.

    Returns:
        [responses] float64 each: "first choices", the truth; "weighted sum" of the groups' rewards;
        "pooled comparisons", the BTL model of all comparisons; "mixture".
    """
    shares = torch.tensor([share, 1.0 - share], dtype=torch.float64)
    groups = torch.tensor([taste, taste[::-1]], dtype=torch.float64).T  # [responses, 2]
    rewards, flat = groups.log(), torch.zeros(len(taste), dtype=torch.float64)
    chosen = (rewards[:, None] - rewards[None]).sigmoid() @ shares  # [i, j] P(i preferred to j)
    sources = {
        "weighted sum": rewards @ shares,
        "pooled comparisons": btl_rewards(chosen),
        "mixture": mixture_reward(rewards, rewards.logsumexp(0), shares, 1.0),
    }
    pm = parse_regularizer({"name": "pm"})
    optima = {name: optimum_of(pm, reward, flat).exp() for name, reward in sources.items()}
    return {"first choices": groups @ shares, **optima}


def btl_rewards(preferences: torch.Tensor) -> torch.Tensor:
    """[K] rewards of the BTL model that is nearest to [K, K] probabilities of preference.

    Nearest by the log-likelihood of equally many comparisons of all pairs; by its fixed point,
    in which each response wins as often as the model says.
    """
    shares = torch.ones(len(preferences), dtype=torch.float64)
    won = preferences.fill_diagonal_(0.0).sum(-1)
    for _ in range(1000):
        met = 1 / (shares[:, None] + shares[None])
        shares = won / met.fill_diagonal_(0.0).sum(-1)
        shares = shares / shares.sum()
    return shares.log()


def two_groups_figure() -> Figure:
    """Two groups with opposite tastes, half of the people each, and in every other proportion."""
    figure = new_figure(11.0, 4.2)
    bars, curves = figure.subplots(1, 2, width_ratios=(1.5, 1.0))
    found = two_groups(0.5)
    colours = dict(zip(found, (IDEAL, *BLUE_TO_BROWN[:4:3], PURPLE_TO_GREEN[-1]), strict=False))
    width = 0.8 / len(found)
    for number, (name, shares) in enumerate(found.items()):
        places = [response + (number - 1.5) * width for response in range(len(shares))]
        drawn = bars.bar(places, shares.tolist(), width, color=colours[name], label=name)
        bars.bar_label(drawn, fmt="%.2f", fontsize=8, padding=2)
    labels = [f"{a:.2f} and {b:.2f}" for a, b in zip(TASTE, TASTE[::-1], strict=True)]
    bars.set_xticks(range(len(TASTE)), labels)
    bars.set(
        ylim=(0, 0.55), ylabel="share", xlabel="what one half of the people say, and the other"
    )
    bars.set_title("Half and half", fontsize=11)
    style_axes(bars)
    grid = [i / 60 for i in range(1, 60)]
    table = [two_groups(share) for share in grid]
    for name in found:
        curve = [0.5 * (row[name] - row["first choices"]).abs().sum().item() for row in table]
        curves.plot(grid, curve, color=colours[name], linewidth=1.8)
    curves.set(xlabel="share of the first group", ylabel="total variation from first choices")
    curves.set(xlim=(0, 1), ylim=(-0.01, None))
    curves.set_title("In every proportion", fontsize=11)
    style_axes(curves)
    return _with_legend(figure, bars)


def _one_panel(title: str) -> tuple[Figure, Axes]:
    figure = new_figure(6.5, 4.4)
    axes = figure.subplots()
    _prepare(axes, title)
    return figure, axes


def _prepare(axes: Axes, title: str) -> None:
    axes.set(xlim=(0, 1), ylim=(-0.01, 1.01), aspect="equal")
    axes.set_xlabel("reward model's $p_{\\mathrm{reward}}(y_1)$")
    axes.set_ylabel("optimal policy's $\\pi^*(y_1)$")
    axes.label_outer()
    axes.set_title(title, fontsize=11)
    style_axes(axes)


def _draw_references(axes: Axes, regularizer: Regularizer, points: int) -> None:
    grid = preference_grid(points)
    _draw_ideal(axes)
    for p_ref, colour in zip(REFERENCES, BLUE_TO_BROWN, strict=True):
        curve = [aligned_preference(regularizer, p, p_ref) for p in grid]
        label = f"$p_{{\\mathrm{{ref}}}}(y_1)$ = {p_ref:g}"
        axes.plot(grid, curve, color=colour, linewidth=1.6, label=label)


def _draw_ideal(axes: Axes) -> None:
    ends = [0.0, 1.0]
    axes.plot(
        ends, ends, label="desired alignment", color=IDEAL, linewidth=3.0, alpha=0.45, zorder=1
    )


def _with_legend(figure: Figure, axes: Axes) -> Figure:
    """`figure` with the legend of one of its panels beside them all."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    return figure


FIGURES = {
    "figure2": figure2,
    "figure2_f_divergences": figure2_f_divergences,
    "figure9": figure9,
    "two_groups": two_groups_figure,
    "figure_length": figure_length,
}
"""What the command draws, by the name of the file."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m step3_rlhf.paper.analytic_figures",
        description="Draw the paper's analytic figures (2, 2 for f-divergences, and 9) as PNGs, "
        "and what two groups of people with opposite tastes, and the length of answers, lead to.",
    )
    parser.add_argument("directory", type=Path, help="where the figures go")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    options = parser.parse_args(arguments)
    with errors_end_cleanly(options.debug):
        require_matplotlib()
        options.directory.mkdir(parents=True, exist_ok=True)
        for name, draw in FIGURES.items():
            path = options.directory / f"{name}.png"
            draw().savefig(path, dpi=150)
            print(path)


if __name__ == "__main__":
    main()
