"""Which model a place names, and what it is called."""

import json
from pathlib import Path
from typing import Any

import pytest

from step3_rlhf.chat.sources import short_names, sources_of
from training.errors import UserError


def directory(path: Path, **config: Any) -> str:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of stage 3, of stage 1 and of stage 2."""
    for name, folder, architecture in (
        ("pm", "actor", "LlamaForCausalLM"),
        ("sft", "model", "LlamaForCausalLM"),
        ("reward", "model", "LlamaForSequenceClassification"),
    ):
        directory(tmp_path / name, output_dir=name)
        directory(tmp_path / name / folder, model_type="llama", architectures=[architecture])
    return tmp_path


def test_a_run_is_its_policy(run: Path) -> None:
    actor, model = sources_of([str(run / "pm"), f"{run / 'sft'}/"])
    assert (actor.path, actor.name) == (str(run / "pm" / "actor"), "pm")
    assert (model.path, model.name) == (str(run / "sft" / "model"), "sft")
    assert "stage 3" in actor.origin
    assert str(model) == f"sft: {model.path} (the model of a run of stage 1)"


def test_a_model_is_itself_whatever_lies_in_it(run: Path) -> None:
    actor = run / "pm" / "actor"
    directory(actor / "model", model_type="llama")
    (source,) = sources_of([str(actor)])
    assert (source.path, source.name, source.origin) == (str(actor), "pm/actor", "")


def test_a_name_of_the_hub_stays_as_it_is() -> None:
    (source,) = sources_of(["owner/name"])
    assert (source.path, source.name) == ("owner/name", "name")


@pytest.mark.parametrize(
    ("places", "names"),
    [
        (["runs/a/kl", "runs/a/pm"], ["kl", "pm"]),
        (["runs/a/kl", "runs/b/kl"], ["a/kl", "b/kl"]),
        (["runs/a/kl", "runs/b/kl", "runs/b/pm"], ["a/kl", "b/kl", "pm"]),
        (["runs/kl/actor", "runs/kl/actor_ema"], ["kl/actor", "kl/actor_ema"]),
        (["kl", "runs/kl"], ["kl", "runs/kl"]),
        (["actor"], ["actor"]),
    ],
)
def test_names_are_short_and_distinct(places: list[str], names: list[str]) -> None:
    assert short_names([tuple(place.split("/")) for place in places]) == names


@pytest.mark.parametrize(
    ("place", "fault"),
    [
        ("reward", "reward/model is a reward model: it scores answers and writes none"),
        ("unfinished", "unfinished is neither a model's directory"),
        ("empty", "empty is neither a model's directory"),
        ("nowhere", "nowhere does not exist"),
        ("pm/config.json", "pm/config.json is a file"),
        ("quantized", "quantized is quantized (awq)"),
    ],
)
def test_what_is_no_policy_is_named_with_its_reason(run: Path, place: str, fault: str) -> None:
    directory(run / "unfinished", output_dir="unfinished")
    (run / "empty").mkdir()
    directory(run / "quantized", model_type="llama", quantization_config={"quant_method": "awq"})
    with pytest.raises(UserError) as error:
        sources_of([str(run / place), str(run / "pm")])
    assert len(error.value.faults) == 1
    assert fault in str(error.value)


def test_a_relative_path_of_two_parts_is_no_hub_name(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    with pytest.raises(UserError, match="pm/nothing does not exist"):
        sources_of(["pm/nothing"])


def test_one_model_named_twice(run: Path) -> None:
    with pytest.raises(UserError, match="one model, named twice"):
        sources_of([str(run / "pm"), str(run / "pm" / "actor")])


def test_a_name_that_no_file_can_have() -> None:
    with pytest.raises(UserError, match=r"MODEL: x{300}.*: File name too long"):
        sources_of(["x" * 300])
