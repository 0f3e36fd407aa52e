"""The two models of the paper, and how it numbers what it shows of each."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PaperModel:
    """The paper's numbers for one of its models."""

    table: int
    divergence_decimals: int
    """Decimals of the PM divergences in its table."""
    figures: Mapping[str, int]
    """Numbers by what a figure shows."""


PAPER_MODELS = {
    "llama-2-7b": PaperModel(
        table=2,
        divergence_decimals=2,
        figures={
            "perplexity": 1,
            "output_probabilities": 3,
            "pm_divergence": 5,
            "pm_divergence_cdf": 6,
        },
    ),
    "opt-1.3b": PaperModel(
        table=3,
        divergence_decimals=4,
        figures={
            "perplexity": 1,
            "output_probabilities": 4,
            "pm_divergence": 7,
            "pm_divergence_cdf": 8,
        },
    ),
}
DEFAULT = "llama-2-7b"
"""Whose numbers a sweep has unless `--paper-model` says otherwise."""


def model_name(path: str) -> str:
    """What the first of a model's stages started from, for captions.

    The config.json beside a stage's model says what that stage started from; a model without one is
    called by its path or Hub name.
    """
    seen: set[str] = set()
    while path not in seen and (earlier := _started_from(path)):
        seen.add(path)
        path = earlier
    return path


def _started_from(path: str) -> str | None:
    """`model_name_or_path` of the stage that wrote the model at `path`."""
    try:
        found = json.loads((Path(path).parent / "config.json").read_text(encoding="utf-8"))
        earlier = found["model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return earlier if isinstance(earlier, str) else None
