"""The sweep as one self-contained page: table, figures, and samples side by side."""

import base64
from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template

from step3_rlhf.paper.grid.cells import Cell
from step3_rlhf.paper.grid.figures import FIGURES
from step3_rlhf.paper.grid.results import Measured, Results, best_alpha, cell_label
from step3_rlhf.paper.grid.tables import Table, further_table, notes, number, paper_table
from step3_rlhf.paper.html import STYLE, picture, responses_cell, table

SAMPLED_PROMPTS = 4


SHOWN_CHARACTERS = 400
"""Lengths beyond which a prompt or a response is abbreviated."""


def write_page(results: Results, figures: Iterable[Path], directory: Path) -> Path:
    """`report.html`, with the PNG files among `figures`."""
    shown = {path.stem: data_uri(path) for path in figures if path.suffix == ".png"}
    pictures = []
    for kind in FIGURES:
        if uri := shown.get(kind.name(results.shown)):
            heading, _, text = kind.caption_of(results).partition(": ")
            image = picture(uri, f"{heading}: {text}")
            pictures.append(f"<h3>{heading}</h3><p>{prose(text)}</p>{image}")
    paper, further = paper_table(results), further_table(results)
    text = PAGE.substitute(
        style=STYLE,
        model=escape(results.model),
        number=number(results),
        caption=prose(paper.caption),
        table=html_table(results, paper),
        further_caption=prose(further.caption),
        further=html_table(results, further),
        notes="".join(f"<p>{prose(note)}</p>" for note in notes(results) if note),
        beta=f"{results.grid.main_beta:g}",
        samples=samples(results),
        figures="".join(pictures),
    )
    file = directory / "report.html"
    file.write_text(text, encoding="utf-8")
    return file


def prose(text: str) -> str:
    """HTML, without a line that begins with a percent sign."""
    return escape(text).replace(" %", "\u00a0%")


def data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def html_table(results: Results, which: Table) -> str:
    rows = [
        [f"β = {beta}, {cell_label(cell)}", *which.entries(results, cell, "\u00a0±\u00a0")]
        for beta in results.grid.betas
        for cell in results.grid.row(beta)
    ]
    return table(["", *(escape(column.heading) for column in which.columns)], rows)


def sampled_cells(results: Results) -> dict[str, Measured]:
    """What stands side by side: SFT, KL, conditional PM at its best α, PM; of the main β."""
    beta = results.grid.main_beta
    wanted = {"SFT": results.grid.reference, "KL": Cell("kl", beta)}
    if best := best_alpha(results, beta):
        wanted[f"conditional PM, {cell_label(best)}"] = best
    wanted["PM"] = results.grid.pm
    return {name: results.measured[c] for name, c in wanted.items() if c in results.measured}


def samples(results: Results) -> str:
    """A row for each prompt, a column for each policy, two responses in each cell."""
    responses = {
        name: {entry["prompt"]: entry["responses"][:2] for entry in measured.instances()}
        for name, measured in sampled_cells(results).items()
    }
    if not responses:
        return "<p>None of the cells that are shown here is finished.</p>"
    first, *others = responses.values()
    common = [prompt for prompt in first if all(prompt in other for other in others)]
    step = max(1, len(common) // SAMPLED_PROMPTS)  # spread over the prompts, not the first ones
    rows = [
        [
            f"<small>{escape(prompt[-SHOWN_CHARACTERS:])}</small>",
            *(responses_cell(own[prompt], SHOWN_CHARACTERS) for own in responses.values()),
        ]
        for prompt in common[::step][:SAMPLED_PROMPTS]
    ]
    return table(["Prompt", *map(escape, responses)], rows, kind="samples sweep")


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>KL against conditional preference matching: $model</title>
<style>$style
table.figures tbody th { white-space: nowrap; }
table.sweep { table-layout: fixed; width: 100%; } table.sweep td { width: auto; }
table.sweep tbody th { width: 22%; font-weight: 400; overflow-wrap: anywhere; }
table.sweep tbody th small { padding-left: 0; white-space: pre-wrap; }
</style>
</head>
<body><main>
<h1>KL against conditional preference matching</h1>
<p class="lead">Fine-tuning $model. Tables and figures are numbered as in the paper.</p>
<section>
<h2>$number</h2>
<p>$caption</p>
$table
<p style="margin-top:24px">$further_caption</p>
$further
<div class="muted" style="margin-top:16px">$notes</div>
</section>
<section>
<h2>Responses to the same prompts</h2>
<p class="muted">Two samples of each policy at β = $beta. Models trained on data of harmful requests
may answer them harmfully.</p>
$samples
</section>
<section>
<h2>Figures</h2>
$figures
</section>
</main></body>
</html>
""")
