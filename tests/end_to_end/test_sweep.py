"""A sweep on the tiny world through the real script, launcher and stages: stopped, failed, resumed.

One sweep that several tests look at, in the order in which things happen to it.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.launcher

ROOT = Path(__file__).resolve().parents[2]
ALPHA = "0.0011"
"""Amid the probabilities that the tiny world's base model, which knows nothing, gives to tokens."""
ROWS = [f"conditional_pm-{ALPHA}", "kl"]
CELLS = ["reference", *(f"beta-{beta}/{row}" for beta in (0.5, 1.0) for row in ROWS), "beta-1.0/pm"]
FIGURES = ["figure1_perplexity", "figure3_output_probabilities", "figure5_pm_divergence",
           "figure6_pm_divergence_cdf"]  # fmt: skip


@dataclass(frozen=True)
class Ended:
    code: int
    printed: str


@dataclass(frozen=True)
class Sweep:
    """Where a sweep writes, and the config and reward function that it has."""

    workshop: Path

    @property
    def output(self) -> Path:
        return self.workshop / "sweep"

    def run(self, *arguments: str) -> Ended:
        variables = {
            "VIRTUAL_ENV": sys.prefix,
            "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
            "NUM_PROCESSES": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(self.workshop),
        }
        ended = subprocess.run(
            ["bash", str(ROOT / "scripts" / "sweep.sh"), *arguments],
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=400,
        )
        return Ended(ended.returncode, ended.stdout)

    def start(self) -> Ended:
        config = str(self.workshop / "stage3.json")
        grid = ["--alphas", ALPHA, "--betas", "0.5,1"]
        return self.run(config, "--output", str(self.output), *grid, "seed=5")

    def results(self, cell: str) -> bytes:
        return (self.output / cell / "instances.jsonl").read_bytes()

    def made_at(self) -> dict[str, int]:
        """When each finished cell was."""
        paths = {cell: self.output / cell / "evaluation.json" for cell in CELLS}
        return {cell: path.stat().st_mtime_ns for cell, path in paths.items() if path.is_file()}

    def table(self) -> dict[str, dict[str, str]]:
        lines = (self.output / "table.csv").read_text().splitlines()
        return {row["cell"]: row for row in csv.DictReader(lines)}


REWARD = """
import pathlib, sys
BROKEN = pathlib.Path(__file__).with_name("broken")

def by_length(prompts, responses):
    if BROKEN.is_file() and any(BROKEN.read_text() in argument for argument in sys.argv):
        raise ValueError("the reward function is broken")
    return [len(text) / 10 for text in responses]
"""


@pytest.fixture(scope="module")
def sweep(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    workshop = tmp_path_factory.mktemp("sweep")
    (workshop / "lengths.py").write_text(REWARD)
    optimizer = {"learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    settings: dict[str, Any] = {
        "model_name_or_path": str(tiny_world / "base"),
        "output_dir": str(workshop / "unused"),
        "reward": {"function": "lengths:by_length"},
        "regularizer": {"name": "kl"},
        "actor": optimizer,
        "critic": optimizer,
        "total_episodes": 16,
        "per_device_train_batch_size": 4,
        "response_length": 6,
        "save_steps": 1,
        "data": {
            "sources": [str(tiny_world / "comparisons.jsonl")],
            "eval_sources": [str(tiny_world / "comparisons_eval.jsonl")],
            "max_eval_samples": 8,
            "max_prompt_length": 48,
            "max_response_length": 16,
            "cache_dir": str(workshop / "token_ids"),
        },
        "evaluation": {"max_prompts": 6},
    }
    (workshop / "stage3.json").write_text(json.dumps(settings))
    return Sweep(workshop)


@pytest.fixture(scope="module")
def with_a_failed_cell(sweep: Sweep) -> Ended:
    """The first call, in which KL fails."""
    (sweep.workshop / "broken").write_text("beta-1.0/kl")
    ended = sweep.start()
    (sweep.workshop / "broken").unlink()
    return ended


@pytest.fixture(scope="module")
def whole(sweep: Sweep, with_a_failed_cell: Ended) -> tuple[dict[str, int], Ended]:
    """When cells were made before the second call, in which all is well, and that call."""
    before = sweep.made_at()
    return before, sweep.start()


def test_a_failed_cell_is_named_and_missing_in_the_table(
    sweep: Sweep, with_a_failed_cell: Ended
) -> None:
    printed = with_a_failed_cell.printed
    assert with_a_failed_cell.code == 1, printed[-6000:]
    assert "the reward function is broken" in printed
    assert "1 of 6 cells failed" in printed
    assert "  - beta-1.0/kl: exit code " in printed
    assert "not drawn: figure1_perplexity: it needs the cells beta-1.0/kl" in printed


def test_only_the_failed_cell_is_run_again(
    sweep: Sweep, whole: tuple[dict[str, int], Ended]
) -> None:
    before, ended = whole
    assert ended.code == 0, ended.printed[-6000:]
    assert before.keys() == set(CELLS) - {"beta-1.0/kl"}
    after = sweep.made_at()
    assert {cell: after[cell] for cell in before} == before
    for number, cell in enumerate(CELLS, start=1):
        state = "starts" if cell == "beta-1.0/kl" else "finished earlier"
        assert f"=== cell {number} of 6: {cell}: {state} ===" in ended.printed
    assert "=== beta-1.0/kl: done" in ended.printed


def test_the_table_holds_what_the_cells_measured(
    sweep: Sweep, whole: tuple[dict[str, int], Ended]
) -> None:
    rows = sweep.table()
    assert list(rows) == CELLS
    for cell, row in rows.items():
        report = json.loads((sweep.output / cell / "evaluation.json").read_text())
        assert row["status"] == "finished"
        assert float(row["pm_divergence"]) == report["pm_divergence"]["mean"]
        interval = report["kl_per_token"]["ci95"]  # None where one prompt is left
        assert row["kl_per_token_ci95"] == ("" if interval is None else str(interval))
    assert float(rows["reference"]["kl"]) == 0.0
    assert float(rows["beta-1.0/kl"]["kl"]) != 0.0
    pm = [rows[cell]["pm_divergence"] for cell in CELLS]
    assert len(set(pm)) == len(CELLS)  # each was trained with its own regularizer
    markdown = (sweep.output / "table.md").read_text()
    for beta in ("0.5", "1.0"):
        assert f"| β = {beta} | α = {ALPHA} | " in markdown
    assert markdown.count("|  | KL RLHF | ") == 4  # two rows of two tables
    assert "missing" not in markdown
    assert "\\begin{tabular}" in (sweep.output / "table.tex").read_text()


def test_all_figures_are_there(sweep: Sweep, whole: tuple[dict[str, int], Ended]) -> None:
    for name in FIGURES:
        assert (sweep.output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (sweep.output / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert "not drawn" not in whole[1].printed


def test_a_killed_cell_goes_on_to_the_same_results(
    sweep: Sweep, whole: tuple[dict[str, int], Ended]
) -> None:
    """What a kill after the second of four iterations would have left of one cell."""
    cell = f"beta-1.0/conditional_pm-{ALPHA}"
    folder, uninterrupted, before = sweep.output / cell, sweep.results(cell), sweep.made_at()
    for name in ("actor", "critic", "checkpoints/step-00000003", "checkpoints/step-00000004"):
        shutil.rmtree(folder / name)
    for name in ("evaluation.json", "instances.jsonl"):
        (folder / name).unlink()
    ended = sweep.start()
    assert ended.code == 0, ended.printed[-6000:]
    assert f"=== cell 4 of 6: {cell}: goes on from its latest checkpoint ===" in ended.printed
    assert sweep.results(cell) == uninterrupted
    after = sweep.made_at()
    assert [name for name in CELLS if after[name] != before[name]] == [cell]


def test_report_only_writes_tables_and_figures(
    sweep: Sweep, whole: tuple[dict[str, int], Ended]
) -> None:
    before, table = sweep.made_at(), (sweep.output / "table.md").read_text()
    for path in sweep.output.glob("table.*"):
        path.unlink()
    ended = sweep.run("--report", str(sweep.output))
    assert ended.code == 0, ended.printed[-6000:]
    assert (sweep.output / "table.md").read_text() == table
    assert table in ended.printed
    assert sweep.made_at() == before


def test_help_needs_no_config(sweep: Sweep) -> None:
    ended = sweep.run("--help")
    assert ended.code == 0
    assert "--report DIR" in ended.printed
    assert "#" not in ended.printed
