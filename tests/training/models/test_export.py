"""What is exported loads with from_pretrained, in safetensors, whole or not at all."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from step1_sft.config import SFTConfig
from training.config import check_config
from training.errors import RunError
from training.models.export import InterimExports, export, write_where_there_is_room
from training.models.partitioned import is_partitioned
from training.models.policy import Policy
from training.runtime import engine
from training.runtime.disk import draft_of, publish
from training.runtime.model_card import Card, Figure

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
    assert is_partitioned(tiny_llama)
    export(tiny_llama, world_tokenizer, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(value, own[name]) for name, value in loaded.items())


def test_weights_that_have_no_room_are_written_where_there_is(tmp_path: Path) -> None:
    """Both kinds of errors are real: the kernel's own, and one of safetensors' class."""
    written: list[Path] = []
    wanted = tmp_path / "runs" / "sft" / "model"

    def write(place: Path) -> None:
        draft = draft_of(place)
        if place == wanted:
            Path("/dev/full").write_text("x")
        (draft / "weights").write_text("w")
        publish(draft, place)
        written.append(place)

    with pytest.raises(RunError, match="The model was written to") as caught:
        write_where_there_is_room(write, wanted)
    (place,) = written
    assert str(place) in str(caught.value)
    assert (place / "weights").read_text() == "w"
    assert place.name.startswith("saved-sft-model-")
    assert place.parent.stat().st_dev != wanted.parent.stat().st_dev
    assert list(wanted.parent.iterdir()) == []  # the draft was removed, which made room
    shutil.rmtree(place)

    def full(place: Path) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(RunError, match="the model could not be written"):
        write_where_there_is_room(full, wanted)


def test_other_errors_of_writing_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    def write(place: Path) -> None:
        raise PermissionError(13, "Permission denied", str(place))

    with pytest.raises(PermissionError):
        write_where_there_is_room(write, tmp_path)


def test_exports_on_the_way(stage_settings, tmp_path: Path) -> None:
    settings = stage_settings("sft") | {"export_steps": 2, "output_dir": str(tmp_path / "run")}
    config = check_config(SFTConfig, settings, "config:")
    weights = iter("abc")

    def write(place: Path) -> None:
        place.mkdir(parents=True)
        (place / "weights").write_text(next(weights))

    figure = Figure("loss", 0.5)
    card = Card("run", "A model.", "text-generation", "a/b", {"data": "`d`"}, "On d:", [figure])
    exports = InterimExports(config, {"model": write}, card)
    for step in range(1, 7):
        exports.after(step, steps=6)
    assert sorted(path.name for path in exports.directory.iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]  # the weights after the last step are the run's own export
    written = exports.directory / "step-00000004" / "model"
    assert (written / "weights").read_text() == "b"
    text = (written / "README.md").read_text()
    assert "# run, step 4" in text
    assert "these are the weights after 4 of 6 steps" in text
    assert "0.5" not in text  # no figures of other weights
