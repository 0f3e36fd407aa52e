"""Measures an aligned policy: sampled metrics on held-out prompts, exact ones on finite sets."""

from pathlib import Path
from typing import Any

from step3_rlhf.config import EvaluationConfig
from step3_rlhf.evaluation.exact import exact_metrics
from step3_rlhf.evaluation.held_out import HeldOut
from step3_rlhf.evaluation.responses import under_one_reward
from step3_rlhf.evaluation.resume import FinishedBlocks
from step3_rlhf.evaluation.sampled import held_out_perplexity, respond, sampled_metrics
from step3_rlhf.evaluation.scoring import Models
from step3_rlhf.regularizers import Regularizer
from training.runtime import ranks
from training.runtime.json_text import json_line, json_text

SUMMARY = (
    "pm_divergence",
    "pm_divergence_unequal",
    "pm_divergence_reference",
    "equal_pairs",
    "natural_mass",
    "optimum_gap",
    "optimum_kl",
    "length",
    "perplexity",
    "entropy",
    "kl",
)
NEED_A_REWARD = (
    "pm_divergence",
    "pm_divergence_unequal",
    "pm_divergence_reference",
    "pm_squared_difference",
    "reward",
    "optimum_gap",
    "optimum_spread",
    "optimum_kl",
    "exact.tv_to_reward",
    "exact.kl_to_reward",
    "exact.tv_to_optimum",
    "exact.kl_to_optimum",
)
"""Figures that are null without a reward."""
EXACT_SUMMARY = ("tv_to_reward", "tv_to_population", "tv_to_optimum", "outside_mass")


def evaluate(
    models: Models,
    held_out: HeldOut,
    regularizer: Regularizer | None,
    config: EvaluationConfig,
    finished: FinishedBlocks | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure everything.

    Args:
        regularizer: the policy is compared with its optimum on finite sets; None skips that.
        finished: keeps finished blocks and gives back those of a stopped evaluation; None keeps
            none.

    Returns:
        The figures of evaluation.json and the lines of instances.jsonl, the same on every rank.
    """
    temperature = regularizer.preference_temperature if regularizer else 1.0
    draws = range(2 * config.evaluation.pairs_per_prompt)
    responses = [respond(models, held_out, config, draw, finished, regularizer) for draw in draws]
    reference = responses  # of SFT, which is its own reference
    if models.reference is not models.policy:
        reference = [
            respond(models, held_out, config, draw, finished, from_reference=True) for draw in draws
        ]
    if config.group_shares:
        beta = regularizer.coefficient if regularizer else temperature
        is_own = reference is responses
        responses, reference = under_one_reward(responses, reference, config.group_shares, beta)
        reference = responses if is_own else reference
    figures, instances = sampled_metrics(
        held_out.prompt_texts,
        responses,
        reference,
        temperature,
        regularizer,
        held_out.groups,
        config.group_shares,
    )
    calibration = config.beta_calibration
    figures = {
        "split": held_out.split,
        "beta_calibration": calibration and calibration.model_dump(mode="json"),
        "left_out": [] if models.reward else list(NEED_A_REWARD),
        **figures,
    }
    if held_out.texts:
        figures["held_out_text"] = held_out_perplexity(models, held_out, config, finished)
    if held_out.sets:
        figures["exact"] = exact_metrics(
            models, held_out.sets, regularizer, temperature, config, finished
        )
    return figures, instances


def write_evaluation(
    figures: dict[str, Any], instances: list[dict[str, Any]], directory: Path
) -> None:
    """Write `evaluation.json` and `instances.jsonl`; rank 0 does."""
    if ranks.rank() == 0:
        (directory / "evaluation.json").write_text(json_text(figures))
        lines = "".join(json_line(entry) for entry in instances)
        (directory / "instances.jsonl").write_text(lines, encoding="utf-8")
    ranks.barrier()


def summary(figures: dict[str, Any]) -> str:
    """The main figures, one line each."""
    shown = [figures.get(name) for name in SUMMARY] + [
        figures.get("exact", {}).get(name) for name in EXACT_SUMMARY
    ]
    lines = [
        line_of(name, figure)
        for name, figure in zip(SUMMARY + EXACT_SUMMARY, shown, strict=True)
        if figure
    ]
    if figures.get("left_out"):
        lines.append(f"  left out, for lack of a reward: {', '.join(figures['left_out'])}")
    return "\n".join(lines)


def line_of(name: str, figure: dict[str, Any]) -> str:
    """A mean and, if there is more than one cluster, its interval."""
    interval = "" if figure["ci95"] is None else f" ± {figure['ci95']:.4f}"
    return f"  {name + ':':<26}{figure['mean']:10.4f}{interval}"
