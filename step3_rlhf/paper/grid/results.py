"""What the finished cells of a sweep measured, and the words that go with it."""

import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from step3_rlhf.evaluation.metrics import pm_divergence
from step3_rlhf.paper.grid.cells import Cell, Grid, is_finished
from step3_rlhf.paper.grid.paper_models import PAPER_MODELS, PaperModel, model_name
from training.errors import UserError
from training.statistics import Estimate

HELD_OUT = "held_out_perplexity"
"""Of people's own texts under the policy: `held_out_text` in evaluation.json."""

OWN = "perplexity_pooled"
"""Of the policy's own responses."""

CHOOSES = "pm_divergence_reference"
"""The figure by which the best α is chosen."""


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt: their log-odds in nats, seen by reference and reward model."""

    reference: float
    """log π_ref(y1|x) − log π_ref(y2|x)."""
    reward: float
    """r_θ(x, y1) − r_θ(x, y2), not yet divided by β."""


class Measured:
    """One finished cell's evaluation.json and instances.jsonl."""

    def __init__(self, directory: Path) -> None:
        self.report: dict[str, Any] = json.loads((directory / "evaluation.json").read_text())
        self._instances = directory / "instances.jsonl"

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """Every figure with an interval, by its name in evaluation.json."""
        found = {
            name: Estimate(**{"clusters": value["count"], **value})
            for name, value in self.report.items()
            if isinstance(value, dict) and {"mean", "ci95"} <= value.keys()
        }
        if texts := self.report.get("held_out_text"):
            mean, half = texts["perplexity"], texts["perplexity_ci95"]
            count, low, high = texts["texts"], texts["perplexity_low"], texts["perplexity_high"]
            found[HELD_OUT] = Estimate(mean, half, count, texts["clusters"], low, high, "log t")
        return found

    def estimate(self, name: str) -> Estimate:
        return self.estimates[name]

    @cached_property
    def divergences(self) -> list[float]:
        """Instance PM divergence of every prompt, of its first pair of responses.

        Section 6.1 has one pair; a mean over several would hide how far apart they are.
        """
        pairs = [entry["responses"][:2] for entry in self.instances()]

        def column(name: str, place: int) -> Tensor:
            return torch.tensor([pair[place][name] for pair in pairs], dtype=torch.float64)

        divergence = pm_divergence(
            column("logp", 0),
            column("logp", 1),
            column("reward", 0),
            column("reward", 1),
            self.report["preference_temperature"],
        )
        return list(divergence.tolist())

    def pairs(self) -> list[Pair]:
        """The first two responses of every prompt, where they are not the same text."""
        found = []
        for entry in self.instances():
            first, second = entry["responses"][:2]
            if first["text"] != second["text"]:
                reference = first["ref_logp"] - second["ref_logp"]
                found.append(Pair(reference, first["reward"] - second["reward"]))
        return found

    def instances(self) -> list[dict[str, Any]]:
        """The lines of instances.jsonl, one for each prompt."""
        return [json.loads(line) for line in self._instances.open(encoding="utf-8")]


@dataclass(frozen=True)
class Results:
    """A sweep as far as it is finished."""

    grid: Grid
    measured: dict[Cell, Measured]

    def get(self, cell: Cell) -> Measured | None:
        return self.measured.get(cell)

    @cached_property
    def model(self) -> str:
        """The model's name, for captions."""
        return self.grid.name or model_name(self.grid.model)

    @property
    def paper_model(self) -> PaperModel:
        """The paper's numbers for tables and figures."""
        return PAPER_MODELS[self.grid.paper_model]

    @property
    def missing(self) -> list[str]:
        return [cell.name for cell in self.grid.cells() if cell not in self.measured]

    @property
    def any(self) -> Measured:
        return next(iter(self.measured.values()))


def read_results(
    directory: Path, name: str | None = None, paper_model: str | None = None
) -> Results:
    """Every finished cell of the sweep in `directory`.

    Args:
        name: the model's, in place of the sweep's own.
        paper_model: whose numbers tables and figures have, in place of the sweep's own.

    Raises:
        UserError: it is no sweep, none of its cells is finished, or one was evaluated before there
            was the figure that chooses.
    """
    grid = Grid.read(directory)
    if name:
        grid = replace(grid, name=name)
    if paper_model:
        grid = replace(grid, paper_model=paper_model)
    finished = [cell for cell in grid.cells() if is_finished(directory / cell.name)]
    if not finished:
        raise UserError(f"{directory}: no cell of this sweep is finished")
    measured = {cell: Measured(directory / cell.name) for cell in finished}
    outdated = [cell.name for cell in finished if CHOOSES not in measured[cell].report]
    if outdated:
        again = [f"bash scripts/evaluate.sh {directory / name}" for name in outdated]
        raise UserError(again, f"{CHOOSES}, which chooses α, is not in evaluation.json; evaluate:")
    return Results(grid, measured)


def best_alpha(results: Results, beta: float) -> Cell | None:
    """Conditional PM with the lowest divergence of this β on pairs that the reference drew.

    The paper's "optimal α" has the lowest PM divergence. A policy that always gives one answer has
    0 of it, so nothing is chosen by it here.
    """
    cells = [cell for cell in results.grid.row(beta) if cell.alpha is not None]
    found = {
        cell: measured.estimate(CHOOSES).mean
        for cell in cells
        if (measured := results.get(cell)) is not None and CHOOSES in measured.estimates
    }
    return min(found, key=lambda cell: found[cell]) if found else None


def sigmoid(x: float) -> float:
    """1 / (1 + e^{−x}) for any x."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def cell_label(cell: Cell) -> str:
    """As in the paper's tables."""
    names = {"kl": "KL RLHF", "pm": "PM RLHF", "reference": "reference"}
    return names.get(cell.kind) or f"{threshold_name(cell)} = {cell.alpha:g}"


def threshold_name(cell: Cell) -> str:
    """What conditional PM's number is called."""
    return "log α" if cell.alpha is not None and cell.alpha < 0 else "α"
