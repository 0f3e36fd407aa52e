"""The model that a sweep starts from: what it is called, and where the paper shows one like it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


HUB_CACHE = re.compile(r"models--([^/]+?)--([^/]+)")
"""The Hub's own directory for a downloaded model."""


SAYS_NOTHING = re.compile(r"model|base|world|actor|sft|checkpoints?|(checkpoint|step)-\d+|/|\.+")
"""Parts of a path that are the same for every model."""


def model_name(path: str) -> str:
    """`facebook/opt-1.3b` for `runs/opt-1.3b/sft/model`: what the first of its stages started from.

    A stage's config.json, beside its model, says what that stage started from; what has none is
    a Hub name, or a path of which the last part that says something is the name.
    """
    seen: set[str] = set()
    while path not in seen and (earlier := _started_from(path)):
        seen.add(path)
        path = earlier
    if cached := HUB_CACHE.search(path):
        return f"{cached[1]}/{cached[2]}"
    if HUB_NAME.fullmatch(path) and not (Path(path).exists() or _says_nothing(path)):
        return path
    parts = [part for part in Path(path).parts if not SAYS_NOTHING.fullmatch(part)]
    return parts[-1].removesuffix(".gguf") if parts else path


def _started_from(path: str) -> str | None:
    """`model_name_or_path` of the stage that wrote the model at `path`."""
    try:
        found = json.loads((Path(path).parent / "config.json").read_text(encoding="utf-8"))
        earlier = found["model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return earlier if isinstance(earlier, str) else None


def _says_nothing(path: str) -> bool:
    last = Path(path).name
    return bool(SAYS_NOTHING.fullmatch(last)) or last.endswith(".gguf")


@dataclass(frozen=True)
class Shown:
    """How the paper shows one of its models."""

    table: int
    divergence_decimals: int
    """Of the table's PM divergences."""
    figures: Mapping[str, int]
    """Numbers by what a figure shows."""


LLAMA = Shown(
    table=2,
    divergence_decimals=2,
    figures={
        "perplexity": 1,
        "output_probabilities": 3,
        "pm_divergence": 5,
        "pm_divergence_cdf": 6,
    },
)


OPT = Shown(
    table=3,
    divergence_decimals=4,
    figures={
        "perplexity": 1,
        "output_probabilities": 4,
        "pm_divergence": 7,
        "pm_divergence_cdf": 8,
    },
)


def shown_as(name: str) -> Shown:
    """OPT's numbers where the name has the word OPT; for all others Llama-2's, which come first."""
    return OPT if re.search(r"(?<![a-z])opt(?![a-z])", name, re.IGNORECASE) else LLAMA
