"""The data a policy is measured on: prompts, texts that people wrote, and finite response sets."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from step3_rlhf.config import EvaluationConfig
from step3_rlhf.prompts import dialogue
from step3_rlhf.response_sets import FiniteSet, read_response_sets
from training.data import (
    Dialogue,
    as_dialogue,
    chosen_at_random,
    dialogue_text,
    read_records,
    tokenize,
)
from training.errors import UserError
from training.runtime import ranks
from training.runtime.tracking import say


@dataclass(frozen=True)
class HeldOut:
    """Data that no stage has trained on."""

    prompt_ids: list[list[int]]
    prompts: list[Dialogue | str]  # messages, or texts that a user wrote
    texts: list[tuple[list[int], list[int]]]  # prompt and response ids of held-out text
    sets: list[FiniteSet]

    @property
    def prompt_texts(self) -> list[str]:
        """The prompts as people read them."""
        return [dialogue_text(as_dialogue(prompt)) for prompt in self.prompts]

    @property
    def digest(self) -> str:
        """A hash of all of the data."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()


def load_held_out(
    config: EvaluationConfig, prompts: Dataset, tokenizer: PreTrainedTokenizerBase
) -> HeldOut:
    """Stage 3's evaluation prompts, held-out texts, and the finite response sets.

    `max_prompts` selects prompts, texts and sets at random, the same ones for every policy.

    Args:
        prompts: rows with `messages` and `prompt_ids`.
    """
    with ranks.rank_zero_first():
        texts = held_out_texts(config, tokenizer)
    rows = chosen_rows(len(prompts), config, "prompts")
    sets = read_response_sets(config.evaluation.response_sets)
    chosen = prompts.select(rows)[:]
    return HeldOut(
        chosen["prompt_ids"],
        [dialogue(messages) for messages in chosen["messages"]],
        [texts[row] for row in chosen_rows(len(texts), config, "texts")],
        [sets[row] for row in chosen_rows(len(sets), config, "response sets")],
    )


def chosen_rows(count: int, config: EvaluationConfig, what: str) -> list[int]:
    """The numbers among 0 … count − 1 that `max_prompts` selects, in ascending order."""
    limit = config.evaluation.max_prompts
    if limit is None or limit >= count:
        return list(range(count))
    say(f"evaluation.max_prompts: {limit} of {count} held-out {what}, chosen at random")
    return sorted(chosen_at_random(range(count), limit, "max_prompts", config.data.split_seed))


def held_out_texts(
    config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompts and responses that people wrote; empty if the data has none held out."""
    try:
        records = read_records(config.data, "sft")
        data = tokenize(replace(records, train=[]), tokenizer, config.data, "sft")
    except UserError as error:
        say(f"No held-out text for perplexity: {error}")
        return []
    for line in data.tally.lines():
        say(f"held-out texts, {line}")
    texts = data.eval[:]
    return list(zip(texts["prompt_ids"], texts["response_ids"], strict=True))
