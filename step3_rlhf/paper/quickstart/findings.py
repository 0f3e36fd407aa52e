"""What the quickstart's runs measured, read from their folders."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step3_rlhf.paper.quickstart.calibration import Calibration, calibration_of
from training.data.settings import DataSettings
from training.data.split import split_rows
from training.errors import UserError
from training.plotting import ReliabilityBin
from training.world.population import true_log_loss

RUNS = ("sft", "kl", "pm", "conditional_pm")
"""The runs that every report has."""


SPLIT_BY = ("validation_share", "split_seed")
"""The settings of the data that divide held-out prompts into validation and test."""


EVALUATION_FILES = ("evaluation.json", "instances.jsonl")


AVERAGES = {"ema_average": "ema"}
"""Folders in which the averaged weights of a run are measured, and the run."""


@dataclass(frozen=True)
class Run:
    """One evaluated policy."""

    name: str
    regularizer: dict[str, Any] | None
    """As in its config.json; None for SFT, which has no regularized objective."""
    evaluation: dict[str, Any]
    instances: list[dict[str, Any]]
    method: str = ""
    """How it was trained: PPO, RLOO or "direct"; empty for SFT."""
    seconds: float | None = None
    """All optimizer steps took, with what they are made from; None where nothing was trained."""
    peak_gib: float | None = None
    """The most memory that training took."""

    @property
    def kind(self) -> str:
        """The regularizer's name in the registry; empty for SFT and for a user's own class."""
        regularizer = self.regularizer or {}
        return "" if "class" in regularizer else regularizer.get("name", "")

    def mean(self, metric: str) -> float | None:
        """Mean over prompts; None where it was not measured or is not finite."""
        return self._number(metric, "mean")

    def ci95(self, metric: str) -> float | None:
        """Half the width of the mean's 95 % confidence interval."""
        return self._number(metric, "ci95")

    def _number(self, metric: str, part: str) -> float | None:
        entry = self._exact.get(metric) or self.evaluation.get(metric)
        value = entry[part] if isinstance(entry, dict) else None
        return None if value is None or not math.isfinite(value) else float(value)

    @property
    def sets(self) -> list[dict[str, Any]]:
        """What was measured on each prompt's response set."""
        return self._exact.get("per_prompt", [])

    @property
    def _exact(self) -> dict[str, Any]:
        return self.evaluation.get("exact") or {}


@dataclass(frozen=True)
class RewardModel:
    """The reward model's calibration on held-out comparisons."""

    pairs: int
    accuracy: float
    log_loss: float
    bayes_log_loss: float
    """Of the population's true preferences."""
    ece: float
    reliability: list[ReliabilityBin]


@dataclass(frozen=True)
class Convergence:
    """How far unconditional PM is from its optimum, in nats per response.

    Its optimum, softmax(r/β) over all strings of tokens, has a probability of at most
    e^{(max r − min r)/β}/N for each of the N strings, so its entropy is at least
    log N − (max r − min r)/β. Of the N strings, (V − 2)^L are those of L tokens, none of them an
    end or padding.
    """

    entropy: float
    """Measured."""
    least_entropy: float
    """At the optimum, if all rewards lie within those that were measured."""
    lowest_reward: float
    highest_reward: float
    """On the responses drawn and on the response sets, of PM and SFT."""
    vocabulary: int
    response_length: int

    @property
    def converged(self) -> bool:
        """Whether the measured entropy reaches the least that the optimum can have."""
        return self.entropy >= self.least_entropy


@dataclass(frozen=True)
class Findings:
    """Everything that the report is made from."""

    reward_model: RewardModel
    runs: dict[str, Run]
    """Those of RUNS, then any others."""
    seed: int
    seconds: dict[str, float]
    """Of each phase of the quickstart."""
    commands: dict[str, str]
    pm: Convergence
    calibration: Calibration | None = None
    """Of the reward model; None if its phase has not run."""


def read_findings(directory: Path) -> Findings:
    """The finished runs below `directory`.

    Raises:
        UserError: names everything that is missing and the commands that make it.
    """
    require_complete(directory)
    others = (
        path.name
        for path in sorted(directory.iterdir())
        if path.name not in RUNS and is_finished_run(path)
    )
    timing = directory / "phases.json"
    phases = read_json(timing) if timing.is_file() else {}
    return Findings(
        read_reward_model(directory),
        {name: read_run(directory / name) for name in (*RUNS, *others)},
        read_json(directory / "conditional_pm" / "config.json")["seed"],
        phases.get("seconds", {}),
        phases.get("commands", {}),
        pm_convergence(directory),
        read_calibration(directory),
    )


def require_complete(directory: Path) -> None:
    """Name all missing files at once, each with the command that makes it."""
    run_files = ("config.json", *EVALUATION_FILES)
    needed = {
        "world": ("comparisons_eval.jsonl",),
        "sft": ("model",),
        "reward": ("evaluation.json",),
        "kl": run_files,
        "pm": (*run_files, "actor/config.json"),
        "conditional_pm": run_files,
        "sft_evaluation": EVALUATION_FILES,
    }
    faults = []
    for phase, names in needed.items():
        folder = directory / ("sft" if phase == "sft_evaluation" else phase)
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            command = f"bash scripts/quickstart.sh --output {directory} --only {phase}"
            faults.append(f"{folder}: {', '.join(missing)} missing; `{command}` makes it")
    if faults:
        raise UserError(faults, f"{directory} is not a finished quickstart:")


def is_finished_run(directory: Path) -> bool:
    """Whether `directory` holds an evaluated run of stage 3."""
    files = all((directory / name).is_file() for name in EVALUATION_FILES)
    return files and bool(read_config(directory).get("regularizer"))


def read_reward_model(directory: Path) -> RewardModel:
    measured = read_json(directory / "reward" / "evaluation.json")
    comparisons = of_test(
        read_lines(directory / "world" / "comparisons_eval.jsonl"),
        read_json(directory / "conditional_pm" / "config.json").get("data", {}),
    )
    return RewardModel(
        measured["pairs"],
        measured["accuracy"],
        measured["log_loss"],
        true_log_loss(comparisons),
        measured["ece"],
        measured["reliability"],
    )


def read_calibration(directory: Path) -> Calibration | None:
    path = directory / "reward" / "calibration.json"
    return calibration_of(read_json(path)) if path.is_file() else None


def pm_convergence(directory: Path) -> Convergence:
    """From the runs pm and sft: the entropy that was reached, and the least of the optimum."""
    runs = [read_run(directory / name) for name in ("pm", "sft")]
    rewards = [reward for run in runs for entry in run.sets for reward in entry["rewards"]]
    rewards += [y["reward"] for run in runs for entry in run.instances for y in entry["responses"]]
    config = read_json(directory / "pm" / "config.json")
    vocabulary = read_json(directory / "pm" / "actor" / "config.json")["vocab_size"]
    length, beta = config["response_length"], config["regularizer"]["beta"]
    spread = (max(rewards) - min(rewards)) / beta
    return Convergence(
        runs[0].evaluation["entropy"]["mean"],
        length * math.log(vocabulary - 2) - spread,
        min(rewards),
        max(rewards),
        vocabulary,
        length,
    )


def of_test(lines: list[dict[str, Any]], data: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines whose prompts belong to the test split; `data` is a config's section."""
    settings = DataSettings(sources=(), **{name: data[name] for name in SPLIT_BY if name in data})
    prompts = [line["prompt"] for line in lines]
    rows = split_rows(prompts, settings.validation_share, settings.split_seed)
    return [lines[row] for row in rows["test"]]


def read_run(directory: Path) -> Run:
    """An evaluated policy of stage 1 or 3."""
    config = read_config(directory)
    return Run(
        directory.name,
        config.get("regularizer"),
        read_json(directory / "evaluation.json"),
        read_lines(directory / "instances.jsonl"),
        method_of(config),
        *training_costs(directory / "metrics.jsonl"),
    )


def read_config(directory: Path) -> dict[str, Any]:
    """The config of the run that is measured in `directory`; {} if it has none."""
    path = directory.with_name(AVERAGES.get(directory.name, directory.name)) / "config.json"
    return read_json(path) if path.is_file() else {}


def training_costs(metrics: Path) -> tuple[float | None, float | None]:
    """Seconds of all optimizer steps, and the peak of memory in GiB; None without metrics."""
    lines = read_lines(metrics) if metrics.is_file() else []
    timed = [line for line in lines if "memory/peak_gib" in line]
    if not timed:
        return None, None
    seconds, done = 0.0, 0
    for line in timed:  # of the steps since the line before
        phases = sum(value for name, value in line.items() if name.startswith("time/"))
        seconds += (line["step"] - done) * line.get("time/iteration", phases)
        done = line["step"]
    return seconds, max(line["memory/peak_gib"] for line in timed)


def method_of(config: dict[str, Any]) -> str:
    """How the run with this config.json was trained; empty for stage 1."""
    if not config.get("regularizer"):
        return ""
    if "anchor" in config:
        return "direct"
    return "RLOO" if config.get("advantage_estimator") == "rloo" else "PPO"


def read_json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    entries = []
    # Not splitlines: it would also split a response at line separators such as U+2028.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        try:
            entries += [json.loads(line)] if line else []
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
    return entries
