"""The data a policy is measured on: prompts, texts that people wrote, and finite response sets."""

import hashlib
import json
from dataclasses import asdict, dataclass, field

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from step3_rlhf.config import EvaluationConfig
from step3_rlhf.prompts import dialogue
from step3_rlhf.response_sets import FiniteSet, read_response_sets
from training.data import (
    Dialogue,
    Split,
    as_dialogue,
    chosen_at_random,
    dialogue_text,
    read_records,
    split_rows,
    tokenize,
)
from training.errors import UserError
from training.fitting import held_out_splits
from training.runtime import ranks
from training.runtime.tracking import say


@dataclass(frozen=True)
class HeldOut:
    """Data of one split that no stage has trained on.

    The lists of groups have the cluster of each prompt and of each text: what they share with
    others that are not independent of them. Where they are empty, each is by itself.
    """

    prompt_ids: list[list[int]]
    prompts: list[Dialogue | str]  # messages, or texts that a user wrote
    texts: list[tuple[list[int], list[int]]]  # prompt and response ids of held-out text
    sets: list[FiniteSet]
    groups: list[str] = field(default_factory=list)
    text_groups: list[str] = field(default_factory=list)
    split: Split = "test"

    @property
    def prompt_texts(self) -> list[str]:
        """The prompts as people read them."""
        return [dialogue_text(as_dialogue(prompt)) for prompt in self.prompts]

    @property
    def digest(self) -> str:
        """A hash of all of the data."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()


def load_held_out(
    config: EvaluationConfig,
    prompts: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    split: Split = "test",
) -> HeldOut:
    """Stage 3's evaluation prompts, held-out texts, and the finite response sets of a split.

    `max_prompts` selects prompts, texts and sets at random, the same ones for every policy.

    Args:
        prompts: all held-out rows, with `messages`, `prompt`, `group` and `prompt_ids`.
    """
    with ranks.rank_zero_first():
        texts = held_out_texts(config, tokenizer)
    prompts = held_out_splits(prompts, config.data)[split]
    texts = texts.select(rows_of(texts["prompt"][:], config, split))
    chosen = prompts.select(chosen_rows(len(prompts), config, "prompts"))[:]
    written = texts.select(chosen_rows(len(texts), config, "texts"))[:]
    sets = read_response_sets(config.evaluation.response_sets)
    sets = [sets[row] for row in rows_of([finite.prompt for finite in sets], config, split)]
    return HeldOut(
        chosen["prompt_ids"],
        [dialogue(messages) for messages in chosen["messages"]],
        list(zip(written["prompt_ids"], written["response_ids"], strict=True)),
        [sets[row] for row in chosen_rows(len(sets), config, "response sets")],
        chosen["group"],
        written["group"],
        split,
    )


def rows_of(prompts: list[str], config: EvaluationConfig, split: Split) -> list[int]:
    """The numbers of the held-out prompts that belong to `split`."""
    return split_rows(prompts, config.data.validation_share, config.data.split_seed)[split]


def chosen_rows(count: int, config: EvaluationConfig, what: str) -> list[int]:
    """The numbers among 0 … count − 1 that `max_prompts` selects, in ascending order."""
    limit = config.evaluation.max_prompts
    if limit is None or limit >= count:
        return list(range(count))
    say(f"evaluation.max_prompts: {limit} of {count} held-out {what}, chosen at random")
    return sorted(chosen_at_random(range(count), limit, "max_prompts", config.data.split_seed))


def held_out_texts(config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Token ids of prompts and responses that people wrote; empty if the data has none held out."""
    try:
        records = read_records(config.data, "sft", held_out_only=True)
        data = tokenize(records, tokenizer, config.data, "sft")
    except UserError as error:
        say(f"No held-out text for perplexity: {error}")
        return Dataset.from_dict({"prompt": [], "group": [], "prompt_ids": [], "response_ids": []})
    for line in data.tally.lines():
        say(f"held-out texts, {line}")
    return data.eval
