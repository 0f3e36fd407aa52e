"""Which stage a prompt belongs to: a function of the prompt and the seed alone.

The partition does not depend on the order of the records, on their number or on the other
sources, so all stages agree on it without talking to one another, and a prompt that stands in
several sources lands in one stage. The proportions are met in expectation.
"""

import hashlib
import unicodedata
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

from training.data.settings import STAGES, Stage

Key = TypeVar("Key", bound=Hashable)


def normalized(text: str) -> str:
    """Texts that differ in white space or Unicode composition only are one prompt."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def uniform(*parts: object) -> float:
    """A number in [0, 1) that is a fixed function of `parts`."""
    text = "\x1f".join(str(part) for part in parts)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def stage_of(prompt: str, proportions: Sequence[float], seed: int) -> Stage:
    """The one stage that may see this (normalized) prompt."""
    position = uniform("stage", seed, prompt)
    bound = 0.0
    for stage, proportion in zip(STAGES, proportions, strict=True):
        bound += proportion
        if position < bound:
            return stage
    # Rounding: the proportions sum to a little less than 1.
    return next(s for s, p in reversed(list(zip(STAGES, proportions, strict=True))) if p > 0)


def chosen_at_random(keys: Iterable[Key], count: int, *salt: object) -> set[Key]:
    """`count` of the distinct keys, whatever the order in which they come."""
    distinct = sorted(set(keys), key=lambda key: (uniform(*salt, key), str(key)))
    return set(distinct[:count])
