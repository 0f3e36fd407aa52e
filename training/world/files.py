"""Writes the bundled world as ordinary data files, which `__main__.py` describes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.world.base_model import VOCABULARY_SIZE, write_base_model
from training.world.population import (
    population_shares,
    preference_probability,
    utilities,
    writers_shares,
)
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

    def __post_init__(self) -> None:
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
        for prompt in prompts(index, evaluation=False):
            lines["answer_key"].append(_answer_key(topic, prompt))
            lines["texts"] += _texts(topic, prompt, sizes.texts_per_prompt, rng)
            for line in _comparisons(topic, prompt, sizes.comparisons_per_prompt, rng):
                del line["bayes_probability"]
                lines["comparisons"].append(line)
        for prompt in prompts(index, evaluation=True, openers=sizes.eval_openers):
            lines["texts_eval"] += _texts(topic, prompt, sizes.eval_texts_per_prompt, rng)
            lines["comparisons_eval"] += _comparisons(
                topic, prompt, sizes.eval_comparisons_per_prompt, rng
            )
            lines["response_sets"].append(_response_set(topic, prompt))
            lines["answer_key"].append(_answer_key(topic, prompt))
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


def _comparisons(
    topic: Topic, prompt: str, count: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    drawn = []
    for _ in range(count):
        first, second = (int(i) for i in rng.choice(len(topic.answers), size=2, replace=False))
        if rng.random() >= preference_probability(topic, first, second):
            first, second = second, first
        drawn.append(
            {
                "prompt": prompt,
                "chosen": topic.answers[first].text,
                "rejected": topic.answers[second].text,
                "group": topic.name,
                "bayes_probability": preference_probability(topic, first, second),
            }
        )
    return drawn


def _answer_key(topic: Topic, prompt: str) -> dict[str, Any]:
    """The answers by the opinion that they express."""
    opinions: dict[str, list[str]] = {}
    for answer in topic.answers:
        opinions.setdefault(answer.opinion, []).append(answer.text)
    return {"prompt": prompt, "classes": opinions}


def _response_set(topic: Topic, prompt: str) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "topic": topic.name,
        "responses": [answer.text for answer in topic.answers],
        "opinions": [answer.opinion for answer in topic.answers],
        "population": population_shares(topic).tolist(),
        "writers": writers_shares(topic).tolist(),
        "utilities": utilities(topic).tolist(),
    }
