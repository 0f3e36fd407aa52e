"""What the model of a sweep is called, and the paper's numbers for it."""

import json
from pathlib import Path

import pytest

from step3_rlhf.paper.grid.paper_models import DEFAULT, PAPER_MODELS, model_name


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
    assert model_name(str(kl / "actor")) == str(sft / "model")


def test_relative_paths_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stage(Path("runs/opt-1.3b/sft"), "facebook/opt-1.3b")
    assert model_name("runs/opt-1.3b/sft/model") == "facebook/opt-1.3b"


def test_a_circle_of_stages_ends(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    stage(one, str(other / "model"))
    stage(other, str(one / "model"))
    assert model_name(str(one / "model")) == str(one / "model")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_name_or_path": 3}', '"text"'])
def test_a_config_that_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "smol").mkdir()
    (tmp_path / "smol" / "config.json").write_text(text)
    path = str(tmp_path / "smol" / "model")
    assert model_name(path) == path


@pytest.mark.parametrize("path", ["facebook/opt-1.3b", "runs/llama/model", "here/SmolLM2.gguf"])
def test_a_model_without_a_stage_is_called_by_its_path(path: str) -> None:
    assert model_name(path) == path


def test_the_papers_numbers() -> None:
    llama, opt = PAPER_MODELS["llama-2-7b"], PAPER_MODELS["opt-1.3b"]
    assert (llama.table, list(llama.figures.values())) == (2, [1, 3, 5, 6])
    assert (opt.table, list(opt.figures.values())) == (3, [1, 4, 7, 8])
    assert DEFAULT == "llama-2-7b"
