"""What the quickstart's runs measured: read from their folders, judged, put into report.json."""

import json
import math
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.world.population import true_log_loss

RUNS = ("sft", "kl", "pm", "conditional_pm")
"""The runs that every report has."""


LANGUAGE_OUTSIDE_MASS = 0.05
"""Natural language is kept if at most this much probability lies outside the response sets …"""


LANGUAGE_PERPLEXITY_RATIO = 5.0
"""… and the reference's perplexity on the responses is at most this many times SFT's own."""


MATCHING_TV = 0.1
"""Preferences are matched if the total variation to the reward model is at most this."""


@dataclass(frozen=True)
class Metric:
    """One column of the table: a key of evaluation.json and of report.json."""

    name: str
    heading: str
    title: str
    lower_is_better: bool
    meaning: str


METRICS = (
    Metric(
        "pm_divergence",
        "PM div.",
        "PM divergence",
        True,
        "KL divergence, in nats, between the choices that the policy and the reward model make "
        "between two of the policy's own responses (section 6.1)",
    ),
    Metric(
        "tv_to_reward",
        "TV rew.",
        "TV to reward model",
        True,
        "total variation, within the response set, to softmax(r/β) of the trained reward model",
    ),
    Metric(
        "tv_to_population",
        "TV pop.",
        "TV to population",
        True,
        "the same to the population's shares",
    ),
    Metric(
        "tv_to_optimum",
        "TV opt.",
        "TV to own optimum",
        True,
        "the same to the closed-form optimum of the run's own regularizer under the trained "
        "reward model; SFT has none",
    ),
    Metric(
        "outside_mass",
        "outside",
        "Outside mass",
        True,
        "probability of everything that is not in the response set",
    ),
    Metric("length", "length", "Length", False, "tokens per response, end-of-sequence included"),
    Metric(
        "perplexity",
        "perpl.",
        "Perplexity",
        False,
        "of the policy's own responses under the policy itself",
    ),
    Metric("entropy", "entropy", "Entropy", False, "mean of −log π(y|x), in nats per response"),
    Metric(
        "kl",
        "KL",
        "KL to reference",
        False,
        "mean of log π(y|x) − log π_ref(y|x), in nats per response; the reference is the SFT model",
    ),
)


@dataclass(frozen=True)
class Run:
    """One evaluated policy."""

    name: str
    regularizer: dict[str, Any] | None
    """As in its config.json; None for SFT, which has no regularized objective."""
    evaluation: dict[str, Any]
    instances: list[dict[str, Any]]

    def mean(self, figure: str) -> float | None:
        """Mean over prompts, None where there is none (or where it is not finite)."""
        return self._number(figure, "mean")

    def ci95(self, figure: str) -> float | None:
        """Half the width of the mean's 95 % confidence interval."""
        return self._number(figure, "ci95")

    def _number(self, figure: str, part: str) -> float | None:
        entry = self._exact.get(figure) or self.evaluation.get(figure)
        if not isinstance(entry, dict) or not math.isfinite(entry[part]):
            return None
        return float(entry[part])

    @property
    def sets(self) -> list[dict[str, Any]]:
        """What was measured on each prompt's response set."""
        return self._exact.get("per_prompt", [])

    @property
    def _exact(self) -> dict[str, Any]:
        return self.evaluation.get("exact") or {}


@dataclass(frozen=True)
class Findings:
    """Everything that the report is made from."""

    directory: Path
    bayes_log_loss: float
    reward: dict[str, Any]
    """The reward model's calibration report."""
    runs: dict[str, Run]
    """Those of RUNS, then any further ones."""
    seed: int
    seconds: dict[str, float]
    commands: dict[str, str]


@dataclass(frozen=True)
class Verdict:
    """A row of Table 1, as measured; None where a number is missing."""

    language: bool | None
    preferences: bool | None


def read_findings(directory: Path) -> Findings:
    """The finished runs below `directory`.

    Raises:
        UserError: that names everything that is missing and what makes it.
    """
    require_complete(directory)
    further = (
        path.name
        for path in sorted(directory.iterdir())
        if path.name not in RUNS and is_finished_run(path)
    )
    timing = directory / "phases.json"
    phases = read_json(timing) if timing.is_file() else {}
    return Findings(
        directory,
        true_log_loss(read_lines(directory / "world" / "comparisons_eval.jsonl")),
        read_json(directory / "reward" / "evaluation.json"),
        {name: read_run(directory / name) for name in (*RUNS, *further)},
        read_json(directory / "conditional_pm" / "config.json")["seed"],
        phases.get("seconds", {}),
        phases.get("commands", {}),
    )


def require_complete(directory: Path) -> None:
    """Name all missing files at once, each with the command that makes it."""
    run_files = ("evaluation.json", "instances.jsonl")
    needed = {
        "world": ("comparisons_eval.jsonl",),
        "sft": ("model",),
        "reward": ("evaluation.json",),
        "kl": ("config.json", *run_files),
        "pm": ("config.json", *run_files),
        "conditional_pm": ("config.json", *run_files),
        "sft_evaluation": run_files,
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
    """Whether it is an evaluated run of stage 3."""
    files = ("config.json", "evaluation.json", "instances.jsonl")
    return all((directory / name).is_file() for name in files) and bool(
        read_json(directory / "config.json").get("regularizer")
    )


def read_run(directory: Path) -> Run:
    """An evaluated policy, of stage 1 or 3."""
    config = directory / "config.json"
    return Run(
        directory.name,
        read_json(config).get("regularizer") if config.is_file() else None,
        read_json(directory / "evaluation.json"),
        read_lines(directory / "instances.jsonl"),
    )


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    entries = []
    # Not splitlines: a response may hold characters at which that would break a line.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        try:
            entries += [json.loads(line)] if line else []
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
    return entries


def verdict(run: Run, sft: Run) -> Verdict:
    """Whether natural language is kept and whether preferences are matched (Table 1)."""
    outside, tv = run.mean("outside_mass"), run.mean("tv_to_reward")
    perplexity, yardstick = run.mean("reference_perplexity"), sft.mean("reference_perplexity")
    language = None
    if outside is not None and perplexity is not None and yardstick is not None:
        language = (
            outside <= LANGUAGE_OUTSIDE_MASS and perplexity <= LANGUAGE_PERPLEXITY_RATIO * yardstick
        )
    return Verdict(language, None if tv is None else tv <= MATCHING_TV)


def report_of(findings: Findings, report_seconds: float) -> dict[str, Any]:
    """report.json: plain numbers are means over held-out prompts, "ci95" has their intervals."""
    runs, sft = findings.runs, findings.runs["sft"]
    means = {key: {m.name: run.mean(m.name) for m in METRICS} for key, run in runs.items()}
    report: dict[str, Any] = {
        "reward_model": {
            "accuracy": findings.reward["accuracy"],
            "log_loss": findings.reward["log_loss"],
            "bayes_log_loss": findings.bayes_log_loss,
            "ece": findings.reward["ece"],
        },
        "runs": {name: means[name] for name in RUNS},
        "ci95": {key: {m.name: run.ci95(m.name) for m in METRICS} for key, run in runs.items()},
        "table1": {
            "thresholds": {
                "outside_mass": LANGUAGE_OUTSIDE_MASS,
                "reference_perplexity_over_sft": LANGUAGE_PERPLEXITY_RATIO,
                "tv_to_reward": MATCHING_TV,
            },
            "rows": {name: table1_row(run, sft) for name, run in runs.items() if name != "sft"},
        },
        "seconds": all_seconds(findings.seconds, report_seconds),
        "versions": versions(),
        "cores": cores(),
        "seed": findings.seed,
    }
    further = {name: means[name] for name in runs if name not in RUNS}
    return report | ({"further_runs": further} if further else {})


def table1_row(run: Run, sft: Run) -> dict[str, Any]:
    found = verdict(run, sft)
    return {
        "natural_language": found.language,
        "preferences_matched": found.preferences,
        "outside_mass": run.mean("outside_mass"),
        "reference_perplexity": run.mean("reference_perplexity"),
        "tv_to_reward": run.mean("tv_to_reward"),
    }


def all_seconds(recorded: dict[str, float], report_seconds: float) -> dict[str, float]:
    """Seconds per phase, the report's own among them, and their sum."""
    phases = {**recorded, "report": round(report_seconds, 1)}
    phases.pop("total", None)
    return {**phases, "total": round(sum(phases.values()), 1)}


def versions() -> dict[str, str]:
    packages = ("torch", "deepspeed", "transformers")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def cores() -> int:
    """CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def number(value: float | None) -> str:
    """Three decimals where they mean something, in at most eight characters."""
    if value is None:
        return "–"
    if abs(value) >= 1e6:
        return f"{value:.1e}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{3 if abs(value) < 10 else 2 if abs(value) < 100 else 1}f}"
