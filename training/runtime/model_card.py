"""The model card of an export: what it was trained on, how, and what was measured."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from training.runtime import ranks
from training.stage_config import SupervisedConfig

PAPER = "https://arxiv.org/abs/2405.16455"
TEMPLATE = """---
{{ card_data }}
---

# {{ card.title }}

{{ card.summary }}

## Training

| | |
|---|---|
{% for name, value in card.training.items() -%}
| {{ name }} | {{ value | replace("|", "\\\\|") | replace("\\n", " ") }} |
{% endfor %}
`config.json` of the run has every setting.

## Evaluation

{{ card.evaluated_on }}
{% if card.figures %}
| figure | mean | 95 % interval |
|---|---|---|
{% for figure in card.figures -%}
| {{ figure.name }} | {{ "%.4g" | format(figure.mean) }} | {{ figure.interval }} |
{% endfor %}{% endif %}"""


@dataclass(frozen=True)
class Figure:
    """A mean with half the width of its 95 % confidence interval, if it is known."""

    name: str
    mean: float
    ci95: float | None = None

    @property
    def interval(self) -> str:
        return "" if self.ci95 is None else f"± {self.ci95:.2g}"


@dataclass(frozen=True)
class Card:
    """What a card says."""

    title: str
    summary: str
    task: str
    """The Hub's name of what the model does, such as "text-generation"."""
    base_model: str
    training: Mapping[str, str]
    """Settings worth knowing, by their names for people."""
    evaluated_on: str
    figures: Sequence[Figure]


def write_card(directory: Path, card: Card) -> None:
    """Write `README.md` into an export, as the Hugging Face Hub shows it; rank 0 does.

    The Hub's field `base_model` is only set to what can be a model's name there, and not to a path.
    """
    if ranks.rank() == 0:
        data = ModelCardData(
            library_name="transformers",
            pipeline_tag=card.task,
            tags=["rlhf", "preference-matching"],
            base_model=card.base_model if is_hub_name(card.base_model) else None,
        )
        written = ModelCard.from_template(data, template_str=TEMPLATE, card=card)
        (directory / "README.md").write_text(str(written).rstrip() + "\n", encoding="utf-8")
    ranks.barrier()


def is_hub_name(name: str) -> bool:
    """Whether a model's name can be one of the Hub's: owner/name, and no path of this machine."""
    parts = name.split("/")
    return (
        len(parts) == 2
        and all(parts)
        and parts[0] not in (".", "..", "~")
        and not (Path(name).exists())
    )


def figures_of(evaluation: Mapping[str, Any], names: Sequence[str]) -> list[Figure]:
    """Those of `names` that an evaluation has, in their order, without those not finite."""
    found = []
    for name in names:
        value = evaluation.get(name)
        if isinstance(value, Mapping) and "mean" in value:
            mean, ci95 = value["mean"], value.get("ci95")
        else:
            mean, ci95 = value, evaluation.get(f"{name}_ci95")
        if isinstance(mean, (int, float)) and math.isfinite(mean):
            found.append(Figure(name, float(mean), ci95))
    return found


def supervised_training(config: SupervisedConfig) -> dict[str, str]:
    """The rows of a model card that say how it was trained."""
    length = f"{config.num_train_epochs:g} epochs"
    return {
        "started from": f"`{config.model_name_or_path}`",
        "data": sources_of([source.label for source in config.data.sources]),
        "length": f"{config.max_steps} steps" if config.max_steps else length,
        "learning rate": f"{config.learning_rate:g}, {config.lr_scheduler_type}",
    }


def sources_of(labels: Sequence[str]) -> str:
    """The data sets, for a row of the card."""
    return ", ".join(f"`{label}`" for label in labels)
