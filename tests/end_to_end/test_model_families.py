"""OPT and Llama, tiny and random but with their real tokenizer classes, through all three stages.

Two processes and the real launcher; ZeRO 2 and ZeRO 3.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from many_runs import launch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    OPTConfig,
    OPTForCausalLM,
)

from training.models.pretrained import Pretrained
from training.world.base_model import sentencepiece_model

pytestmark = pytest.mark.launcher

FAMILIES = ("opt", "llama")
ZERO = (2, 3)


def write_opt(directory: Path, texts: list[str]) -> None:
    """GPT-2's byte-level BPE with OPT's specials: `</s>` begins and ends, `<pad>` is 1."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        texts, vocab_size=400, special_tokens=["<s>", "<pad>", "</s>", "<unk>"]
    )
    directory.mkdir()
    trained.save_model(str(directory))
    tokenizer = GPT2Tokenizer.from_pretrained(
        directory, bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>",
        add_bos_token=True,
    )  # fmt: skip
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, word_embed_proj_dim=32, ffn_dim=64,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=96,
        bos_token_id=2, eos_token_id=2, pad_token_id=1, dropout=0.0,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(directory)


def write_llama(directory: Path, texts: list[str]) -> None:
    """A sentencepiece tokenizer without a pad token, and grouped-query attention."""
    directory.mkdir()
    (directory / "tokenizer.model").write_bytes(sentencepiece_model(512))
    tokenizer = LlamaTokenizer.from_pretrained(directory, add_bos_token=True)
    tokenizer.save_pretrained(directory)
    assert tokenizer.pad_token is None
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)


WRITE: dict[str, Callable[[Path, list[str]], None]] = {"opt": write_opt, "llama": write_llama}


def stages(base: Path, world: Path, output: Path, zero: int) -> list[dict[str, Any]]:
    """SFT, reward model and PPO, each on what the one before has written."""
    section = {"zero_optimization": {"stage": zero}}

    def settings(kind: str, start: Path, name: str, **own: Any) -> dict[str, Any]:
        data = {
            "sources": [str(world / f"{kind}.jsonl")],
            "eval_sources": [str(world / f"{kind}_eval.jsonl")],
            "max_eval_samples": 5,
            "max_prompt_length": 64,
            "max_response_length": 24,
            "cache_dir": str(output / "token_ids"),
        }
        return {
            "model_name_or_path": str(start),
            "output_dir": str(output / name),
            "per_device_train_batch_size": 4,
            "deepspeed": section,
            "data": data,
            **own,
        }

    # With a tiny ε Adam turns rounding of a gradient of 0 into a whole step.
    optimizer = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "adam_epsilon": 1e-4}
    steps = {"learning_rate": 5e-3, "adam_epsilon": 1e-4, "max_steps": 3}
    return [
        {"stage": "sft", "settings": settings("texts", base, "sft", **steps)},
        {
            "stage": "reward",
            "settings": settings("comparisons", output / "sft" / "model", "reward", **steps),
        },
        {
            "stage": "ppo",
            "settings": settings(
                "comparisons",
                output / "sft" / "model",
                "ppo",
                reward={"model_name_or_path": str(output / "reward" / "model")},
                regularizer={"name": "conditional_pm", "alpha": 0.3},
                actor=optimizer,
                critic=optimizer,
                total_episodes=16,
                response_length=8,
                evaluation={"max_prompts": 4},
                **({"frozen_deepspeed": section} if zero == 3 else {}),
            ),
        },
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_world: Path) -> Path:
    directory = tmp_path_factory.mktemp("families")
    records = [json.loads(x) for x in (tiny_world / "texts.jsonl").read_text().splitlines()]
    texts = [f"{record['prompt']} {record['response']}" for record in records]
    runs = []
    for family in FAMILIES:
        base = directory / family
        WRITE[family](base, texts)
        for zero in ZERO:
            output = directory / f"{family}_{zero}"
            output.mkdir()
            runs += stages(base, tiny_world, output, zero)
    launch(2, runs, directory)
    return directory


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_stages(finished: Path, family: str, zero: int) -> None:
    output = finished / f"{family}_{zero}"
    losses = [line["train/loss"] for line in lines(output / "sft" / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    assert len(lines(output / "ppo" / "metrics.jsonl")) == 2
    assert lines(output / "ppo" / "metrics.jsonl")[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert json.loads((output / "ppo" / "evaluation.json").read_text())["prompts"] == 3
    tokenizer = AutoTokenizer.from_pretrained(output / "ppo" / "actor")
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    actor = AutoModelForCausalLM.from_pretrained(output / "ppo" / "actor")
    assert actor.get_input_embeddings().num_embeddings >= len(tokenizer)
    for critic in ("ppo/critic", "reward/model"):
        model = AutoModelForSequenceClassification.from_pretrained(output / critic)
        assert model.config.num_labels == 1
        assert model.score.weight.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_2_and_zero_3_are_the_same_run(finished: Path, family: str) -> None:
    for stage, names in {
        "sft": ("train/loss",),
        "reward": ("train/loss",),
        "ppo": ("objective/scores", "response/length", "objective/entropy"),
    }.items():
        two, three = (lines(finished / f"{family}_{z}" / stage / "metrics.jsonl") for z in ZERO)
        for name in names:
            assert [x[name] for x in two] == pytest.approx(
                [x[name] for x in three], rel=1e-3, abs=1e-4
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_bos_stands_once_before_a_prompt_and_eos_after_a_response(
    finished: Path, family: str
) -> None:
    from training.data import encode_prompts, encode_responses

    tokenizer = Pretrained(str(finished / family)).tokenizer
    (prompt,) = encode_prompts(["What is good?"], tokenizer)
    (response,) = encode_responses(["green tea"], tokenizer)
    assert prompt[0] == tokenizer.bos_token_id
    assert prompt.count(tokenizer.bos_token_id) == 1
    assert response[-1] == tokenizer.eos_token_id
    assert response.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(response, skip_special_tokens=True).strip() == "green tea"
