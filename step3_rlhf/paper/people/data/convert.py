"""ProtoQA's questions → the files that the three stages read."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from step3_rlhf.paper.people.data.phrasing import rephrased
from step3_rlhf.paper.people.data.questions import Kept, Question
from step3_rlhf.paper.people.data.records import (
    Form,
    Prior,
    Record,
    answers_elsewhere,
    asked,
    prompt,
    ranking,
    response_sets,
    texts,
)
from training.data.settings import DataSettings
from training.data.split import normalized, stage_of, uniform
from training.runtime.json_text import json_text

PROPORTIONS = (0.2, 0.4, 0.4)
"""Shares of the questions for SFT, the reward model and stage 3."""

VALIDATION, TEST = 0.05, 0.10
"""Shares of each stage's questions that are held out."""

Part = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Sizes:
    """How much of the data is used."""

    texts: int = 2
    """Texts of each question for SFT, under people's prior."""
    sft_questions: int | None = 500
    """Questions that SFT learns; None is all of its share, as in the others."""
    reward_questions: int | None = 240
    """Questions that the reward model learns."""
    rankings: int = 12
    """Rankings of each of them, each asked with the answers in another order."""
    elsewhere: int = 1
    """Answers of other questions that each ranking ends with."""
    shared: int | None = 240
    """Of the reward model's questions, those that the policies learn too; the seen ones are among
    them."""
    asked: int | None = 320
    """Questions from its own share that stage 3 asks beside these, if it draws answers."""
    held_out: int = 48
    """Held-out questions of SFT and of the reward model, half of which choose the weights. Direct
    optimization takes half as many."""
    measured: int = 80
    """Questions of each held-out set that are measured."""
    sampled: int = 8
    """Unseen questions to which each policy draws answers, for the page."""
    validation: int = 32
    """Questions by which α is chosen."""


@dataclass(frozen=True)
class Split:
    """The questions of each stage, in a random order."""

    stages: dict[str, dict[Part, list[Question]]]

    def of(self, stage: str, part: Part, limit: int | None = None) -> list[Question]:
        return self.stages[stage][part][:limit]

    def held_out(self, stage: str, limit: int) -> list[Question]:
        """Validation and test together, which the stage itself divides by its own rule."""
        return [*self.of(stage, "validation"), *self.of(stage, "test")][:limit]


def split(questions: Iterable[Question], seed: int) -> Split:
    """Each question belongs to one stage and, there, to training, validation or test.

    Both are functions of the question's words and the seed alone, as the project's own split is.
    """
    stages: dict[str, dict[Part, list[Question]]] = {
        stage: {"train": [], "validation": [], "test": []} for stage in ("sft", "reward", "ppo")
    }
    for question in sorted(questions, key=lambda question: uniform("order", seed, question.key)):
        place = uniform("held out", seed, question.key)
        part: Part = "train"
        if place < VALIDATION + TEST:
            part = "validation" if place < VALIDATION else "test"
        stages[stage_of(question.key, PROPORTIONS, seed)][part].append(question)
    return Split(stages)


@dataclass(frozen=True)
class Files:
    """Everything that the stages read, by the name of the file without .jsonl."""

    records: dict[str, list[Record]]
    counts: dict[str, int]
    direct_proportions: tuple[float, float, float]
    """`data.stage_proportions` under which direct optimization learns all rankings but one."""


def convert(kept: Kept, prior: Prior, form: Form, sizes: Sizes, seed: int) -> Files:
    """The records of every stage.

    The held-out questions are `unseen` (stage 3's own, which no stage learns) and `seen`: questions
    that the reward model and the policy learn, in words that none of them reads.
    """
    parts = split(kept.questions, seed)

    def words(question: Question, text: str | None = None, number: int = 0) -> str:
        return asked(question, text or question.text, form, seed, number)

    def rewards(questions: list[Question]) -> list[Record]:
        return [
            ranking(
                question,
                words(question, number=number),
                answers_elsewhere(question, kept.questions, sizes.elsewhere, seed, number),
                seed,
                number,
            )
            for question in questions
            for number in range(sizes.rankings)
        ]

    def written(questions: list[Question]) -> list[Record]:
        return [
            text
            for question in questions
            for text in texts(question, words(question), prior, sizes.texts, seed)
        ]

    learned = parts.of("reward", "train", sizes.reward_questions)
    shared = learned[: sizes.shared]
    drawn_to = [*shared, *parts.of("ppo", "train", sizes.asked)]
    unseen = [(question, words(question)) for question in parts.of("ppo", "test", sizes.measured)]
    # Direct optimization evaluates on prompts of the stage `ppo` and insists on training prompts
    # of it too: the shared prompt that lies last is left to that stage, and its question is not
    # measured.
    places = {
        stage_position(words(question, number=number)): question
        for question in shared
        for number in range(sizes.rankings)
    }
    *_, before, last = sorted(places)
    spare, learned_share = places[last], (before + last) / 2
    found, failures = reworded([q for q in shared if q is not spare], sizes.measured)
    seen = [(question, words(question, text)) for question, text in found]
    validation = parts.of("ppo", "validation", sizes.validation)
    records = {
        "texts": written(parts.of("sft", "train", sizes.sft_questions)),
        "texts_eval": written(parts.held_out("sft", sizes.held_out)),
        "rewards": rewards(learned),
        "rankings": rewards(shared),
        "rewards_eval": rewards(parts.held_out("reward", sizes.held_out)),
        "rankings_eval": rewards(parts.held_out("reward", sizes.held_out // 2)),
        "prompts": [prompt(question, words(question)) for question in drawn_to],
        "prompts_eval": [prompt(question, text) for question, text in unseen[: sizes.sampled]],
        "sets_validation": [
            entry
            for question in validation
            for entry in response_sets(question, words(question), "validation")
        ],
        "prompts_validation": [prompt(question, words(question)) for question in validation],
        "sets_eval": [
            entry
            for label, questions in (("unseen", unseen), ("seen", seen))
            for question, text in questions
            for entry in response_sets(question, text, label)
        ],
    }
    counts = {
        "read": kept.read,
        **{f"left out: {reason}": count for reason, count in kept.left_out.items()},
        "used": len(kept.questions),
        **{
            f"{stage}: {part}": len(questions)
            for stage, of in parts.stages.items()
            for part, questions in of.items()
        },
        "learned by the reward model": len(learned),
        "learned by the policies too": len(shared) - 1,
        "asked by stage 3": len(drawn_to),
        "unseen questions": len(unseen),
        "seen questions in unseen words": len(seen),
        "without a second phrasing, left out of these": failures,
    }
    return Files(records, counts, (0.0, learned_share, 1 - learned_share))


def reworded(questions: list[Question], limit: int) -> tuple[list[tuple[Question, str]], int]:
    """The first questions with a second phrasing, and how many before the last had none."""
    found: list[tuple[Question, str]] = []
    failures = 0
    taken = {question.text for question in questions}
    for question in questions:
        if len(found) == limit:
            break
        text = rephrased(question.text)
        if text is None or text in taken:
            failures += 1
        else:
            found.append((question, text))
    return found, failures


def stage_position(prompt: str) -> float:
    """Where a prompt lies in the split that the stages' own data settings make."""
    return uniform("stage", DataSettings.model_fields["split_seed"].default, normalized(prompt))


def write_files(files: Files, directory: Path, sizes: Sizes) -> None:
    """Write the JSONL files, and counts.json beside them, which is written last."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, records in files.records.items():
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    counts = {
        "counts": files.counts,
        "sizes": asdict(sizes),
        "direct_proportions": files.direct_proportions,
    }
    (directory / "counts.json").write_text(json_text(counts))
