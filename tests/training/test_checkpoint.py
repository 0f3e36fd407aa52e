"""What is exported loads with from_pretrained, in safetensors, whole or not at all."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from step1_sft.config import SFTConfig
from training import engine
from training.checkpoint import Checkpoints, complete_checkpoints, export
from training.config import check_config
from training.errors import RunError
from training.models import Policy

pytestmark = pytest.mark.usefixtures("process_group")


def test_an_export_loads_and_is_the_same_model(
    any_model: PreTrainedModel, world_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    export(any_model, world_tokenizer, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    own = any_model.state_dict()
    assert loaded.state_dict().keys() == own.keys()
    assert all(torch.equal(value, own[name]) for name, value in loaded.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "\n\nHuman: Please suggest a drink\n\nAssistant: tea"
    assert tokenizer(text).input_ids == world_tokenizer(text).input_ids
    assert tokenizer.pad_token_id == world_tokenizer.pad_token_id
    weights = [path.name for path in (tmp_path / "model").iterdir() if path.stat().st_size > 1e4]
    assert "model.safetensors" in weights
    assert not [name for name in weights if name.endswith((".bin", ".pt", ".pth"))]


def test_an_export_replaces_an_older_one(
    tiny_llama: PreTrainedModel, world_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    export(tiny_llama, world_tokenizer, directory)
    (directory / "stale.txt").write_text("old")
    (tmp_path / "model.unfinished").mkdir()  # left behind by a run that was killed
    with torch.no_grad():
        tiny_llama.lm_head.weight.zero_()
    export(tiny_llama, world_tokenizer, directory)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (directory / "stale.txt").exists()
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert not loaded.lm_head.weight.any()


def test_a_failed_export_leaves_the_older_one(
    tiny_llama: PreTrainedModel,
    world_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    export(tiny_llama, world_tokenizer, tmp_path / "model")

    def full_disk(*arguments: object, **named: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(type(world_tokenizer), "save_pretrained", full_disk)
    with pytest.raises(OSError, match="no space"):
        export(tiny_llama, world_tokenizer, tmp_path / "model")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_a_partitioned_model_is_exported_whole(
    tiny_llama: PreTrainedModel, world_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    own = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    section = {"zero_optimization": {"stage": 3}}
    engine.frozen(Policy(tiny_llama), section, torch.float32)
    assert engine.is_partitioned(tiny_llama)
    export(tiny_llama, world_tokenizer, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(value, own[name]) for name, value in loaded.items())


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Real writes fail beyond `size` bytes, as they do on a full disk."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one_usable(
    stage_settings: Callable[[str], dict[str, Any]], tiny_llama: PreTrainedModel
) -> None:
    settings = stage_settings("sft") | {"save_total_limit": 1}
    config = check_config(SFTConfig, settings, "config:")
    trained = engine.TrainedModule(Policy(tiny_llama), config, config, 10)
    checkpoints = Checkpoints(config, {"model": trained})
    checkpoints.save(1, {"of": "step 1"})
    (checkpoints.directory.parent / "config.json").write_text("{}")
    own = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    with torch.no_grad():
        tiny_llama.lm_head.weight.zero_()

    with (
        no_file_larger_than(4096),
        pytest.raises(RunError, match=r"step 2 could not be written(.|\n)*step-00000001"),
    ):
        checkpoints.save(2, {"of": "step 2"})
    assert [path.name for path in checkpoints.directory.iterdir()] == ["step-00000001"]

    resumed = check_config(SFTConfig, settings | {"resume_from_checkpoint": "latest"}, "config:")
    assert Checkpoints(resumed, {"model": trained}).restore() == (1, {"of": "step 1"})
    restored = trained.module.model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in restored.items())


def test_leftovers_of_a_killed_save_are_cleared(
    stage_settings: Callable[[str], dict[str, Any]], tiny_llama: PreTrainedModel
) -> None:
    config = check_config(SFTConfig, stage_settings("sft"), "config:")
    trained = engine.TrainedModule(Policy(tiny_llama), config, config, 10)
    checkpoints = Checkpoints(config, {"model": trained})
    for leftover in ("step-00000001.unfinished", "step-00000002.removed"):
        (checkpoints.directory / leftover / "model").mkdir(parents=True)
    checkpoints.save(3, {})
    assert complete_checkpoints(checkpoints.directory) == [checkpoints.directory / "step-00000003"]
    assert [path.name for path in checkpoints.directory.iterdir()] == ["step-00000003"]
