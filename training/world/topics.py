"""The topics of the bundled world, read from topics.json.

Shares are percentages. The writers, whose texts stage 1 learns from, differ strongly from the
population; this difference is the bias that a KL-regularized policy inherits. Answers that express
the same opinion in different words (tea, tea with milk) share their `opinion`. The population is
split 51 to 49 between coffee and tea.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Answer:
    """An answer, and the percentage of each group that gives it."""

    text: str
    population: float
    writers: float
    opinion: str


@dataclass(frozen=True)
class Topic:
    """The subject of questions: `noun` fits "Which ...", `article` + noun "Please suggest ..."."""

    name: str
    article: str
    noun: str
    answers: tuple[Answer, ...]


def _topic(entry: dict[str, Any]) -> Topic:
    answers = tuple(Answer(**{"opinion": a["text"], **a}) for a in entry["answers"])
    return Topic(entry["name"], entry["article"], entry["noun"], answers)


_CONTENT = json.loads(Path(__file__).with_name("topics.json").read_text(encoding="utf-8"))

TOPICS: tuple[Topic, ...] = tuple(_topic(entry) for entry in _CONTENT["topics"])
PHRASINGS: tuple[str, ...] = tuple(_CONTENT["phrasings"])
"""`{a}` is the noun with its article, `{noun}` the bare noun."""
OPENERS: tuple[str, ...] = tuple(_CONTENT["openers"])
