"""report.json: the quickstart's numbers for programs."""

from dataclasses import asdict
from typing import Any

from step3_rlhf.evaluation.sampled import ESTIMAND
from step3_rlhf.paper.quickstart.findings import RUNS, Findings, Run
from step3_rlhf.paper.quickstart.machine import Machine
from step3_rlhf.paper.quickstart.methods import runs_of_methods
from step3_rlhf.paper.quickstart.metrics import METRICS
from step3_rlhf.paper.quickstart.table1 import THRESHOLDS, in_papers_order, verdict

REWARD_FIGURES = ("accuracy", "log_loss", "bayes_log_loss", "ece")


def report_json(findings: Findings, seconds: dict[str, float], machine: Machine) -> dict[str, Any]:
    """Plain numbers are means over test prompts; "ci95" has their intervals, by topic.

    Args:
        seconds: of each phase, the report's own included.
    """
    runs, sft = findings.runs, findings.runs["sft"]
    means = {key: {m.name: run.mean(m.name) for m in METRICS} for key, run in runs.items()}
    reward_model = asdict(findings.reward_model)
    calibration = asdict(findings.calibration) if findings.calibration else None
    if calibration:
        calibration.pop("reliability")
    report: dict[str, Any] = {
        "reward_model": {
            **{name: reward_model[name] for name in REWARD_FIGURES},
            "calibration": calibration,
        },
        "runs": {name: means[name] for name in RUNS},
        "ci95": {key: {m.name: run.ci95(m.name) for m in METRICS} for key, run in runs.items()},
        "table1": {
            "thresholds": asdict(THRESHOLDS),
            "rows": {run.name: table1_row(run, sft) for run in in_papers_order([*runs.values()])},
        },
        "estimand": ESTIMAND,
        "pm_convergence": {**asdict(findings.pm), "converged": findings.pm.converged},
        "seconds": seconds,
        "versions": machine.versions,
        "cores": machine.cores,
        "seed": findings.seed,
    }
    others = {name: means[name] for name in runs if name not in RUNS}
    costs = {
        run.name: {"training_seconds": run.seconds, "peak_gib": run.peak_gib}
        for run in runs_of_methods(runs)
    }
    report |= {"further_runs": others} if others else {}
    return report | ({"methods": costs} if costs else {})


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
    """Seconds of each phase, the report's own among them, and their sum."""
    phases = {**recorded, "report": round(report_seconds, 1)}
    phases.pop("total", None)
    return {**phases, "total": round(sum(phases.values()), 1)}
