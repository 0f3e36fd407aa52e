"""A policy's answers to one question, exactly: its distribution over the board's answers."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Board:
    """What an evaluation says of one question; all distributions are conditional on the board."""

    group: str
    """`unseen` or `seen`, or `validation`."""
    id: str
    prompt: str
    answers: list[str]
    people: Tensor
    """[K] float64, in the order of `answers`; so are the others."""
    policy: Tensor
    reference: Tensor
    reward: Tensor
    """softmax(r/β)."""
    rewards: Tensor
    """r, in nats at β = 1."""
    optimum: Tensor | None
    """Of the run's own regularizer; None where it has none."""
    outside: float | None
    """The policy's probability of everything that is not on the board; None for a distribution
    that has no such thing."""
    other_answers: float | None = None
    """The part of it that other strings have which count as answers; None where the data has no
    such strings."""

    @property
    def question(self) -> str:
        """The question itself, without the answers that may be listed below it."""
        return self.prompt.partition("\n")[0]

    def giving(self, distribution: Tensor) -> "Board":
        """The same board with another distribution [K] in the policy's place."""
        return replace(self, policy=distribution, optimum=None, outside=None, other_answers=None)


def boards_of(evaluation: dict[str, Any]) -> list[Board]:
    """The boards in an evaluation.json, in its order."""
    entries = (evaluation.get("exact") or {}).get("per_prompt", [])
    strings = {
        topic.replace("-strings/", "/"): entry["outside_mass"]
        for entry in entries
        if "-strings/" in (topic := entry["topic"])
    }
    return [
        _board(entry, strings.get(entry["topic"]))
        for entry in entries
        if "-strings/" not in entry["topic"]
    ]


def _board(entry: dict[str, Any], outside_all_strings: float | None) -> Board:
    group, _, identity = entry["topic"].partition("/")
    outside = entry["outside_mass"]

    def numbers(name: str) -> Tensor:
        return torch.tensor(entry[name], dtype=torch.float64)

    return Board(
        group,
        identity,
        entry["prompt"],
        entry["responses"],
        numbers("population"),
        numbers("policy"),
        numbers("reference"),
        numbers("reward"),
        numbers("rewards"),
        numbers("optimum") if "optimum" in entry else None,
        outside,
        None if outside_all_strings is None else max(0.0, outside - outside_all_strings),
    )
