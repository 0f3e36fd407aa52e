"""What the experiment's runs measured, read from their folders."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step3_rlhf.paper.people.boards import Board, boards_of
from step3_rlhf.paper.people.measure import (
    FIGURES,
    majority,
    measure,
    sampling_distance,
    squared,
    uniform,
)
from step3_rlhf.paper.people.reward_model import RewardModel, measure_reward_model
from step3_rlhf.paper.quickstart.findings import read_json, read_lines
from training.errors import UserError
from training.statistics import Estimate

GROUPS = {
    "seen": "Seen questions in unseen words",
    "unseen": "Unseen questions",
}
"""The two held-out sets."""

POLICIES = {"sft": "SFT", "kl": "KL", "conditional_pm": "Conditional PM"}


@dataclass(frozen=True)
class Run:
    """A policy, in all seeds."""

    name: str
    boards: dict[str, list[Board]]
    """By seed; SFT has one."""
    instances: dict[str, list[dict[str, Any]]]
    """The lines of instances.jsonl, by seed."""
    regularizer: dict[str, Any] | None
    outcome: dict[str, Any]
    """evaluation.json of the first seed."""

    @property
    def label(self) -> str:
        return POLICIES[self.name]

    def of(self, group: str) -> list[list[Board]]:
        """One list for each seed."""
        return [
            [board for board in boards if board.group == group] for boards in self.boards.values()
        ]


@dataclass(frozen=True)
class Row:
    """A row of a table: figures of a policy, or of a distribution beside the policies."""

    name: str
    figures: dict[str, Estimate | None]


@dataclass(frozen=True)
class Findings:
    """Everything that the report is made from."""

    runs: dict[str, Run]
    reward_models: dict[str, RewardModel]
    """By group."""
    tables: dict[str, list[Row]]
    """By group."""
    alpha: dict[str, Any]
    counts: dict[str, int]
    sizes: dict[str, Any]
    options: dict[str, Any]
    steps: dict[str, dict[str, Any]]


def read_findings(directory: Path) -> Findings:
    """The finished runs below `directory`; seeds of which only some runs are finished count too.

    Raises:
        UserError: names what is missing.
    """
    runs = {name: run for name in POLICIES if (run := read_run(directory, name)) is not None}
    needed = ["options.json", "alpha.json", "steps.json", "data/counts.json"]
    missing = [str(directory / name) for name in needed if not (directory / name).is_file()]
    missing += [f"a finished {name}" for name in POLICIES if name not in runs]
    if missing:
        raise UserError(
            [*missing, f"`bash scripts/people.sh --output {directory}` makes them"],
            f"{directory} is not a finished experiment; missing:",
        )
    converted = read_json(directory / "data" / "counts.json")
    sft = {group: runs["sft"].of(group)[0] for group in GROUPS}
    return Findings(
        runs,
        {group: measure_reward_model(boards) for group, boards in sft.items()},
        {group: table(runs, group) for group in GROUPS},
        read_json(directory / "alpha.json"),
        converted["counts"],
        converted["sizes"],
        read_json(directory / "options.json"),
        read_json(directory / "steps.json"),
    )


def read_run(directory: Path, name: str) -> Run | None:
    """A policy's finished evaluations in all seeds; None if there is none."""
    found = {
        folder.parent.name.removeprefix("seed-"): folder
        for folder in sorted(directory.glob(f"seed-*/{name}"))
    }
    if name == "sft":
        found = {"": directory / "sft_test"}
    finished = {
        seed: folder
        for seed, folder in found.items()
        if (folder / "evaluation.json").is_file() and (folder / "instances.jsonl").is_file()
    }
    if not finished:
        return None
    outcomes = {seed: read_json(folder / "evaluation.json") for seed, folder in finished.items()}
    first = next(iter(finished.values()))
    config = first / "config.json"
    return Run(
        name,
        {seed: boards_of(outcome) for seed, outcome in outcomes.items()},
        {seed: read_lines(folder / "instances.jsonl") for seed, folder in finished.items()},
        read_json(config).get("regularizer") if name != "sft" and config.is_file() else None,
        next(iter(outcomes.values())),
    )


def table(runs: dict[str, Run], group: str) -> list[Row]:
    """The policies, and what they are compared with, on one group of questions."""
    (sft,) = runs["sft"].of(group)
    rows = [
        Row("people", figures_of([[b.giving(b.people) for b in sft]])),
        Row("reward", figures_of([[b.giving(b.reward) for b in sft]])),
        *(Row(name, figures_of(run.of(group))) for name, run in runs.items()),
        *(_reference(name, make, sft) for name, make in REFERENCES.items()),
    ]
    sampled = measure([sft], lambda b: sampling_distance(b.people))
    return [*rows, Row("other_people", {"tv_to_people": sampled})]


REFERENCES = {"uniform": uniform, "majority": majority, "squared": squared}
"""Distributions that no model has to be trained for, from people's shares."""


def _reference(name: str, make: Callable[[Any], Any], boards: Sequence[Board]) -> Row:
    return Row(name, figures_of([[board.giving(make(board.people)) for board in boards]]))


def figures_of(runs: Sequence[Sequence[Board]]) -> dict[str, Estimate | None]:
    """Every figure, averaged over seeds and then over questions."""
    return {name: measure(runs, figure) for name, figure in FIGURES.items()}
