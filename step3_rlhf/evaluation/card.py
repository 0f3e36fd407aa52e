"""The model card of an aligned policy: its regularizer, what its optimum is, and its figures."""

import json
from pathlib import Path
from typing import Any

from step3_rlhf.config import AlignmentConfig
from step3_rlhf.evaluation.measure import EXACT_SUMMARY, SUMMARY
from step3_rlhf.regularizers import Regularizer
from step3_rlhf.regularizers.registry import dump_regularizer
from training.runtime.model_card import PAPER, Card, figures_of, sources_of


def policy_card(
    config: AlignmentConfig,
    regularizer: Regularizer,
    algorithm: str,
    figures: dict[str, Any] | None = None,
) -> Card:
    """What the card of `actor/` says.

    Args:
        algorithm: how it was trained, for people to read.
        figures: those of evaluation.json; None before there are any.
    """
    figures = figures or {"split": "test"}
    settings = {k: v for k, v in dump_regularizer(regularizer).items() if v is not None}
    reference = config.reference_model_name_or_path or config.model_name_or_path
    measured = {**figures, **figures.get("exact", {})}
    return Card(
        title=Path(config.output_dir).name,
        summary=f"A policy that was aligned by {algorithm}, the third stage of "
        f"[preference-matching RLHF]({PAPER}).",
        task="text-generation",
        base_model=config.model_name_or_path,
        training={
            "started from": f"`{config.model_name_or_path}`",
            "reference π_ref": f"`{reference}`",
            "rewards": rewards_of(config),
            "regularizer": f"`{json.dumps(settings, ensure_ascii=False)}`",
            "its optimum": optimum_of(config, regularizer),
            "data": sources_of([source.label for source in config.data.sources]),
            "algorithm": algorithm,
        },
        evaluated_on=f"On prompts of the {figures['split']} split; "
        "`evaluation.json` of the run has all figures, and the project's README of evaluation "
        "defines them:",
        figures=figures_of(measured, [*SUMMARY, *EXACT_SUMMARY]),
    )


def rewards_of(config: AlignmentConfig) -> str:
    """Where the rewards came from."""
    reward = config.reward
    if reward is None:
        return "none: people's comparisons themselves"
    if reward.function:
        return f"the function `{reward.function}`"
    if reward.url:
        return "a reward server"
    if reward.mixture:
        parts = [
            f"`{group.model_name_or_path}` (share {group.share:g})" for group in reward.mixture
        ]
        return f"a mixture of groups of people: {', '.join(parts)}"
    if reward.models:
        parts = [f"{model.weight:g} · `{model.model_name_or_path}`" for model in reward.models]
        return f"the sum of {', '.join(parts)}"
    return f"`{reward.model_name_or_path}`"


def optimum_of(config: AlignmentConfig, regularizer: Regularizer) -> str:
    """The optimal policy: the regularizer's own or, of groups of people, the mixture of theirs."""
    if config.group_shares:
        return f"the mixture of the groups' optima, each of which is {regularizer.optimum_formula}"
    return regularizer.optimum_formula
