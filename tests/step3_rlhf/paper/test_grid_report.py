"""The sweep's table in the paper's layout, and its figures, from cells with known numbers."""

import csv
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from step3_rlhf.paper.grid import figures as sweep_figures
from step3_rlhf.paper.grid import page as sweep_page
from step3_rlhf.paper.grid import tables as sweep_tables
from step3_rlhf.paper.grid.cells import Cell, Grid
from step3_rlhf.paper.grid.results import Results, best_alpha, read_results, sigmoid
from training.errors import UserError
from training.statistics import Estimate

GRID = Grid("some/model-2", (0.1, 0.3), (0.5, 1.0))
KL = Cell("kl", 1.0)
METRICS = (
    "pm_divergence pm_divergence_reference length perplexity entropy entropy_per_token kl "
    "kl_per_token reward "
    "pm_squared_difference perplexity_pooled entropy_full_vocabulary kl_full_vocabulary"
).split()
TEXTS = "held_out_perplexity"


def write_cell(directory: Path, cell: Cell, **means: float) -> None:
    """What an evaluation writes: four prompts, the third with the same response twice."""
    folder = directory / cell.name
    folder.mkdir(parents=True)
    report: dict[str, Any] = {
        name: {"mean": means.get(name, 0.125), "ci95": 0.0625, "count": 4} for name in METRICS
    }
    report |= {"prompts": 4, "pairs_per_prompt": 2, "preference_temperature": cell.beta}
    perplexity = means.get(TEXTS, 0.125)
    report["held_out_text"] = {
        "texts": 8,
        "clusters": 4,
        "perplexity": perplexity,
        "perplexity_ci95": 1.25,
        "perplexity_low": perplexity / 2,
        "perplexity_high": perplexity * 2,
    }
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
                figures = {"pm_divergence": cell.beta + shift, "length": 250.04}
                write_cell(directory, cell, **figures, pm_divergence_reference=cell.beta + shift)
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


def test_a_collapsed_policy_is_never_the_best(tmp_path: Path) -> None:
    """The lowest PM divergence is that of a policy that always gives one answer."""
    GRID.write(tmp_path)
    collapsed, matching = (Cell("conditional_pm", 1.0, alpha) for alpha in GRID.alphas)
    write_cell(tmp_path, collapsed, pm_divergence=0.002, pm_divergence_reference=1.5)
    write_cell(tmp_path, matching, pm_divergence=0.03, pm_divergence_reference=0.04)
    assert best_alpha(read_results(tmp_path), 1.0) == matching


def test_an_evaluation_without_the_figure_that_chooses_is_refused(tmp_path: Path) -> None:
    GRID.write(tmp_path)
    write_cell(tmp_path, KL)
    file = tmp_path / KL.name / "evaluation.json"
    report = json.loads(file.read_text())
    file.write_text(json.dumps(report | {"pm_divergence_reference": None}))  # no pair differed
    assert best_alpha(read_results(tmp_path), 1.0) is None
    del report["pm_divergence_reference"]
    file.write_text(json.dumps(report))
    with pytest.raises(UserError, match=f"evaluate.sh {tmp_path / KL.name}"):
        read_results(tmp_path)


# Tables


MEASURED = {
    "beta-0.5/conditional_pm-0.1": (0.97318, 256.8, 19.544, 0.849, 0.291),
    "beta-0.5/conditional_pm-0.3": (0.97016, 254.6, 7.2051, 1.4149, 0.0551),
    "beta-0.5/kl": (1.19566, 110.9, 6.71, 1.786, 0.0102),
    "beta-1.0/conditional_pm-0.1": (1.09671, 256.4, 20.82, 0.6, 0.338),
    "beta-1.0/conditional_pm-0.3": (0.97324, 257.0, 7.936, 1.2, 0.0849),
    "beta-1.0/kl": (1.17372, 89.4, 6.6449, 1.844, -0.0012),
}
"""Means that round to six rows of the paper's Table 3."""


@pytest.fixture
def papers(tmp_path: Path) -> Callable[..., Results]:
    """A sweep that measured what the paper did."""

    def results(
        name: str = "facebook/opt-1.3b",
        *missing: str,
        paper_model: str = "opt-1.3b",
        texts: bool = True,
    ) -> Results:
        directory = tmp_path / "papers"
        start = "runs/opt-1.3b/sft/model"
        grid = Grid(start, GRID.alphas, GRID.betas, True, name, paper_model)
        grid.write(directory)
        names = f"pm_divergence length {TEXTS} entropy_full_vocabulary kl_full_vocabulary".split()
        for cell in grid.cells():
            means = MEASURED.get(cell.name)
            if means is not None and cell.name not in missing:
                write_cell(directory, cell, **dict(zip(names, means, strict=True)))
                file = directory / cell.name / "evaluation.json"
                report = json.loads(file.read_text())
                if not texts:
                    del report["held_out_text"]
                file.write_text(json.dumps(report))
        return read_results(directory)

    return results


OPT_TABLE = """\
**Table 3: KL RLHF compared with conditional PM RLHF when fine-tuning facebook/opt-1.3b. ↓ marks \
measures of which less is better. KL RLHF is what conditional PM RLHF becomes at α = 1.**

|  |  | PM Divergence ↓ | Length | Perplexity ↓ | Entropy | KL |
| --- | --- | --- | --- | --- | --- | --- |
| β = 0.5 | α = 0.1 | 0.9732 | 257 | 19.54 | 0.85 | 0.29 |
|  | α = 0.3 | 0.9702 | 255 | 7.21 | 1.41 | 0.06 |
|  | KL RLHF | 1.1957 | 111 | 6.71 | 1.79 | 0.01 |
| β = 1.0 | α = 0.1 | 1.0967 | 256 | 20.82 | 0.60 | 0.34 |
|  | α = 0.3 | 0.9732 | 257 | 7.94 | 1.20 | 0.08 |
|  | KL RLHF | 1.1737 | 89 | 6.64 | 1.84 | 0.00 |

**Not in the paper"""
LLAMA_ROWS = """\
| β = 0.5 | α = 0.1 | 0.97 | 257 | 19.54 | 0.85 | 0.29 |
|  | α = 0.3 | 0.97 | 255 | 7.21 | 1.41 | 0.06 |
|  | KL RLHF | 1.20 | 111 | 6.71 | 1.79 | 0.01 |
"""
FURTHER = """\
**Not in the paper: the same figures with half of their 95 % confidence intervals; its `eval pm`; \
and what section 6.1 defines, of the policy's own responses; fine-tuning facebook/opt-1.3b.**

|  |  | PM Divergence ↓ | Length | Perplexity ↓ | Entropy | KL | eval pm ↓ | Own perplexity | \
Own entropy | Own KL |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| β = 0.5 | α = 0.1 | 0.9732 ± 0.0625 | 256.8 ± 0.1 | 19.54 ± 1.25 | 0.849 ± 0.062 | 0.291 ± 0.062 \
| 0.1250 ± 0.0625 | 0.12 ± 0.06 | 0.125 ± 0.062 | 0.125 ± 0.062 |
|  | α = 0.3 | missing | – | – | – | – | – | – | – | – |
"""


def test_markdown_is_the_papers_table_3(papers: Callable[..., Results]) -> None:
    text = sweep_tables.markdown(papers())
    assert text.startswith(OPT_TABLE)
    assert "with the row's own β" in text


def test_without_held_out_texts_there_is_no_perplexity(papers: Callable[..., Results]) -> None:
    text = sweep_tables.markdown(papers(texts=False))
    assert "| β = 0.5 | α = 0.1 | 0.9732 | 257 | – | 0.85 | 0.29 |" in text


def test_llamas_table_2_has_two_decimals(papers: Callable[..., Results], tmp_path: Path) -> None:
    text = sweep_tables.markdown(papers("meta-llama/Llama-2-7b-hf", paper_model="llama-2-7b"))
    assert text.startswith("**Table 2: ")
    assert "when fine-tuning meta-llama/Llama-2-7b-hf. " in text
    assert LLAMA_ROWS in text
    renamed = sweep_tables.markdown(read_results(tmp_path / "papers", None, "opt-1.3b"))
    assert renamed.startswith("**Table 3: ")
    assert LLAMA_ROWS not in renamed


def test_what_the_paper_does_not_show_is_a_second_table(papers: Callable[..., Results]) -> None:
    missing = "beta-0.5/conditional_pm-0.3"
    results = papers("facebook/opt-1.3b", missing, texts=True)
    text = sweep_tables.markdown(results)
    first, second = text.split("**Not in the paper")
    assert FURTHER in f"**Not in the paper{second}"
    assert "±" not in first
    assert "|  | α = 0.3 | missing | – | – | – | – |\n" in first
    assert "Missing: reference, beta-0.5/conditional_pm-0.3." in second
    (_, row, *_) = csv.DictReader(io.StringIO(sweep_tables.comma_separated(results)))
    assert (row["held_out_perplexity"], row["held_out_perplexity_ci95"]) == ("19.544", "1.25")


@pytest.mark.parametrize(
    ("figure", "decimals", "between", "expected"),
    [
        (Estimate(1.0, None, 1, 1), 2, " ± ", "1.00"),  # a single prompt has no interval
        (Estimate(1.0, 0.5, 2, 2), 2, " ± ", "1.00 ± 0.50"),
        (Estimate(1.0, 0.5, 2, 2), 2, None, "1.00"),
        (Estimate(-0.004, 0.5, 2, 2), 2, None, "0.00"),
        (Estimate(-0.006, 0.5, 2, 2), 2, None, "-0.01"),
        (Estimate(256.5001, 0.5, 2, 2), 0, None, "257"),
        (Estimate(math.inf, 0.5, 2, 2), 2, None, "inf"),
    ],
)
def test_figures_are_rounded(
    figure: Estimate, decimals: int, between: str | None, expected: str
) -> None:
    assert sweep_tables.rounded(figure, decimals, between) == expected


LATEX = r"""% needs \usepackage{booktabs,multirow}
% Table 3 of the paper
\begin{table}[t]
\caption{KL RLHF compared with conditional PM RLHF when fine-tuning a\_b/opt. $\downarrow$ marks \
measures of which less is better. KL RLHF is what conditional PM RLHF becomes at $\alpha$ = 1.}
\centering
\begin{tabular}{llccccc}
\toprule
 & & PM Divergence $\downarrow$ & Length & Perplexity $\downarrow$ & Entropy & KL \\
\midrule
\multirow{3}{*}{$\beta = 0.5$} & $\alpha = 0.1$ & $0.9732$ & $257$ & $19.54$ & $0.85$ & $0.29$ \\
 & $\alpha = 0.3$ & $0.9702$ & $255$ & $7.21$ & $1.41$ & $0.06$ \\
 & KL RLHF & $1.1957$ & $111$ & $6.71$ & $1.79$ & $0.01$ \\
\midrule
\multirow{3}{*}{$\beta = 1.0$} & $\alpha = 0.1$ & $1.0967$ & $256$ & $20.82$ & $0.60$ & $0.34$ \\
 & $\alpha = 0.3$ & $0.9732$ & $257$ & $7.94$ & $1.20$ & $0.08$ \\
 & KL RLHF & missing & -- & -- & -- & -- \\
\bottomrule
\end{tabular}
\end{table}

% Not in the paper
\begin{table}[t]
"""


def test_latex_is_the_papers_table_escaped(papers: Callable[..., Results]) -> None:
    text = sweep_tables.latex(papers("a_b/opt", "beta-1.0/kl", texts=True))
    assert text.startswith(LATEX.replace("\\\nmeasures", "measures"))
    further = text[text.index("% Not in the paper") :]
    assert "\\begin{tabular}{llccccccccc}" in further
    assert " & KL RLHF & missing" + " & --" * 8 + " \\\\" in further
    assert "& $256.8 \\pm 0.1$ & " in further
    assert "people's own texts" in further
    rows = [line for line in text.splitlines() if line.endswith("\\\\")]
    assert [len(re.findall(r"(?<!\\)&", row)) for row in rows] == [6] * 7 + [10] * 7
    assert text.isascii()
    assert text.count("{") == text.count("}")
    assert text.count("\\begin{") == text.count("\\end{") == 4


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
    names = {
        "figure1_perplexity",
        "figure3_output_probabilities",
        "figure5_pm_divergence",
        "figure6_pm_divergence_cdf",
    }
    assert drawn(results_without(), tmp_path) == (names, {})


def test_opts_figures_have_its_numbers(
    results_without: Callable[..., Results], tmp_path: Path
) -> None:
    stale = [tmp_path / f"figure5_pm_divergence.{suffix}" for suffix in ("png", "pdf")]
    for path in stale:
        path.touch()
    results = results_without("beta-1.0/pm")
    opt = replace(results, grid=replace(results.grid, paper_model="opt-1.3b"))
    names = {"figure4_output_probabilities", "figure7_pm_divergence", "figure8_pm_divergence_cdf"}
    left_out = {"figure1_perplexity": "it needs the cells beta-1.0/pm"}
    assert drawn(opt, tmp_path) == (names, left_out)
    assert not any(path.exists() for path in stale)  # of the same sweep under other numbers


def test_the_joint_figure_1_has_a_panel_for_each_model(
    results_without: Callable[..., Results], tmp_path: Path
) -> None:
    results = results_without()
    llama = replace(results, grid=replace(results.grid, name="Llama-2-7B"))
    file = tmp_path / "sweep" / GRID.pm.name / "evaluation.json"
    higher = json.loads(file.read_text())
    higher["held_out_text"] |= {"perplexity": 9.0, "perplexity_high": 12.0}
    higher["perplexity_pooled"]["mean"] = 5.0  # beside it, of the policy's own responses
    file.write_text(json.dumps(higher))
    opt = read_results(tmp_path / "sweep", "OPT-$1.3B$")
    figure = sweep_figures.joint_perplexity([opt, llama])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["(a) OPT-\\$1.3B\\$\nβ = 1", "(b) Llama-2-7B\nβ = 1"]
    heights = [[bar.get_height() for bar in axes.patches] for axes in figure.axes]
    assert heights == [[9.0, 5.0, 0.125, 0.125], [0.125] * 4]
    for axes in figure.axes:
        assert [label.get_text() for label in axes.get_xticklabels()] == ["PM RLHF", "KL RLHF"]
    swapped = sweep_figures.joint_perplexity([llama, opt])
    assert [bar.get_height() for bar in swapped.axes[0].patches] == [0.125] * 4


def test_the_joint_figure_1_needs_every_model(
    results_without: Callable[..., Results], tmp_path: Path
) -> None:
    results = results_without("beta-1.0/pm")
    files, left_out = sweep_figures.draw_joint([results, results], tmp_path / "joint")
    assert files == []
    assert left_out == {"figure1_perplexity_models": "some/model-2: it needs the cells beta-1.0/pm"}


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
        assert text.count(f"β = 1.0, {cell}") == 2  # the paper's table and ours
    assert "<h2>Table 2</h2>" in text
    assert "95\u00a0% confidence" in text
    assert "95 %" not in re.sub(r'alt="[^"]*"', "", text)
    assert re.findall(r"<h3>([^<]*)</h3><p>([^<]{16})", text) == [
        ("Figure 1", "Perplexity of PM"),
        ("Figure 3", "What reference a"),
        ("Figure 5", "PM divergence wh"),
        ("Figure 6", "CDF of the insta"),
    ]
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
