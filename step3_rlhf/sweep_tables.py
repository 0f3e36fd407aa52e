"""Table 2 (and 3) of the paper from a sweep: table.md, table.tex, and table.csv with everything."""

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

from step3_rlhf.metrics import Estimate
from step3_rlhf.sweep_cells import Cell
from step3_rlhf.sweep_results import HELD_OUT, Results, cell_label


@dataclass(frozen=True)
class Column:
    """A column of the paper's table."""

    heading: str
    metric: str
    """Its name in evaluation.json."""
    decimals: int


COLUMNS = (
    Column("PM Divergence ↓", "pm_divergence", 4),
    Column("Length", "length", 1),
    Column("Perplexity ↓", "perplexity", 2),
    Column("Entropy", "entropy_per_token", 3),
    Column("KL", "kl_per_token", 3),
)
"""The paper's, in its order. Its Entropy and KL are means per token."""
HELD_OUT_COLUMN = Column("Held-out perplexity ↓", HELD_OUT, 2)
"""Beside the paper's. Its Perplexity rises where its Entropy falls, as this one can and that of a
policy's own responses, which section 6.1 defines, cannot."""

CAPTION = (
    "Comparison between RLHF and conditional PM RLHF, when fine-tuning {model}. The symbol ↓ means "
    "smaller is better. KL RLHF is equivalent to conditional PM RLHF when α is set to 1."
)
BETA_NOTE = (
    "The reward is r/β (section 6), so β moves the target as well: the PM divergence of a row is "
    "taken to σ((r1 − r2)/β) with the row's own β, which is the more one-sided the smaller β is. "
    "Compare rows of the same β."
)
MEASURE_NOTE = (
    "Means over {prompts} held-out prompts ± half of the 95 % confidence interval, {pairs} of "
    "responses each; the interval holds for these trained policies and says nothing of another "
    "seed's. Length in tokens; perplexity of the policy's own responses under itself (section 6.1) "
    "or, held-out, of people's own texts; entropy and KL in nats per token. The figures' "
    "instance PM divergences are those of one pair each."
)


def write_tables(results: Results, directory: Path) -> list[Path]:
    """The files, written."""
    texts = {"md": markdown, "tex": latex, "csv": comma_separated}
    paths = [directory / f"table.{suffix}" for suffix in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        path.write_text(text(results), encoding="utf-8", newline="")
    return paths


def markdown(results: Results) -> str:
    """The table with its caption, notes, and what is missing."""
    heading = ["", "", *(column.heading for column in columns(results))]
    lines = [f"**{caption(results)}**", "", _line(heading), _line(["---"] * len(heading))]
    for beta in results.grid.betas:
        for place, cell in enumerate(results.grid.row(beta)):
            group = f"β = {beta}" if place == 0 else ""
            lines.append(_line([group, cell_label(cell), *entries(results, cell, " ± ")]))
    return "\n".join([*lines, "", *notes(results)]) + "\n"


def latex(results: Results) -> str:
    """A table for booktabs and multirow, the notes below it."""
    lines = [
        "% needs \\usepackage{booktabs,multirow}",
        "\\begin{table}[t]",
        f"\\caption{{{_tex(caption(results))}}}",
        "\\centering",
        "\\begin{tabular}{ll" + "c" * len(columns(results)) + "}",
        "\\toprule",
        " & & " + " & ".join(_tex(column.heading) for column in columns(results)) + " \\\\",
    ]
    for beta in results.grid.betas:
        row = results.grid.row(beta)
        lines.append("\\midrule")
        for place, cell in enumerate(row):
            group = f"\\multirow{{{len(row)}}}{{*}}{{$\\beta = {beta}$}}" if place == 0 else ""
            cells = [f"${entry}$" for entry in entries(results, cell, " \\pm ")]
            shown = cells if cell in results.measured else [*["missing"], *["--"] * 4]
            lines.append(" & ".join([group, _tex(cell_label(cell)), *shown]) + " \\\\")
    lines += ["\\bottomrule", "\\end{tabular}", ""]
    lines += [f"\\par\\smallskip\\footnotesize {_tex(note)}" for note in notes(results) if note]
    return "\n".join([*lines, "\\end{table}"]) + "\n"


def comma_separated(results: Results) -> str:
    """Every cell, every sampled metric at full precision; a missing cell has empty fields."""
    names = list(results.any.estimates)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    fields = [column for name in names for column in (name, f"{name}_ci95")]
    writer.writerow(["cell", "regularizer", "beta", "alpha", "status", "prompts", *fields])
    for cell in results.grid.cells():
        measured = results.get(cell)
        place = [cell.name, cell.kind, cell.beta, "" if cell.alpha is None else cell.alpha]
        if measured is None:
            writer.writerow([*place, "missing", "", *[""] * len(fields)])
            continue
        figures = [measured.estimate(name) for name in names]
        values = [value for figure in figures for value in (figure.mean, figure.ci95)]
        writer.writerow([*place, "finished", measured.report["prompts"], *values])
    return buffer.getvalue()


def entries(results: Results, cell: Cell, plus_minus: str) -> list[str]:
    """A row's figures as texts."""
    measured = results.get(cell)
    if measured is None:
        return ["missing", *["–"] * (len(columns(results)) - 1)]
    return [
        shown(measured.estimate(column.metric), column.decimals, plus_minus)
        for column in columns(results)
    ]


def columns(results: Results) -> tuple[Column, ...]:
    """The paper's, and that of held-out texts where the sweep has any."""
    return (*COLUMNS, HELD_OUT_COLUMN) if HELD_OUT in results.any.estimates else COLUMNS


def shown(figure: Estimate, decimals: int, plus_minus: str = " ± ") -> str:
    """Rounded; without the interval where a single prompt gives none."""
    mean = f"{figure.mean:.{decimals}f}"
    if not math.isfinite(figure.ci95):
        return mean
    return f"{mean}{plus_minus}{figure.ci95:.{decimals}f}"


def caption(results: Results) -> str:
    return CAPTION.format(model=results.grid.model)


def notes(results: Results) -> list[str]:
    """Paragraphs, empty lines between them."""
    report = results.any.report
    pairs = report["pairs_per_prompt"]
    measure = MEASURE_NOTE.format(
        prompts=report["prompts"], pairs="one pair" if pairs == 1 else f"{pairs} pairs"
    )
    found = [BETA_NOTE, "", measure]
    if results.missing:
        found += ["", f"Missing: {', '.join(results.missing)}."]
    return found


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


TEX = {
    "\\": "\\textbackslash{}", "_": "\\_", "%": "\\%", "&": "\\&", "#": "\\#", "$": "\\$",
    "{": "\\{", "}": "\\}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}",
    "↓": "$\\downarrow$", "α": "$\\alpha$", "β": "$\\beta$", "σ": "$\\sigma$", "±": "$\\pm$",
    "−": "$-$", "–": "--",
}  # fmt: skip


def _tex(text: str) -> str:
    """LaTeX's own signs escaped, mathematical ones spelt out."""
    return "".join(TEX.get(sign, sign) for sign in text)
