"""Reads prompts whose natural responses are all known, from JSONL.

A line is {"prompt": str, "responses": [str, ...]}, optionally with "topic": str and "population":
[share, ...], the shares in which people prefer the responses; they add up to 1.
"""

import math
from dataclasses import dataclass
from typing import Any

from training.data.json_lines import parsed_lines


@dataclass(frozen=True)
class FiniteSet:
    """A prompt, its responses and, if known, the shares in which the population prefers them."""

    prompt: str
    responses: tuple[str, ...]
    population: tuple[float, ...] | None
    topic: str | None


def read_response_sets(path: str | None) -> list[FiniteSet]:
    """The sets in a file; none if `path` is None.

    Raises:
        UserError: lists every faulty line with its number.
    """
    return [] if path is None else parsed_lines(path, _parse)


def _parse(entry: Any) -> FiniteSet:
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise ValueError('an object with "prompt": str was expected')
    responses = entry.get("responses")
    if not isinstance(responses, list) or not all(isinstance(r, str) for r in responses):
        raise ValueError('"responses": a list of strings was expected')
    if len(set(responses)) != len(responses) or len(responses) < 2:
        raise ValueError('"responses": at least two different ones were expected')
    population = entry.get("population")
    if population is not None:
        shares = tuple(float(share) for share in population)
        sound = all(share >= 0.0 for share in shares) and len(shares) == len(responses)
        if not sound or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
            raise ValueError('"population": one share per response, adding up to 1, was expected')
        population = shares
    return FiniteSet(entry["prompt"], tuple(responses), population, entry.get("topic"))
