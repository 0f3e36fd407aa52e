"""The sweep's table in the paper's layout, and its figures, from cells with known numbers."""

import csv
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from step3_rlhf import sweep_figures, sweep_page, sweep_tables
from step3_rlhf.metrics import Estimate
from step3_rlhf.sweep_cells import Cell, Grid
from step3_rlhf.sweep_results import Results, best_alpha, read_results, sigmoid

GRID = Grid("a_b/model", (0.1, 0.3), (0.5, 1.0))
KL = Cell("kl", 1.0)
METRICS = (
    "pm_divergence length perplexity entropy entropy_per_token kl kl_per_token reward"
).split()


def write_cell(directory: Path, cell: Cell, **means: float) -> None:
    """What an evaluation writes: four prompts, the third with the same response twice."""
    folder = directory / cell.name
    folder.mkdir(parents=True)
    report: dict[str, Any] = {
        name: {"mean": means.get(name, 0.125), "ci95": 0.0625, "count": 4} for name in METRICS
    }
    report |= {"prompts": 4, "pairs_per_prompt": 2, "preference_temperature": cell.beta}
    (folder / "evaluation.json").write_text(json.dumps(report | {"exact": {"prompts": 2}}))
    lines = []
    for number, (logp, reward) in enumerate([(0.0, 0.0), (1.0, 0.5), (0.0, 0.0), (-2.0, 1.0)]):
        texts = ("same", "same") if number == 2 else ("one", "another")
        responses = [
            {
                "text": text,
                "logp": side * logp,
                "ref_logp": side * 2 * logp,
                "reward": side * reward,
                "length": 3,
                "ended": side > 0,
            }
            for side, text in zip((0.5, -0.5), texts, strict=True)
        ]
        entry = {"prompt": f"p{number}", "pm_divergence": 9.0, "responses": responses}
        lines.append(json.dumps(entry) + "\n")
    (folder / "instances.jsonl").write_text("".join(lines))


@pytest.fixture
def results_without(tmp_path: Path) -> Callable[..., Results]:
    """A sweep in tmp_path / "sweep", every cell finished but those named."""

    def results(*missing: str) -> Results:
        directory = tmp_path / "sweep"
        GRID.write(directory)
        for cell in GRID.cells():
            if cell.name not in missing:
                shift = {0.1: 0.5, 0.3: 0.25, None: 1.0}[cell.alpha]
                write_cell(directory, cell, pm_divergence=cell.beta + shift, length=250.04)
        return read_results(directory)

    return results


def test_instance_divergences_are_the_closed_form_of_the_first_pair(
    results_without: Callable[..., Results],
) -> None:
    """KL(σ(l) ‖ σ(r/β)) by hand for log-odds l and r."""

    def by_hand(logp: float, reward: float) -> float:
        p, q = sigmoid(logp), sigmoid(reward)
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    results = results_without()
    odds = [(0.0, 0.0), (1.0, 0.5), (0.0, 0.0), (-2.0, 1.0)]
    assert results.measured[KL].divergences == pytest.approx([by_hand(*pair) for pair in odds])
    halved = results.measured[Cell("kl", 0.5)].divergences
    assert halved == pytest.approx([by_hand(l, r / 0.5) for l, r in odds])  # noqa: E741
    assert halved[3] != pytest.approx(by_hand(-2.0, 1.0))  # the control: another β


def test_pairs_of_the_same_text_are_left_out(results_without: Callable[..., Results]) -> None:
    pairs = results_without().measured[GRID.reference].pairs()
    assert [(pair.reference, pair.reward) for pair in pairs] == [(0, 0), (2.0, 0.5), (-4.0, 1.0)]


def test_the_best_alpha_has_the_lowest_divergence(results_without: Callable[..., Results]) -> None:
    results = results_without("beta-0.5/conditional_pm-0.3")
    assert best_alpha(results, 1.0) == Cell("conditional_pm", 1.0, 0.3)
    assert best_alpha(results, 0.5) == Cell("conditional_pm", 0.5, 0.1)
    assert best_alpha(Results(GRID, {}), 0.5) is None


def test_held_out_perplexity_stands_beside_the_papers_columns(
    results_without: Callable[..., Results], tmp_path: Path
) -> None:
    results_without()
    texts = {"texts": 8, "perplexity": 11.5, "perplexity_ci95": 1.25}
    for cell in GRID.cells():
        file = tmp_path / "sweep" / cell.name / "evaluation.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"held_out_text": texts}))
    results = read_results(tmp_path / "sweep")
    assert sweep_tables.markdown(results).count("| 11.50 ± 1.25 |") == 6
    assert "Held-out perplexity $\\downarrow$" in sweep_tables.latex(results)
    (first, *_) = csv.DictReader(io.StringIO(sweep_tables.comma_separated(results)))
    assert (first["held_out_perplexity"], first["held_out_perplexity_ci95"]) == ("11.5", "1.25")


def test_markdown_has_the_papers_rows_and_columns(results_without: Callable[..., Results]) -> None:
    text = sweep_tables.markdown(results_without("beta-1.0/conditional_pm-0.1"))
    rows = [
        [part.strip() for part in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    assert rows[0] == ["", "", "PM Divergence ↓", "Length", "Perplexity ↓", "Entropy", "KL"]
    shared = ["250.0 ± 0.1", "0.12 ± 0.06", "0.125 ± 0.062", "0.125 ± 0.062"]
    assert rows[2:] == [
        ["β = 0.5", "α = 0.1", "1.0000 ± 0.0625", *shared],
        ["", "α = 0.3", "0.7500 ± 0.0625", *shared],
        ["", "KL RLHF", "1.5000 ± 0.0625", *shared],
        ["β = 1.0", "α = 0.1", "missing", "–", "–", "–", "–"],
        ["", "α = 0.3", "1.2500 ± 0.0625", *shared],
        ["", "KL RLHF", "2.0000 ± 0.0625", *shared],
    ]
    assert "when fine-tuning a_b/model" in text
    assert "with the row's own β" in text
    assert "Missing: beta-1.0/conditional_pm-0.1." in text


def test_an_interval_of_a_single_prompt_is_not_shown() -> None:
    assert sweep_tables.shown(Estimate(1.0, math.inf, 1), 2) == "1.00"


def test_latex_is_balanced_and_escaped(results_without: Callable[..., Results]) -> None:
    text = sweep_tables.latex(results_without("beta-1.0/kl"))
    rows = [line for line in text.splitlines() if line.endswith("\\\\")]
    assert len(rows) == 1 + 6
    assert [len(re.findall(r"(?<!\\)&", row)) for row in rows] == [6] * 7
    assert rows[1] == (
        "\\multirow{3}{*}{$\\beta = 0.5$} & $\\alpha$ = 0.1 & $1.0000 \\pm 0.0625$ & "
        "$250.0 \\pm 0.1$ & $0.12 \\pm 0.06$ & $0.125 \\pm 0.062$ & $0.125 \\pm 0.062$ \\\\"
    )
    assert rows[6] == " & KL RLHF & missing & -- & -- & -- & -- \\\\"
    assert "a\\_b/model" in text
    assert text.isascii()
    assert text.count("{") == text.count("}")
    assert text.count("\\begin{") == text.count("\\end{") == 2


def test_csv_has_every_cell_and_every_metric(results_without: Callable[..., Results]) -> None:
    results = results_without("beta-0.5/kl")
    rows = list(csv.DictReader(sweep_tables.comma_separated(results).splitlines()))
    assert [row["cell"] for row in rows] == [cell.name for cell in GRID.cells()]
    by_name = {row["cell"]: row for row in rows}
    found = by_name["beta-1.0/conditional_pm-0.3"]
    assert (found["beta"], found["alpha"], found["status"]) == ("1.0", "0.3", "finished")
    assert float(found["pm_divergence"]) == 1.25
    assert float(found["kl_ci95"]) == 0.0625
    assert by_name["beta-0.5/kl"]["status"] == "missing"
    assert by_name["beta-0.5/kl"]["pm_divergence"] == ""


# Figures


def drawn(results: Results, directory: Path) -> tuple[set[str], dict[str, str]]:
    files, left_out = sweep_figures.draw_figures(results, directory)
    for path in files:
        head = path.read_bytes()[:4]
        assert head == (b"\x89PNG" if path.suffix == ".png" else b"%PDF")
        assert path.stat().st_size > 5_000
    return {path.stem for path in files}, left_out


def test_every_figure_is_drawn(results_without: Callable[..., Results], tmp_path: Path) -> None:
    assert drawn(results_without(), tmp_path) == (set(sweep_figures.FIGURES), {})


def test_figures_say_what_they_lack(
    results_without: Callable[..., Results], tmp_path: Path
) -> None:
    stale = tmp_path / "figure1_perplexity.png"
    stale.touch()
    results = results_without("beta-1.0/pm", "reference", "beta-0.5/kl", "beta-1.0/kl")
    names, left_out = drawn(results, tmp_path)
    assert names == {"figure5_pm_divergence", "figure6_pm_divergence_cdf"}
    assert left_out == {
        "figure1_perplexity": "it needs the cells beta-1.0/pm, beta-1.0/kl",
        "figure3_output_probabilities": "it needs the cells reference",
    }
    assert not stale.exists()


def test_figure_5_shows_the_table(results_without: Callable[..., Results]) -> None:
    figure = sweep_figures.divergence_by_alpha(results_without("beta-0.5/conditional_pm-0.1"))
    panels = figure.axes[:4]
    assert [axes.get_title() for axes in panels] == [
        "(a) β = 0.5", "(b) β = 1", "(c) β = 0.5", "(d) β = 1",
    ]  # fmt: skip
    curve = panels[1].lines[-1]
    assert list(curve.get_ydata()) == [1.5, 1.25, 2.0]
    assert [label.get_text() for label in panels[1].get_xticklabels()] == ["0.1", "0.3", "KL"]
    assert list(panels[0].lines[-1].get_ydata()) == [0.75, 1.5]
    assert "missing" in [text.get_text() for text in panels[0].texts]
    legends = [axes.get_legend() for axes in figure.axes[4:]]
    for legend in legends:
        assert [text.get_text() for text in legend.get_texts()] == ["α = 0.3", "KL RLHF"]


def test_figure_3_shows_probabilities_of_the_same_pairs(
    results_without: Callable[..., Results],
) -> None:
    figure = sweep_figures.output_probabilities(results_without())
    heights = [[bar.get_height() for bar in axes.patches] for axes in figure.axes]
    for column in heights:
        assert sum(column) == pytest.approx(1.0)
    # σ(0), σ(2) = 0.881, σ(−4) = 0.018; and σ(0), σ(0.5) = 0.622, σ(1) = 0.731
    for column, bins in zip(heights, [(0, 10, 17), (10, 12, 14)], strict=True):
        assert [place for place, height in enumerate(column) if height] == list(bins)


def test_the_cdf_is_a_step_function() -> None:
    assert sweep_figures.cdf([2.0, 1.0, 5.0, 1.0], 4.0) == (
        [0.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 4.0],
        [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75],
    )


@pytest.mark.parametrize(("x", "expected"), [(0.0, 0.5), (-800.0, 0.0), (800.0, 1.0)])
def test_sigmoid_of_extreme_odds(x: float, expected: float) -> None:
    assert sigmoid(x) == expected


# The page


def test_the_page_shows_table_figures_and_samples_side_by_side(
    results_without: Callable[..., Results], tmp_path: Path
) -> None:
    results = results_without()
    drawn, _ = sweep_figures.draw_figures(results, tmp_path)
    text = sweep_page.write_page(results, drawn, tmp_path).read_text(encoding="utf-8")
    for cell in ("α = 0.1", "α = 0.3", "KL RLHF"):
        assert f"β = 1, {cell}" in text
    assert text.count("data:image/png;base64,") == len(drawn) // 2
    heads = re.findall(r'<th scope="col">([^<]*)</th>', text[text.index("same prompts") :])
    assert heads == ["Prompt", "SFT", "KL", "conditional PM, α = 0.3", "PM"]
    assert "<q>another</q> <small>cut at 3 tokens</small>" in text


def test_the_page_of_an_unfinished_sweep(
    results_without: Callable[..., Results], tmp_path: Path
) -> None:
    missing = [cell.name for cell in GRID.cells() if cell.beta == 1.0]
    text = sweep_page.write_page(results_without(*missing), [], tmp_path).read_text()
    assert "None of the cells that are shown here is finished" in text
    assert "Missing: reference" in text
