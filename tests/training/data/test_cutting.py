"""Long dialogues lose whole old turns first; the system turn and the headers stay."""

from typing import Any

import pytest

from training.config import check_config
from training.data import DataSettings, Record, StageRecords, Tally, fitting_prompt, tokenize
from training.data.cutting import shortened
from training.world.base_model import build_tokenizer

SYSTEM = {"role": "system", "content": "s1 s2"}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def length(messages: tuple[Any, ...]) -> int:
    """A header and the words of each turn."""
    return sum(1 + len(message["content"].split()) for message in messages)


def starts(text: str) -> list[int]:
    return [0] + [n + 1 for n, character in enumerate(text) if character == " "]


DIALOGUE = (SYSTEM, user("a b"), assistant("c d"), user("e f"), assistant("g"), user("h i j"))


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (18, DIALOGUE),
        (17, (SYSTEM, *DIALOGUE[3:])),
        (12, (SYSTEM, *DIALOGUE[3:])),
        (11, (SYSTEM, *DIALOGUE[5:])),
        (7, (SYSTEM, *DIALOGUE[5:])),
        (6, (SYSTEM, user("i j"))),
        (5, (SYSTEM, user("j"))),
        (4, None),
    ],
)
def test_whole_turns_go_before_a_turn_is_cut(limit: int, expected: Any) -> None:
    assert length(DIALOGUE) == 18
    found = shortened(DIALOGUE, limit, length, starts)
    assert found == expected
    assert found is None or length(found) <= limit


def test_an_answer_goes_with_its_question() -> None:
    """What is left begins with the user, or templates that want roles to alternate refuse it."""
    for limit in range(1, 18):
        found = shortened(DIALOGUE, limit, length, starts)
        if found is not None:
            assert [message["role"] for message in found][:2] == ["system", "user"]


def test_tool_turns_after_the_last_question_stay() -> None:
    asked = (user("a b c"), assistant("call"), {"role": "tool", "content": "r1 r2"})
    assert shortened(asked, 8, length, starts) == (user("b c"), *asked[1:])


def test_the_same_in_tokens(tmp_path: Any) -> None:
    tokenizer = build_tokenizer()
    prompt = (
        {"role": "system", "content": "Be brief."},
        user("Suggest a drink."),
        assistant("A cup of tea."),
        user("long " * 30 + "And a pet?"),
    )
    records = [Record(prompt, ("A cat",), "a:1"), Record((user("Hi"),), ("Hello",), "a:2")]
    options = {"sources": ["a/b"], "cache_dir": str(tmp_path / "cache")}
    texts = {}
    for limit in (256, 90, 30, 8):
        settings = check_config(DataSettings, {**options, "max_prompt_length": limit}, "bad:")
        found = tokenize(StageRecords(records, [], Tally()), tokenizer, settings, "sft")
        assert all(len(ids) <= limit for ids in found.train["prompt_ids"][:])
        ids = found.train["prompt_ids"][:][0]
        texts[limit] = tokenizer.decode(ids, skip_special_tokens=True).strip(), found.tally.counts
    whole = "long " * 30 + "And a pet?"
    assert texts[256][0].startswith("Be brief.\n\nHuman: Suggest a drink.\n\nAssistant: A cup")
    assert texts[256][1] == {}
    alone = len(tokenizer("\n\n" + whole).input_ids)
    assert alone > 30
    text, counts = texts[30]
    assert text.startswith("Be brief.\n\nHuman: long")
    assert text.endswith("And a pet?\n\nAssistant:")
    assert counts == {"training": {"prompts truncated from the left to max_prompt_length": 1}}
    counted = "dropped: system turn and headers alone longer than max_prompt_length"
    assert texts[8][1]["training"][counted] >= 1


def test_a_prompt_that_fits_is_the_same_object() -> None:
    tokenizer = build_tokenizer()
    prompt = (user("Hi"),)
    assert fitting_prompt(prompt, 100, tokenizer) is prompt
    assert fitting_prompt(prompt, 2, tokenizer) is None
