"""Shapes to measure, with random weights and prompts of equal length."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    set_seed,
)

PAD, EOS = "<pad>", "</s>"
WORDS_IN_TEMPLATE = 8
"""At most so many tokens surround a prompt's words."""


@dataclass(frozen=True)
class Shape:
    """A Llama, and a batch for it."""

    vocabulary: int
    hidden: int
    layers: int
    batch: int
    prompt: int
    """Tokens."""
    response: int
    """Tokens."""

    def model_config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=4 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=max(1, self.hidden // 64),
            max_position_embeddings=2 * (self.prompt + self.response),
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            tie_word_embeddings=False,
        )


SHAPES = {
    "tiny": Shape(vocabulary=512, hidden=64, layers=2, batch=4, prompt=16, response=16),
    "small": Shape(vocabulary=8192, hidden=256, layers=4, batch=32, prompt=64, response=64),
    "base": Shape(vocabulary=32000, hidden=512, layers=6, batch=16, prompt=128, response=128),
    "gpu": Shape(vocabulary=32000, hidden=1536, layers=6, batch=16, prompt=256, response=256),
}


def write_inputs(shape: Shape, directory: Path) -> None:
    """Write `policy/`, `reward/`, `prompts.jsonl` and `held_out.jsonl` into the directory."""
    set_seed(0)
    tokenizer = _tokenizer(shape.vocabulary)
    reward = shape.model_config()
    reward.num_labels = 1
    for name, model in (
        ("policy", LlamaForCausalLM(shape.model_config())),
        ("reward", LlamaForSequenceClassification(reward)),
    ):
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    words = random.Random(0)
    for name, count in (("prompts", 4 * shape.batch), ("held_out", 2)):
        lines = [_record(shape, words) for _ in range(count)]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token per word: w2, w3 and so on."""
    ids = {PAD: 0, EOS: 1} | {f"w{i}": i for i in range(2, vocabulary)}
    words = Tokenizer(models.WordLevel(ids, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=PAD, eos_token=EOS, unk_token="w2"
    )


def _record(shape: Shape, words: random.Random) -> dict[str, str]:
    """A prompt that is cut to exactly `shape.prompt` tokens, and two texts."""

    def text(length: int) -> str:
        return " ".join(f"w{words.randrange(2, shape.vocabulary)}" for _ in range(length))

    return {"prompt": text(shape.prompt), "chosen": text(4), "rejected": text(4)}


def stage_config(shape: Shape, directory: Path, iterations: int) -> dict[str, Any]:
    """The stage-3 config that trains on these inputs: one PPO epoch, one mini-batch."""
    optimizer = {"learning_rate": 1e-6, "lr_scheduler_type": "constant"}
    return {
        "model_name_or_path": str(directory / "policy"),
        "output_dir": str(directory / "run"),
        "overwrite_output_dir": True,
        "reward": {"model_name_or_path": str(directory / "reward")},
        "regularizer": {"name": "kl", "beta": 0.05},
        "actor": optimizer,
        "critic": optimizer,
        "total_episodes": iterations * shape.batch,
        "per_device_train_batch_size": shape.batch,
        "per_device_eval_batch_size": shape.batch,
        "rollout_batch_size": shape.batch,
        "response_length": shape.response,
        "data": {
            "sources": [str(directory / "prompts.jsonl")],
            "eval_sources": [str(directory / "held_out.jsonl")],
            "max_prompt_length": shape.prompt,
            "max_response_length": shape.response,
        },
    }
