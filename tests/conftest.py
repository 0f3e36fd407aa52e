"""What several test files share: a small world on disk, tiny random models, a process group."""

# ruff: noqa: E402 (what is set before the imports is for them)

import gc
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
gc.disable()  # the imports below make some hundred thousand objects, none of which is garbage

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from training.models.pretrained import Pretrained
from training.world.files import WorldSizes, write_world

PAD, BOS, EOS = 3, 1, 2
STARTS_PROCESSES = {"recorded", "run_quickstart"}
"""Fixtures that run scripts or other processes."""
VOCABULARY = 64
TESTS = Path(__file__).parent
LONGEST = [
    TESTS / name
    for name in (
        "end_to_end/test_sharding.py",
        "end_to_end/test_fuzz.py",
        "end_to_end/test_pipeline.py",
        "step3_rlhf/test_convergence.py",
        "end_to_end/test_interruptions.py",
        "end_to_end/test_sweep.py",
        "end_to_end/test_multinode.py",
        "step3_rlhf/paper/people/test_experiment.py",
        "end_to_end/test_resume.py",
        "end_to_end/test_model_families.py",
        "training/models/test_lora.py",
        "test_on_a_gpu.py",
    )
]
"""The files that take longest come first, so that all workers end at the same time. Of two that run
side by side, at most one keeps several processes busy: on two cores, processes that wait for one
another by spinning would take turns with the rest."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {path: place for place, path in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))
    for item in items:
        if STARTS_PROCESSES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.launcher)


def pytest_collection_finish() -> None:
    """Collect garbage again from here on, without going through what the imports made."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled world with few records, its base model included."""
    directory = tmp_path_factory.mktemp("tiny_world")
    write_world(directory, seed=1, sizes=WorldSizes(1, 1, 1, 1, 1))
    sets = (directory / "response_sets.jsonl").read_text().splitlines(keepends=True)
    (directory / "two_sets.jsonl").write_text("".join(sets[:2]))
    return directory


@pytest.fixture(scope="session")
def world_tokenizer(tiny_world: Path) -> PreTrainedTokenizerBase:

    return Pretrained(str(tiny_world / "base")).tokenizer


@pytest.fixture(params=["tiny_llama", "tiny_opt", "tiny_gpt2"])
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Rotary positions; learned ones that the model derives from the mask; learned ones that it
    does not."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    """Random weights, grouped-query attention."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return _sharpened(LlamaForCausalLM(config).eval())


@pytest.fixture
def tiny_opt() -> PreTrainedModel:
    """Random weights, learned positions, tied embeddings, dropout as OPT has it."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        dropout=0.1,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return _sharpened(OPTForCausalLM(config).eval())


@pytest.fixture
def tiny_gpt2() -> PreTrainedModel:
    """Random weights; left padding shifts its positions unless they are given."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return _sharpened(GPT2LMHeadModel(config).eval())


def _sharpened(model: PreTrainedModel) -> PreTrainedModel:
    """Random weights are small and give almost uniform distributions; larger ones tell apart."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    return model


@pytest.fixture(scope="session")
def process_group() -> Iterator[None]:
    """A process group of one, as the launcher would prepare it; DeepSpeed engines need one.

    One for the whole session: DeepSpeed cannot join a second one.
    """
    from training.runtime import ranks

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setenv(name, value)
        with pytest.MonkeyPatch.context() as address:  # no child process may meet at it
            address.setenv("MASTER_ADDR", "127.0.0.1")
            address.setenv("MASTER_PORT", str(port))
            ranks.connect()
        yield
        ranks.disconnect()


@pytest.fixture(scope="session")
def settings_in(tiny_world: Path) -> Callable[[str, Path], dict[str, Any]]:
    """The JSON of a sound config of each stage, on the tiny world, that writes into a directory."""

    def settings(stage: str, directory: Path) -> dict[str, Any]:
        kind = "texts" if stage == "sft" else "comparisons"
        common: dict[str, Any] = {
            "model_name_or_path": str(tiny_world / "base"),
            "output_dir": str(directory / stage),
            "per_device_train_batch_size": 4,
            "data": {
                "sources": [str(tiny_world / f"{kind}.jsonl")],
                "eval_sources": [str(tiny_world / f"{kind}_eval.jsonl")],
                "max_eval_samples": 8,
                "max_prompt_length": 48,
                "max_response_length": 16,
                "cache_dir": str(directory / "token_ids"),
            },
        }
        evaluated = {
            "response_length": 6,
            "evaluation": {
                "response_sets": str(tiny_world / "two_sets.jsonl"),
                "max_prompts": 4,
            },
        }
        if stage != "ppo":
            supervised = common | {"learning_rate": 1e-3, "max_steps": 2}
            direct = {"regularizer": {"name": "pm"}, **evaluated}
            return supervised | (direct if stage == "direct" else {})
        return (
            common
            | evaluated
            | {
                "reward": {"model_name_or_path": str(tiny_world / "base")},
                "regularizer": {"name": "pm"},
                "actor": {"learning_rate": 1e-3, "lr_scheduler_type": "constant"},
                "critic": {"learning_rate": 1e-3, "lr_scheduler_type": "constant"},
                "total_episodes": 8,
            }
        )

    return settings


@pytest.fixture
def stage_settings(
    settings_in: Callable[[str, Path], dict[str, Any]], tmp_path: Path
) -> Callable[[str], dict[str, Any]]:
    """The same for the test's own directory."""
    return lambda stage: settings_in(stage, tmp_path)
