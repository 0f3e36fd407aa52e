"""What the model of a sweep is called, and the paper's numbers for it."""

import json
from pathlib import Path

import pytest

from step3_rlhf.paper.grid.paper_models import LLAMA, OPT, Shown, model_name, shown_as


def stage(directory: Path, started_from: str) -> Path:
    """A stage's config.json in a directory that holds no model."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"model_name_or_path": started_from}))
    return directory


def test_the_name_is_what_the_first_stage_started_from(tmp_path: Path) -> None:
    sft = stage(tmp_path / "runs" / "mine" / "sft", "facebook/opt-1.3b")
    assert model_name(str(sft / "model")) == "facebook/opt-1.3b"
    kl = stage(tmp_path / "runs" / "mine" / "kl", str(sft / "model"))
    assert model_name(str(kl / "actor")) == "facebook/opt-1.3b"
    (sft / "config.json").unlink()  # the control: without it there is only the path
    assert model_name(str(kl / "actor")) == "mine"


def test_relative_paths_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stage(Path("runs/opt-1.3b/sft"), "facebook/opt-1.3b")
    assert model_name("runs/opt-1.3b/sft/model") == "facebook/opt-1.3b"


def test_a_circle_of_stages_ends(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    stage(one, str(other / "model"))
    stage(other, str(one / "model"))
    assert model_name(str(one / "model")) == "one"


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_name_or_path": 3}', '"text"'])
def test_a_config_that_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "smol").mkdir()
    (tmp_path / "smol" / "config.json").write_text(text)
    assert model_name(str(tmp_path / "smol" / "model")) == "smol"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("facebook/opt-1.3b", "facebook/opt-1.3b"),
        ("gpt2", "gpt2"),
        ("runs/opt-1.3b/sft/model", "opt-1.3b"),
        ("llama/model", "llama"),
        ("runs/quickstart/world/base", "quickstart"),
        ("/models/Llama-2-7b-hf/", "Llama-2-7b-hf"),
        ("/x/opt-125m/checkpoints/step-00000003", "opt-125m"),
        ("../opt-125m/checkpoint-30", "opt-125m"),
        ("runs/smollm2/SmolLM2-135M-Instruct.gguf", "SmolLM2-135M-Instruct"),
        ("here/SmolLM2.gguf", "SmolLM2"),
        ("/hub/models--facebook--opt-1.3b/snapshots/3f5c25d0b", "facebook/opt-1.3b"),
        ("/model", "/model"),
    ],
)
def test_a_name_without_a_stage(path: str, expected: str) -> None:
    assert model_name(path) == expected


def test_a_directory_that_looks_like_a_hub_name_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_name("models/opt-125m") == "models/opt-125m"
    Path("models/opt-125m").mkdir(parents=True)
    assert model_name("models/opt-125m") == "opt-125m"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("facebook/opt-1.3b", OPT),
        ("OPT-1.3B", OPT),
        ("my_opt_6.7b", OPT),
        ("opt1.3b", OPT),
        ("meta-llama/Llama-2-7b-hf", LLAMA),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", LLAMA),
        ("optimus-7b", LLAMA),  # the letters, not the word
        ("llama-adopt", LLAMA),
    ],
)
def test_only_opt_has_opts_numbers(name: str, expected: Shown) -> None:
    assert shown_as(name) == expected


def test_the_papers_numbers() -> None:
    assert (LLAMA.table, list(LLAMA.figures.values())) == (2, [1, 3, 5, 6])
    assert (OPT.table, list(OPT.figures.values())) == (3, [1, 4, 7, 8])
