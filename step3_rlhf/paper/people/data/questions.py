"""ProtoQA's questions (Boratko et al. 2020): what about 100 people each answered, and how often."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from training.errors import UserError

HUB_NAME = "proto_qa"

ANSWERS = range(3, 9)
"""How many different answers a question may have."""

TOTALS = range(80, 103)
"""How many people's answers they may stand for: rare ones are missing from the board."""


@dataclass(frozen=True)
class Question:
    """A question and its board: the answers that several people gave."""

    id: str
    text: str
    answers: tuple[str, ...]
    """The most frequent first."""
    counts: tuple[int, ...]
    """How many people gave each answer."""
    strings: tuple[tuple[str, ...], ...] = ()
    """All strings that count as each answer, as crowd workers wrote them; the board's own alone
    where the data has no others."""

    @property
    def shares(self) -> tuple[float, ...]:
        """The population's distribution over the board's answers."""
        total = sum(self.counts)
        return tuple(count / total for count in self.counts)

    @property
    def key(self) -> str:
        """The same for two questions that differ in punctuation or capitals only."""
        return " ".join(re.findall(r"[a-z0-9']+", self.text.lower()))


@dataclass(frozen=True)
class Kept:
    """The questions that are used, and how many were left out for which reason."""

    questions: list[Question]
    read: int
    left_out: dict[str, int]

    def lines(self) -> list[str]:
        """What becomes of the questions, for the terminal."""
        reasons = [f"{count:,} left out: {reason}" for reason, count in self.left_out.items()]
        return [f"{self.read:,} questions read", *reasons, f"{len(self.questions):,} used"]


def read_questions(path: str | None) -> Kept:
    """The questions of a file in ProtoQA's schema, or of the Hub's data set.

    Args:
        path: a .jsonl or .jsonl.gz file; None for the train split on the Hub.

    Raises:
        UserError: with every line that has another schema.
    """
    if path is None:
        return usable(_parsed(_hub_records(), f"the Hub's {HUB_NAME}"))
    try:
        opened = gzip.open if path.endswith(".gz") else open
        with opened(path, "rt", encoding="utf-8") as file:
            lines = [line for line in file if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: unreadable: {error}") from None
    return usable(_parsed(lines, path))


def usable(questions: Iterable[Question]) -> Kept:
    """Leave out the questions whose boards say little about a population, with the reasons."""
    kept: dict[str, Question] = {}
    left_out: Counter[str] = Counter()
    read = 0
    for question in questions:
        read += 1
        reason = _unusable(question)
        if reason is None and question.key in kept:
            reason = "repeats another question"
        if reason is None:
            kept[question.key] = question
        else:
            left_out[reason] += 1
    return Kept(list(kept.values()), read, dict(left_out))


def _unusable(question: Question) -> str | None:
    if 0 in question.counts:
        return "an answer that nobody gave"
    if len(question.answers) not in ANSWERS:
        return f"not {ANSWERS[0]} to {ANSWERS[-1]} answers"
    if sum(question.counts) not in TOTALS:
        return f"answers of not {TOTALS[0]} to {TOTALS[-1]} people"
    return None


def _parsed(lines: Iterable[Any], where: str) -> list[Question]:
    questions, faults = [], []
    for number, line in enumerate(lines, start=1):
        try:
            questions.append(parse(json.loads(line) if isinstance(line, str) else line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            faults.append(f"{where}:{number}: {type(error).__name__}: {error}")
    if faults:
        more = [f"... and {len(faults) - 20} more"] if len(faults) > 20 else []
        raise UserError([*faults[:20], *more], "These are not ProtoQA's questions:")
    return questions


def parse(record: dict[str, Any]) -> Question:
    """A question from ProtoQA's own schema, or from the columns that the Hub makes of it.

    In the development files a cluster has the strings of several crowd workers. The board shows
    the first, and people's answers are counted by cluster.

    Raises:
        KeyError, TypeError, ValueError: for another schema.
    """
    if "answer-clusters" in record:
        identity, text = record["id"], record["normalized-question"] or record["question"]
        clusters = record["answer-clusters"]
        if isinstance(clusters, dict):  # a list for each field
            counted = list(zip(clusters["count"], clusters["answers"], strict=True))
        else:
            counted = [(cluster["count"], cluster["answers"]) for cluster in clusters]
    else:
        identity = record["metadata"]["id"]
        text = record["question"].get("normalized") or record["question"]["original"]
        clusters = record["answers"]["clusters"].values()
        counted = [(cluster["count"], cluster["answers"]) for cluster in clusters]
    return Question(str(identity), " ".join(text.split()), *_board(counted))


def _board(
    counted: list[tuple[int, list[str]]],
) -> tuple[tuple[str, ...], tuple[int, ...], tuple[tuple[str, ...], ...]]:
    """Answers, counts and strings, the most frequent answer first; equal answers are one."""
    found: dict[str, tuple[int, tuple[str, ...]]] = {}
    for count, answers in counted:
        strings = tuple(dict.fromkeys(" ".join(answer.split()) for answer in answers))
        if not strings or not all(strings) or count < 0:
            raise ValueError("a cluster needs answers and a count")
        earlier, known = found.get(strings[0], (0, ()))
        found[strings[0]] = (earlier + int(count), tuple(dict.fromkeys(known + strings)))
    ranked = sorted(found.items(), key=lambda item: -item[1][0])
    counts, groups = zip(*(entry for _, entry in ranked), strict=True)
    return tuple(answer for answer, _ in ranked), counts, groups


def _hub_records() -> list[dict[str, Any]]:
    from datasets import load_dataset

    try:
        return list(load_dataset(HUB_NAME, "proto_qa", split="train"))
    except Exception as error:  # the Hub, the network and the cache each raise their own
        raise UserError(
            f"{HUB_NAME} could not be loaded from the Hub ({error}); pass --data with its "
            "train.jsonl, as at https://github.com/iesl/protoqa-data"
        ) from None
