"""Measures an aligned policy: sampled metrics on held-out prompts, exact ones on finite sets."""

import json
from pathlib import Path
from typing import Any

from step3_rlhf.config import EvaluationConfig
from step3_rlhf.evaluation.exact import exact_metrics
from step3_rlhf.evaluation.held_out import HeldOut
from step3_rlhf.evaluation.resume import Blocks
from step3_rlhf.evaluation.sampled import held_out_perplexity, respond, sampled_metrics
from step3_rlhf.evaluation.scoring import Models
from step3_rlhf.regularizers import Regularizer
from training.runtime import ranks


def evaluate(
    models: Models,
    held_out: HeldOut,
    regularizer: Regularizer | None,
    config: EvaluationConfig,
    blocks: Blocks | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Every metric, and the per-prompt values behind the sampled ones; the same on every rank.

    Args:
        regularizer: whose optimum the policy is compared with on finite sets; None skips that.
        blocks: where finished parts are kept and looked up; None keeps none.
    """
    temperature = regularizer.preference_temperature if regularizer else 1.0
    draws = range(2 * config.evaluation.pairs_per_prompt)
    responses = [respond(models, held_out, config, draw, blocks) for draw in draws]
    report, instances = sampled_metrics(held_out.prompts, responses, temperature)
    if held_out.texts:
        report["held_out_text"] = held_out_perplexity(models, held_out, config, blocks)
    if held_out.sets:
        report["exact"] = exact_metrics(
            models, held_out.sets, regularizer, temperature, config, blocks
        )
    return report, instances


def write_evaluation(
    report: dict[str, Any], instances: list[dict[str, Any]], directory: Path
) -> None:
    """`evaluation.json` and `instances.jsonl`, by rank 0."""
    if ranks.rank() == 0:
        (directory / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in instances)
        (directory / "instances.jsonl").write_text(lines, encoding="utf-8")
    ranks.barrier()


def summary(report: dict[str, Any]) -> str:
    """The headline figures, one line each."""
    lines = [
        f"  {name + ':':<24}{report[name]['mean']:10.4f} ± {report[name]['ci95']:.4f}"
        for name in ("pm_divergence", "length", "perplexity", "entropy", "kl")
    ]
    for name in ("tv_to_reward", "tv_to_population", "tv_to_optimum", "outside_mass"):
        figure = report.get("exact", {}).get(name)
        if figure:
            lines.append(f"  {name + ':':<24}{figure['mean']:10.4f} ± {figure['ci95']:.4f}")
    return "\n".join(lines)
