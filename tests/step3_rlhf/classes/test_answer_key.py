"""Answer keys as files: what is read, and what is refused with its line."""

import json
from pathlib import Path
from typing import Any

import pytest

from step3_rlhf.classes.answer_key import read_answer_key
from training.errors import UserError

CLASSES = {"tea": ["Tea", " Tea with milk "], "coffee": ["Coffee"]}


def written(tmp_path: Path, *lines: Any) -> str:
    path = tmp_path / "key.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")
    return str(path)


def test_each_prompt_has_the_class_of_each_response(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"prompt": " A drink? ", "classes": CLASSES, "chosen": "Tea", "rejected": "Coffee"},
        {"prompt": "Human: Hi\n\nAssistant: Hello.\n\nHuman: A pet?", "classes": {"x": ["A cat"]}},
        {"prompt": "A drink?", "classes": CLASSES},  # once more, and the same
    )
    assert read_answer_key(path) == {
        "A drink?": {"Tea": "tea", "Tea with milk": "tea", "Coffee": "coffee"},
        "Human: Hi\n\nAssistant: Hello.\n\nHuman: A pet?": {"A cat": "x"},
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["A drink?"], 'an object with "prompt": str'),
        ({"classes": CLASSES}, 'an object with "prompt": str'),
        ({"prompt": "A pet?"}, '"classes": an object of lists'),
        ({"prompt": "A pet?", "classes": {}}, '"classes": an object of lists'),
        ({"prompt": "A pet?", "classes": {"cat": "A cat"}}, "a list of responses was expected in"),
        ({"prompt": "A pet?", "classes": {"cat": []}}, "a list of responses was expected in 'cat'"),
        (
            {"prompt": "A pet?", "classes": {"cat": ["It"], "dog": ["A dog", "It "]}},
            "'It ' is in both 'cat' and 'dog'",
        ),
        ({"prompt": "A drink?", "classes": {"tea": ["Tea"]}}, "other classes than in an earlier"),
    ],
)
def test_faulty_lines_are_named(tmp_path: Path, line: Any, message: str) -> None:
    path = written(tmp_path, {"prompt": "A drink?", "classes": CLASSES}, line)
    with pytest.raises(UserError) as caught:
        read_answer_key(path)
    assert f"{path}:2: " in str(caught.value)
    assert message in str(caught.value)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="an answer key without a line"):
        read_answer_key(written(tmp_path))
    with pytest.raises(UserError, match="unreadable"):
        read_answer_key(str(tmp_path))
