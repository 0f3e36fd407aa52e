"""report.html of a sweep: the data that templates/grid.html.jinja lays out."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from step3_rlhf.paper.grid.cells import Cell
from step3_rlhf.paper.grid.figures import FIGURES
from step3_rlhf.paper.grid.results import Measured, Results, best_alpha, cell_label
from step3_rlhf.paper.grid.tables import Table, further_table, notes, number, paper_table
from step3_rlhf.paper.pages import TEMPLATES, Sample, png_uri, samples_of

SAMPLED_PROMPTS = 4
SHOWN_CHARACTERS = 400
"""Length beyond which a prompt or a response is abbreviated."""


@dataclass(frozen=True)
class ShownTable:
    """A table with its caption; the first cell of each row is its heading."""

    caption: str
    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class ShownFigure:
    heading: str
    caption: str
    uri: str


@dataclass(frozen=True)
class Samples:
    """A row for each prompt, a column for each policy, two responses in each cell."""

    policies: list[str]
    rows: list[tuple[str, list[list[Sample]]]]


@dataclass(frozen=True)
class Page:
    """Everything that the page shows."""

    model: str
    number: str
    tables: tuple[ShownTable, ShownTable]
    """The paper's, and ours with intervals."""
    notes: list[str]
    beta: str
    samples: Samples
    figures: list[ShownFigure]


def write_page(results: Results, figures: Iterable[Path], directory: Path) -> Path:
    """Write `report.html`, with the PNG files among `figures`."""
    content = Page(
        results.model,
        number(results),
        (shown_table(results, paper_table(results)), shown_table(results, further_table(results))),
        [note for note in notes(results) if note],
        f"{results.grid.main_beta:g}",
        samples(results),
        shown_figures(results, figures),
    )
    file = directory / "report.html"
    text = TEMPLATES.get_template("grid.html.jinja").render(page=content)
    file.write_text(text, encoding="utf-8")
    return file


def shown_table(results: Results, table: Table) -> ShownTable:
    rows = [
        [f"β = {beta}, {cell_label(cell)}", *table.entries(results, cell, "\u00a0±\u00a0")]
        for beta in results.grid.betas
        for cell in results.grid.row(beta)
    ]
    return ShownTable(table.caption, ["", *(column.heading for column in table.columns)], rows)


def shown_figures(results: Results, figures: Iterable[Path]) -> list[ShownFigure]:
    """In the paper's order."""
    files = {path.stem: path for path in figures if path.suffix == ".png"}
    found = []
    for kind in FIGURES:
        if path := files.get(kind.name(results.paper_model)):
            heading, _, text = kind.caption_of(results).partition(": ")
            found.append(ShownFigure(heading, text, png_uri(path)))
    return found


def sampled_cells(results: Results) -> dict[str, Measured]:
    """The policies side by side: SFT, KL, conditional PM at its best α, and PM, at the main β."""
    beta = results.grid.main_beta
    wanted = {"SFT": results.grid.reference, "KL": Cell("kl", beta)}
    if best := best_alpha(results, beta):
        wanted[f"conditional PM, {cell_label(best)}"] = best
    wanted["PM"] = results.grid.pm
    return {name: results.measured[c] for name, c in wanted.items() if c in results.measured}


def samples(results: Results) -> Samples:
    responses = {
        name: {entry["prompt"]: entry["responses"][:2] for entry in measured.instances()}
        for name, measured in sampled_cells(results).items()
    }
    if not responses:
        return Samples([], [])
    first, *others = responses.values()
    common = [prompt for prompt in first if all(prompt in other for other in others)]
    step = max(1, len(common) // SAMPLED_PROMPTS)  # spread over the prompts, not the first ones
    rows = [
        (
            prompt[-SHOWN_CHARACTERS:],
            [samples_of(own[prompt], SHOWN_CHARACTERS) for own in responses.values()],
        )
        for prompt in common[::step][:SAMPLED_PROMPTS]
    ]
    return Samples(list(responses), rows)
