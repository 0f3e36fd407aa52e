"""Table 2 or 3 of the paper from a sweep: table.md, table.tex, and table.csv with everything.

The paper's table comes first, in its own layout, with its rows, columns and decimals, and with its
figures as the published evaluation computes them. A second one holds the same rows with what the
paper does not show: intervals, and the figures that section 6.1 defines.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from step3_rlhf.paper.grid.cells import Cell
from step3_rlhf.paper.grid.results import HELD_OUT, OWN, Results, cell_label
from training.statistics import Estimate


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    heading: str
    metric: str
    """Its name in evaluation.json."""
    decimals: int


@dataclass(frozen=True)
class Table:
    """What stands above a table and in its columns; the rows are the grid's."""

    caption: str
    columns: tuple[Column, ...]
    intervals: bool = False

    def entries(self, results: Results, cell: Cell, plus_minus: str = " ± ") -> list[str]:
        """A row's figures as texts."""
        measured = results.get(cell)
        if measured is None:
            return ["missing", *["–"] * (len(self.columns) - 1)]
        between = plus_minus if self.intervals else None
        found = [measured.estimates.get(column.metric) for column in self.columns]
        return [
            "–" if figure is None else rounded(figure, column.decimals, between)
            for figure, column in zip(found, self.columns, strict=True)
        ]


CAPTION = (
    "KL RLHF compared with conditional PM RLHF when fine-tuning {model}. ↓ marks measures of "
    "which less is better. KL RLHF is what conditional PM RLHF becomes at α = 1."
)


FURTHER_CAPTION = (
    "Not in the paper: the same figures with half of their 95 % confidence intervals; its `eval "
    "pm`; and what section 6.1 defines, of the policy's own responses; fine-tuning {model}."
)


OWN_COLUMNS = (
    Column("eval pm ↓", "pm_squared_difference", 4),
    Column("Own perplexity", OWN, 2),
    Column("Own entropy", "entropy_per_token", 3),
    Column("Own KL", "kl_per_token", 3),
    Column("Cut", "cut_share", 2),
    Column("Cut, predicted", "cut_predicted_share", 2),
)


BETA_NOTE = (
    "The reward is r/β (section 6), so β moves the target as well: the PM divergence of a row is "
    "taken to σ((r1 − r2)/β) with the row's own β, which is the more one-sided the smaller β is. "
    "Compare rows of the same β."
)


MEASURE_NOTE = (
    "Means over {prompts} held-out prompts ± half of the 95 % confidence interval, {pairs} of "
    "responses each; the interval is over groups of prompts, holds for these trained policies and "
    "says nothing of another seed's. Length in tokens; perplexity of people's own texts, held out; "
    "entropy and KL in nats per token, over the full vocabulary and pooled over tokens, as the "
    "published evaluation has them. eval pm is the squared difference of the two probabilities "
    "whose divergence is the PM divergence. Own perplexity is exp of the mean loss per token of "
    "the policy's own responses; own entropy and KL are of the drawn tokens, means over responses. "
    "Cut is the share of responses that did not end by themselves, and predicted what the optimum "
    "cuts without differences of reward, from the reference's responses. "
    "The figures' instance PM divergences are those of one pair each."
)


def write_tables(results: Results, directory: Path) -> list[Path]:
    """The files, written."""
    texts = {"md": markdown, "tex": latex, "csv": comma_separated}
    paths = [directory / f"table.{suffix}" for suffix in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        path.write_text(text(results), encoding="utf-8", newline="")
    return paths


def paper_table(results: Results) -> Table:
    """Table 2 or 3, its columns as the published evaluation computes them."""
    columns = _columns(results.paper_model.divergence_decimals, 0, 2, 2, 2)
    return Table(CAPTION.format(model=results.model), columns)


def further_table(results: Results) -> Table:
    """The paper's columns with intervals, then the figures that section 6.1 defines."""
    columns = (*_columns(4, 1, 2, 3, 3), *OWN_COLUMNS)
    return Table(FURTHER_CAPTION.format(model=results.model), columns, intervals=True)


def _columns(*decimals: int) -> tuple[Column, ...]:
    """The paper's, in its order."""
    named = {
        "PM Divergence ↓": "pm_divergence",
        "Length": "length",
        "Perplexity ↓": HELD_OUT,
        "Entropy": "entropy_full_vocabulary",
        "KL": "kl_full_vocabulary",
    }
    pairs = zip(named.items(), decimals, strict=True)
    return tuple(Column(heading, metric, shown) for (heading, metric), shown in pairs)


def number(results: Results) -> str:
    """The paper's."""
    return f"Table {results.paper_model.table}"


def markdown(results: Results) -> str:
    """Both tables with their captions, then notes and what is missing."""
    paper, further = paper_table(results), further_table(results)
    lines = [f"**{number(results)}: {paper.caption}**", "", *_rows(results, paper), ""]
    lines += [f"**{further.caption}**", "", *_rows(results, further), "", *notes(results)]
    return "\n".join(lines) + "\n"


def _rows(results: Results, table: Table) -> list[str]:
    headings = ["", "", *(column.heading for column in table.columns)]
    lines = [_line(headings), _line(["---"] * len(headings))]
    for beta in results.grid.betas:
        for place, cell in enumerate(results.grid.row(beta)):
            group = f"β = {beta}" if place == 0 else ""
            lines.append(_line([group, cell_label(cell), *table.entries(results, cell)]))
    return lines


def latex(results: Results) -> str:
    """Both tables for booktabs and multirow, the notes below the second."""
    below = [f"\\par\\smallskip\\footnotesize {_tex(note)}" for note in notes(results) if note]
    lines = [
        "% needs \\usepackage{booktabs,multirow}",
        f"% {number(results)} of the paper",
        *_environment(results, paper_table(results)),
        "",
        "% Not in the paper",
        *_environment(results, further_table(results), below),
    ]
    return "\n".join(lines) + "\n"


def _environment(results: Results, table: Table, below: Sequence[str] = ()) -> list[str]:
    headings = " & ".join(_tex(column.heading) for column in table.columns)
    lines = [
        "\\begin{table}[t]",
        f"\\caption{{{_tex(table.caption)}}}",
        "\\centering",
        "\\begin{tabular}{ll" + "c" * len(table.columns) + "}",
        "\\toprule",
        f" & & {headings} \\\\",
    ]
    for beta in results.grid.betas:
        row = results.grid.row(beta)
        lines.append("\\midrule")
        for place, cell in enumerate(row):
            group = f"\\multirow{{{len(row)}}}{{*}}{{$\\beta = {beta}$}}" if place == 0 else ""
            label = cell_label(cell)
            if cell.alpha is not None:
                label = f"${label}$".replace("log ", "\\log ").replace("α", "\\alpha")
            entries = table.entries(results, cell, " \\pm ")
            shown = [f"${e}$" if any(map(str.isdigit, e)) else _tex(e) for e in entries]
            lines.append(" & ".join([group, label, *shown]) + " \\\\")
    return [*lines, "\\bottomrule", "\\end{tabular}", *below, "\\end{table}"]


def comma_separated(results: Results) -> str:
    """Every cell, every sampled metric at full precision; what is missing has empty fields."""
    names = list(
        dict.fromkeys(name for cell in results.measured.values() for name in cell.estimates)
    )
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
        values: list[float | str] = []
        for figure in map(measured.estimates.get, names):  # natural_mass needs an M(x)
            interval = "" if figure is None or figure.ci95 is None else figure.ci95
            values += ["" if figure is None else figure.mean, interval]
        writer.writerow([*place, "finished", measured.report["prompts"], *values])
    return buffer.getvalue()


def rounded(figure: Estimate, decimals: int, plus_minus: str | None) -> str:
    """Without the sign of a zero; without the interval where a single prompt gives none."""
    mean = f"{round(figure.mean, decimals) + 0.0:.{decimals}f}"
    if plus_minus is None or figure.ci95 is None:
        return mean
    return f"{mean}{plus_minus}{figure.ci95:.{decimals}f}"


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
