"""Model cards: what the Hub reads of them, and what people do."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from training.runtime.model_card import Card, Figure, figures_of, is_hub_name, write_card


def card(base_model: str) -> Card:
    return Card(
        title="own",
        summary="A policy.",
        task="text-generation",
        base_model=base_model,
        training={"regularizer": '`{"name": "pm"}`', "its optimum": "π(y|x)\nover all"},
        evaluated_on="On the test:",
        figures=[Figure("kl", 0.123456, 0.0211), Figure("length", 12.0)],
    )


def test_the_hub_can_read_it(tmp_path: Path) -> None:
    write_card(tmp_path, card("owner/base"))
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.base_model == "owner/base"
    assert (read.data.library_name, read.data.pipeline_tag) == ("transformers", "text-generation")
    assert "| kl | 0.1235 | ± 0.021 |\n| length | 12 |  |" in read.text
    assert '| regularizer | `{"name": "pm"}` |\n| its optimum | π(y\\|x) over all |' in read.text
    assert "\n\n\n\n" not in read.text


def test_a_path_is_no_name_of_the_hub(tmp_path: Path) -> None:
    write_card(tmp_path, card(str(tmp_path / "sft")))
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None


@pytest.mark.parametrize(
    ("name", "known"),
    [("facebook/opt-1.3b", True), ("gpt2", False), ("runs/a/model", False), ("./model", False),
     ("/abs/model", False), ("tests/training", False)],
)  # fmt: skip
def test_names_of_the_hub(name: str, known: bool) -> None:
    assert is_hub_name(name) is known


def test_figures_are_those_that_there_are() -> None:
    evaluation = {
        "kl": {"mean": 0.5, "ci95": 0.1},
        "one": {"mean": 0.25, "ci95": None},
        "none": None,
        "infinite": {"mean": float("inf"), "ci95": None},
        "test/accuracy": 0.6,
        "test/accuracy_ci95": 0.05,
    }
    names = ["one", "kl", "none", "infinite", "missing", "test/accuracy"]
    found = figures_of(evaluation, names)
    expected = [Figure("one", 0.25), Figure("kl", 0.5, 0.1), Figure("test/accuracy", 0.6, 0.05)]
    assert found == expected
