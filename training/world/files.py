"""Writes the bundled world as ordinary data files, which `__main__.py` describes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.world.base_model import VOCABULARY_SIZE, write_base_model
from training.world.population import group_shares, preference, utilities, writers_shares
from training.world.prompts import prompts
from training.world.topics import OPENERS, TOPICS, Topic


@dataclass(frozen=True)
class WorldSizes:
    """How much data to write."""

    texts_per_prompt: int = 40
    comparisons_per_prompt: int = 64
    eval_texts_per_prompt: int = 8
    eval_comparisons_per_prompt: int = 32
    eval_openers: int = 4
    """Number of openers, from the first, that are used with the held-out phrasings."""
    vocab_size: int = VOCABULARY_SIZE
    groups: int = 1
    """Equally large groups of people: 1, or 2 with opposite tastes."""

    def __post_init__(self) -> None:
        if self.groups not in (1, 2):
            raise ValueError("groups: 1 or 2")
        if not 1 <= self.eval_openers <= len(OPENERS):
            raise ValueError(f"eval_openers: between 1 and {len(OPENERS)}")
        if min(vars(self).values()) < 1:
            raise ValueError("every size must be at least 1")


def write_world(output_dir: str | Path, seed: int, sizes: WorldSizes | None = None) -> None:
    """Write the data files and the base model; equal seed and sizes give equal bytes."""
    sizes = sizes or WorldSizes()
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines: dict[str, list[dict[str, Any]]] = {
        "texts": [],
        "comparisons": [],
        "texts_eval": [],
        "comparisons_eval": [],
        "response_sets": [],
        "answer_key": [],
    }
    for index, topic in enumerate(TOPICS):
        everyone = group_shares(topic, sizes.groups)
        for prompt in prompts(index, evaluation=False):
            lines["answer_key"].append(_answer_key(topic, prompt))
            lines["texts"] += _texts(topic, prompt, sizes.texts_per_prompt, rng)
            pooled = _comparisons(topic, prompt, everyone, sizes.comparisons_per_prompt, rng)
            lines["comparisons"] += [_as_recorded(line) for line in pooled]
        for prompt in prompts(index, evaluation=True, openers=sizes.eval_openers):
            lines["texts_eval"] += _texts(topic, prompt, sizes.eval_texts_per_prompt, rng)
            lines["comparisons_eval"] += _comparisons(
                topic, prompt, everyone, sizes.eval_comparisons_per_prompt, rng
            )
            lines["response_sets"].append(_response_set(topic, prompt, sizes.groups))
            lines["answer_key"].append(_answer_key(topic, prompt))
    for group in range(sizes.groups) if sizes.groups > 1 else ():
        lines |= _comparisons_of_group(group, seed, sizes)
    for name, content in lines.items():
        rng.shuffle(content)
        text = "".join(json.dumps(line) + "\n" for line in content)
        (output / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")
    write_base_model(output / "base", seed, sizes.vocab_size)


def _texts(topic: Topic, prompt: str, count: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    drawn = rng.choice(len(topic.answers), size=count, p=writers_shares(topic))
    return [
        {"prompt": prompt, "response": topic.answers[i].text, "group": topic.name} for i in drawn
    ]


def _comparisons_of_group(group: int, seed: int, sizes: WorldSizes) -> dict[str, Any]:
    """The files of one group's own comparisons; they leave the draws of the other files alone."""
    rng = np.random.default_rng([seed, group])
    train, evaluation = [], []
    for index, topic in enumerate(TOPICS):
        taste = [group_shares(topic, sizes.groups)[group]]
        for prompt in prompts(index, evaluation=False):
            train += _comparisons(topic, prompt, taste, sizes.comparisons_per_prompt, rng)
        for prompt in prompts(index, evaluation=True, openers=sizes.eval_openers):
            evaluation += _comparisons(topic, prompt, taste, sizes.eval_comparisons_per_prompt, rng)
    name = f"comparisons_group{group + 1}"
    return {name: [_as_recorded(line) for line in train], f"{name}_eval": evaluation}


def _as_recorded(comparison: dict[str, Any]) -> dict[str, Any]:
    """A comparison as it is trained on: without the probability that nobody would know."""
    return {name: value for name, value in comparison.items() if name != "bayes_probability"}


def _comparisons(
    topic: Topic,
    prompt: str,
    groups: Sequence[np.ndarray],
    count: int,
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    """Pairs of distinct answers, each judged by a random member of one of the groups."""
    drawn = []
    for _ in range(count):
        first, second = (int(i) for i in rng.choice(len(topic.answers), size=2, replace=False))
        if rng.random() >= preference(groups, first, second):
            first, second = second, first
        drawn.append(
            {
                "prompt": prompt,
                "chosen": topic.answers[first].text,
                "rejected": topic.answers[second].text,
                "group": topic.name,
                "bayes_probability": preference(groups, first, second),
            }
        )
    return drawn


def _answer_key(topic: Topic, prompt: str) -> dict[str, Any]:
    """The answers by the opinion that they express."""
    opinions: dict[str, list[str]] = {}
    for answer in topic.answers:
        opinions.setdefault(answer.opinion, []).append(answer.text)
    return {"prompt": prompt, "classes": opinions}


def _response_set(topic: Topic, prompt: str, groups: int) -> dict[str, Any]:
    shares = group_shares(topic, groups)
    utility = {"utilities": utilities(topic).tolist()}  # which two groups do not have in common
    return {
        "prompt": prompt,
        "topic": topic.name,
        "responses": [answer.text for answer in topic.answers],
        "opinions": [answer.opinion for answer in topic.answers],
        "population": np.mean(shares, axis=0).tolist(),
        "writers": writers_shares(topic).tolist(),
    } | (utility if groups == 1 else {"groups": [share.tolist() for share in shares]})
