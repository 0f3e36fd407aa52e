"""Figures 1 and 3 to 8 of the paper from sweeps, as PNG and PDF.

Figures 3, 5 and 6 show Llama-2-7B, Figures 4, 7 and 8 the same for OPT-1.3B: a sweep's are named
by the numbers of its model (paper_models.py). Figure 1 shows both models: a sweep's own is one of
its panels, and several sweeps have one together.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from step3_rlhf.paper.grid.cells import Cell
from step3_rlhf.paper.grid.paper_models import PAPER_MODELS, PaperModel
from step3_rlhf.paper.grid.results import (
    HELD_OUT,
    OWN,
    Results,
    best_alpha,
    cell_label,
    sigmoid,
    threshold_name,
)
from training import plotting
from training.statistics import Estimate

PROBABILITY_BINS = [i / 20 for i in range(21)]


DIVERGENCE_BINS = 16


SHOWN_QUANTILE = 0.99
"""The largest instance divergences are left out of sight, or they would squeeze all others."""


class MissingCellsError(Exception):
    """A figure cannot be drawn; the message says what it needs."""


@dataclass(frozen=True)
class Kind:
    """One of the paper's figures, whatever its number."""

    shows: str
    """As in `PaperModel.figures`."""
    draw: Callable[[Results], Figure]
    caption: str
    """With places for the model's name and the β of what has one only."""

    def number(self, shown: PaperModel) -> int:
        return shown.figures[self.shows]

    def name(self, shown: PaperModel) -> str:
        """Its files', without their suffix."""
        return f"figure{self.number(shown)}_{self.shows}"

    def caption_of(self, results: Results) -> str:
        """Which begins with its number."""
        text = self.caption.format(model=results.model, beta=f"{results.grid.main_beta:g}")
        return f"Figure {self.number(results.paper_model)}: {text}"


def draw_figures(results: Results, directory: Path) -> tuple[list[Path], dict[str, str]]:
    """Write every figure whose cells are finished; earlier files of the others go.

    Returns:
        The files, and why the others were left out.
    """
    for shown in PAPER_MODELS.values():
        for kind in FIGURES:
            remove(directory / kind.name(shown))
    drawn: list[Path] = []
    left_out: dict[str, str] = {}
    for kind in FIGURES:
        name = kind.name(results.paper_model)
        try:
            drawn += save(kind.draw(results), directory / name)
        except MissingCellsError as error:
            left_out[name] = str(error)
    return drawn, left_out


def draw_joint(sweeps: Sequence[Results], directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The same of the Figure 1 that several sweeps have together."""
    remove(directory / JOINT)
    try:
        figure = joint_perplexity(sweeps)
    except MissingCellsError as error:
        return [], {JOINT: str(error)}
    directory.mkdir(parents=True, exist_ok=True)
    return save(figure, directory / JOINT), {}


def save(figure: Figure, stem: Path) -> list[Path]:
    for path in files(stem):
        figure.savefig(path, dpi=150, facecolor="white")
    return files(stem)


def remove(stem: Path) -> None:
    for path in files(stem):
        path.unlink(missing_ok=True)


def files(stem: Path) -> list[Path]:
    return [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "pdf")]


def perplexity(results: Results) -> Figure:
    """A panel of Figure 1: perplexity of PM and KL RLHF."""
    figure = plotting.new_figure(4.2, 3.8)
    axes = figure.subplots()
    draw_perplexity(axes, results)
    titled(axes, f"β = {results.grid.main_beta:g}")
    return figure


def joint_perplexity(sweeps: Sequence[Results]) -> Figure:
    """Figure 1: a panel for each model, with its own scale."""
    figure = Figure(figsize=(4.0 * len(sweeps) + 0.2, 3.8), layout="constrained")
    panels = figure.subplots(1, len(sweeps), squeeze=False)[0]
    for place, (axes, results) in enumerate(zip(panels, sweeps, strict=True)):
        try:
            draw_perplexity(axes, results)
        except MissingCellsError as error:
            raise MissingCellsError(f"{results.model}: {error}") from None
        name = results.model.replace("$", "\\$")  # which would begin a formula
        titled(axes, f"({letter(place)}) {name}\nβ = {results.grid.main_beta:g}")
        axes.set_ylabel(PERPLEXITY_LABEL if place == 0 else "")
    return figure


def draw_bar(axes: Axes, place: float, value: Estimate, colour: str, opacity: float) -> None:
    """A mean with its interval and its number."""
    axes.bar(place, value.mean, width=0.36, color=colour, alpha=opacity, zorder=2)
    low, high = value.low or value.mean, value.high or value.mean
    error = [[value.mean - low], [high - value.mean]]
    axes.errorbar(place, value.mean, yerr=error, color="black", capsize=4, zorder=3)
    axes.annotate(
        f"{value.mean:.2f}", (place, high), xytext=(0, 5), textcoords="offset points", ha="center"
    )


def draw_perplexity(axes: Axes, results: Results) -> None:
    cells = {results.grid.pm: plotting.PM, Cell("kl", results.grid.main_beta): plotting.KL}
    require(results, list(cells))
    if any(HELD_OUT not in results.measured[cell].estimates for cell in cells):
        raise MissingCellsError("no perplexity of held-out texts was measured")
    means = []
    for place, (cell, colour) in enumerate(cells.items()):
        estimates = results.measured[cell].estimates
        for shift, metric, opacity in ((-0.2, HELD_OUT, 1.0), (0.2, OWN, 0.35)):
            if (value := estimates.get(metric)) is not None:
                draw_bar(axes, place + shift, value, colour, opacity)
                means.append(value.mean)
    axes.margins(y=0.15)
    if max(means) > 20 * min(means):
        axes.set_yscale("log")
        axes.set_ylim(bottom=1)  # no perplexity is lower
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(range(len(cells)), [cell_label(cell) for cell in cells])
    axes.set(xlim=(-0.6, 1.6), ylabel=PERPLEXITY_LABEL)


def output_probabilities(results: Results) -> Figure:
    """Figures 3 and 4: what reference and reward model make of the same pairs of responses."""
    beta = results.grid.main_beta
    require(results, [results.grid.reference])
    pairs = results.measured[results.grid.reference].pairs()
    if not pairs:
        raise MissingCellsError("the reference gave the same response twice to every prompt")
    figure = plotting.new_figure(8.4, 3.8)
    panels = figure.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.08})
    reference = [sigmoid(pair.reference) for pair in pairs]
    reward = [sigmoid(pair.reward / beta) for pair in pairs]
    sides = (
        ("(a) reference model", "ref", plotting.REFERENCE, reference),
        (f"(b) reward model, β = {beta:g}", "reward", plotting.REWARD_LINE, reward),
    )
    for axes, (title, model, colour, probabilities) in zip(panels, sides, strict=True):
        axes.hist(
            probabilities,
            bins=PROBABILITY_BINS,
            weights=[1 / len(pairs)] * len(pairs),
            color=colour,
            edgecolor="white",
            linewidth=0.5,
            zorder=2,
        )
        axes.set(xlim=(0, 1), xlabel=f"$p_{{\\mathrm{{{model}}}}}(y_1 \\mid y_1, y_2, x)$")
        titled(axes, title)
    panels[0].set_ylabel(f"share of the {len(pairs)} pairs with $y_1 \\neq y_2$")
    return figure


def divergence_by_alpha(results: Results) -> Figure:
    """Figures 5 and 7: PM divergence against α, and its distribution for the best α and KL."""
    betas = results.grid.betas
    require_any(results)
    figure = Figure(figsize=(3.6 * len(betas) + 0.8, 6.8), layout="constrained")
    means, distributions = figure.subplots(2, len(betas), squeeze=False)
    for place, beta in enumerate(betas):
        draw_means(means[place], results, beta)
        titled(means[place], f"({letter(place)}) β = {beta:g}")
        cumulated = draw_distribution(distributions[place], results, beta)
        titled(distributions[place], f"({letter(place + len(betas))}) β = {beta:g}")
    means[0].set_ylabel("PM divergence (nats)")
    distributions[0].set_ylabel("bars: share of prompts in the bin")
    cumulated.set_ylabel("lines: share of prompts up to here")
    return figure


def draw_means(axes: Axes, results: Results, beta: float) -> None:
    """One panel, on its own scale: another β is another target."""
    row = results.grid.row(beta)
    highest = 0.0
    found = []
    for place, cell in enumerate(row):
        measured = results.get(cell)
        if measured is None:
            axes.text(place, 0.5, "missing", transform=axes.get_xaxis_transform(), **MISSING_LABEL)
            continue
        value = measured.estimate("pm_divergence")
        error = value.ci95 or 0.0
        colour = plotting.KL if cell.kind == "kl" else plotting.PM
        axes.errorbar(place, value.mean, yerr=error, fmt="o", color=colour, capsize=4, zorder=3)
        highest = max(highest, value.mean + error)
        found.append((place, value.mean))
    axes.plot(*zip(*found, strict=True) if found else ([], []), color="0.6", zorder=1)
    labels = [f"{cell.alpha:g}" if cell.alpha is not None else "KL" for cell in row]
    axes.set_xticks(range(len(row)), labels)
    axes.set(
        xlim=(-0.4, len(row) - 0.6),
        ylim=(0, 1.1 * highest or 1),
        xlabel=f"{threshold_name(row[0])}  (KL is α = 1)",
    )


def draw_distribution(axes: Axes, results: Results, beta: float) -> Axes:
    """Histogram (bars) and CDF (lines) of the instance PM divergence, best α against KL.

    Returns:
        The lines' axes, with their own scale on the right.
    """
    colours = {best_alpha(results, beta): plotting.PM, Cell("kl", beta): plotting.KL}
    cells = {cell: colour for cell, colour in colours.items() if cell in results.measured}
    limit = shown_limit(results, list(cells))
    lines = axes.twinx()
    lines.set_ylim(0, 1.02)
    lines.spines["top"].set_visible(False)
    values = [results.measured[cell].divergences for cell in cells]
    if values:
        axes.hist(
            values,
            bins=[limit * i / DIVERGENCE_BINS for i in range(DIVERGENCE_BINS + 1)],
            weights=[[1 / len(column)] * len(column) for column in values],
            color=list(cells.values()),
            alpha=0.45,
            zorder=2,
        )
    for (cell, colour), column in zip(cells.items(), values, strict=True):
        lines.plot(*cdf(column, limit), color=colour, linewidth=1.8, label=cell_label(cell))
    finish_distribution(axes, limit, lines if cells else None)
    return lines


def cumulative(results: Results) -> Figure:
    """Figures 6 and 8: the CDF of the instance PM divergence under every setting."""
    betas = results.grid.betas
    require_any(results)
    figure = Figure(figsize=(3.5 * len(betas) + 0.6, 3.7), layout="constrained")
    panels = figure.subplots(1, len(betas), squeeze=False)[0]
    for place, (axes, beta) in enumerate(zip(panels, betas, strict=True)):
        cells = [cell for cell in results.grid.row(beta) if results.get(cell)]
        limit = shown_limit(results, cells)
        for cell in cells:
            colour, line = line_style(results, cell)
            values = results.measured[cell].divergences
            axes.plot(
                *cdf(values, limit), color=colour, linestyle=line, label=cell_label(cell), zorder=3
            )
        axes.set_ylim(0, 1.02)
        finish_distribution(axes, limit, axes if cells else None)
        titled(axes, f"({letter(place)}) β = {beta:g}")
    panels[0].set_ylabel("share of prompts up to here")
    return figure


def finish_distribution(axes: Axes, limit: float, lines: Axes | None) -> None:
    """Scale, label, and a legend of the lines, or the word that there are none."""
    axes.set(xlim=(0, limit), xlabel="instance PM divergence (nats)")
    if lines is not None:
        lines.legend(loc="center right", framealpha=0.85, edgecolor="none", fontsize=9)
    else:
        axes.text(0.5, 0.5, "missing", transform=axes.transAxes, **MISSING_LABEL)


def line_style(results: Results, cell: Cell) -> tuple[str, str]:
    if cell.alpha is None:
        return plotting.KL, "-"
    return plotting.COLOURED_LINES[
        results.grid.alphas.index(cell.alpha) % len(plotting.COLOURED_LINES)
    ]


def cdf(values: list[float], limit: float) -> tuple[list[float], list[float]]:
    """Corners of the step function x ↦ share of values ≤ x, from 0 to `limit`."""
    ordered = sorted(values)
    xs, ys, share = [0.0], [0.0], 0.0
    for number, value in enumerate(ordered, start=1):
        if value > limit:
            break
        xs += [value, value]
        ys += [share, number / len(ordered)]
        share = number / len(ordered)
    return [*xs, limit], [*ys, share]


def shown_limit(results: Results, cells: list[Cell]) -> float:
    """Where the axis of instance divergences ends: each cell's quantile fits."""
    ends = [0.0]
    for cell in cells:
        ordered = sorted(results.measured[cell].divergences)
        ends.append(ordered[math.ceil(SHOWN_QUANTILE * len(ordered)) - 1])
    return max(ends) or 1.0


def require(results: Results, cells: list[Cell]) -> None:
    absent = [cell.name for cell in cells if cell not in results.measured]
    if absent:
        raise MissingCellsError(f"it needs the cells {', '.join(absent)}")


def require_any(results: Results) -> None:
    if not any(results.get(cell) for beta in results.grid.betas for cell in results.grid.row(beta)):
        raise MissingCellsError("it needs a cell of the grid")


def titled(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=11)
    plotting.style_axes(axes, grid="y")


def letter(place: int) -> str:
    return "abcdefghijklmnopqrstuvwxyz"[place]


MISSING_LABEL: dict[str, Any] = {
    "ha": "center",
    "va": "center",
    "rotation": 90,
    "color": plotting.MUTED,
}


PERPLEXITY_LABEL = "perplexity: held-out texts, own responses (pale)"


JOINT = "figure1_perplexity_models"
"""Its name without a suffix; a sweep's own Figure 1 may lie beside it."""


FIGURES = (
    Kind(
        "perplexity",
        perplexity,
        "Perplexity of PM RLHF and KL RLHF at β = {beta}, of held-out texts that people "
        "chose, as in the paper, and (pale) of the policy's own responses, exp of the mean loss "
        "per token, fine-tuning {model}; with 95 % confidence intervals.",
    ),
    Kind(
        "output_probabilities",
        output_probabilities,
        "What reference and reward model make of the same pairs of responses (y1, y2), fine-tuning "
        "{model}. Panel (a) shows the probabilities of the reference, panel (b) the preferences "
        "that follow from the reward model at β = {beta}.",
    ),
    Kind(
        "pm_divergence",
        divergence_by_alpha,
        "PM divergence when fine-tuning {model}. Upper panels: its mean at each α and β, with 95 % "
        "confidence intervals. Lower panels: histogram (bars) and CDF (lines) of the instance PM "
        "divergence under the best α and under KL RLHF.",
    ),
    Kind(
        "pm_divergence_cdf",
        cumulative,
        "CDF of the instance PM divergence under each setting, conditional PM RLHF at every α and "
        "KL RLHF, when fine-tuning {model}; a panel for each β.",
    ),
)
