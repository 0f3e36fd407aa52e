"""Reads an answer key from JSONL: which responses to a prompt express the same opinion.

A line is {"prompt": str, "classes": {name: [response, ...], ...}}; other fields are ignored, so
that a file of records or of response sets can be its own answer key.
"""

from typing import Any

from training.data import as_dialogue, dialogue_text
from training.data.json_lines import parsed_lines
from training.errors import UserError

AnswerKey = dict[str, dict[str, str]]
"""Of each prompt, as people read it, the class of each response."""


def read_answer_key(path: str) -> AnswerKey:
    """The classes of each prompt's responses. A prompt may stand in several lines that agree.

    Raises:
        UserError: lists every faulty line with its number.
    """
    key: AnswerKey = {}

    def add(entry: Any) -> None:
        prompt, classes = _parse(entry)
        if key.setdefault(prompt, classes) != classes:
            raise ValueError(f"other classes than in an earlier line for the prompt {prompt!r}")

    parsed_lines(path, add)
    if not key:
        raise UserError(f"{path}: an answer key without a line")
    return key


def _parse(entry: Any) -> tuple[str, dict[str, str]]:
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise ValueError('an object with "prompt": str was expected')
    classes = entry.get("classes")
    if not isinstance(classes, dict) or not classes:
        raise ValueError('"classes": an object of lists of responses by class was expected')
    found: dict[str, str] = {}
    for name, responses in classes.items():
        texts = isinstance(responses, list) and all(isinstance(r, str) for r in responses)
        if not texts or not responses:
            raise ValueError(f'"classes": a list of responses was expected in {name!r}')
        for response in responses:
            if found.setdefault(response.strip(), name) != name:
                raise ValueError(
                    f'"classes": {response!r} is in both {found[response.strip()]!r} and {name!r}'
                )
    return dialogue_text(as_dialogue(entry["prompt"])), found
