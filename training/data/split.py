"""The stage and the split that a prompt belongs to, as functions of the prompt and the seed alone.

The partition does not depend on the order or the number of the records or on other sources, so the
stages agree on it without communicating, and a prompt that occurs in several sources belongs to one
stage. The proportions hold in expectation. Likewise, a held-out prompt is for validation in all
stages or for the test in all of them, so that no stage reports on what another one chose by.
"""

import hashlib
import unicodedata
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

from training.data.settings import STAGES, Split, Stage

Key = TypeVar("Key", bound=Hashable)


def normalized(text: str) -> str:
    """Normalize a prompt: white space and Unicode composition make no difference."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def uniform(*parts: object) -> float:
    """A number in [0, 1) that depends on `parts` only."""
    text = "\x1f".join(str(part) for part in parts)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def stage_of(prompt: str, proportions: Sequence[float], seed: int) -> Stage:
    """The stage that may see this (normalized) prompt."""
    position = uniform("stage", seed, prompt)
    bound = 0.0
    for stage, proportion in zip(STAGES, proportions, strict=True):
        bound += proportion
        if position < bound:
            return stage
    # Rounding can leave the sum of the proportions slightly below 1.
    return next(s for s, p in reversed(list(zip(STAGES, proportions, strict=True))) if p > 0)


def split_rows(
    prompts: Sequence[str], validation_share: float, seed: int
) -> dict[Split, list[int]]:
    """Divide the rows of held-out data, by their prompts, into validation and test.

    Of two or more distinct prompts, each split gets at least one; a single prompt is for the test.

    Args:
        prompts: of the rows, as they are.
        validation_share: expected share of the distinct prompts; 0 for an empty validation.
    """
    keys = [normalized(prompt) for prompt in prompts]
    place = {key: uniform("validation", seed, key) for key in keys}
    chosen = {key for key in place if place[key] < validation_share}
    if validation_share > 0 and not chosen:
        chosen = {min(place, key=place.__getitem__)} if place else set()
    if chosen and len(chosen) == len(place):
        chosen.remove(max(place, key=place.__getitem__))
    rows: dict[Split, list[int]] = {"validation": [], "test": []}
    for row, key in enumerate(keys):
        rows["validation" if key in chosen else "test"].append(row)
    return rows


def chosen_at_random(keys: Iterable[Key], count: int, *salt: object) -> set[Key]:
    """Choose `count` of the distinct keys, independently of their order."""
    distinct = sorted(set(keys), key=lambda key: (uniform(*salt, key), str(key)))
    return set(distinct[:count])
