"""The examples of training/data/README.md are read as it says."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest

from training.data import STAGES, DataSettings, Stage
from training.data.fields import RecordFault, Unusable
from training.data.formats import check_usable, parse_record
from training.data.settings import SourceFormat

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "training" / "data" / "README.md").read_text(encoding="utf-8")
CODE = "".join(path.read_text() for path in (ROOT / "training" / "data").glob("*.py"))


@dataclass(frozen=True)
class Example:
    """A JSON object under a heading, and the stages that the heading's text names."""

    heading: str
    stages: tuple[str, ...]
    value: dict[str, Any]


def examples() -> list[Example]:
    """Every object of every ```json block."""
    found = []
    for section in re.split(r"^#+ ", README, flags=re.M)[1:]:
        heading = section.splitlines()[0].strip("`")
        named = re.search(r"Read by: ([a-z, ]+)\.", section)
        stages = tuple(named[1].split(", ")) if named else ()
        for block in re.findall(r"```json\n(.*?)```", section, flags=re.S):
            rest = block.strip()
            while rest:
                value, end = json.JSONDecoder().raw_decode(rest)
                found.append(Example(heading, stages, value))
                rest = rest[end:].lstrip()
    return found


FORMATS = [name for name in get_args(SourceFormat) if name != "auto"]
RECORDS = [example for example in examples() if example.stages]


def test_every_format_has_an_example() -> None:
    assert {example.heading for example in RECORDS} == {*FORMATS, "Prompts only"}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("example", RECORDS, ids=lambda e: f"{e.heading}-{'-'.join(e.value)}")
def test_records_are_read_by_the_stages_that_it_names(example: Example, stage: Stage) -> None:
    if stage not in example.stages:
        with pytest.raises((RecordFault, Unusable)):
            check_usable(parse_record(example.value, "README:1", stage), stage)
        return
    record = parse_record(example.value, "README:1", stage)
    if example.heading == "scored" and stage == "reward":
        assert record.score is not None  # compared with others of its prompt
        return
    record = check_usable(record, stage)
    expected = {"sft": 1, "reward": len(example.value.get("responses", "ab")), "ppo": 0}
    assert len(record.responses) == expected[stage]
    if example.heading in FORMATS:
        named: SourceFormat = example.heading  # type: ignore[assignment]  # one of them
        assert check_usable(parse_record(example.value, "README:1", stage, named), stage) == record


def test_the_ways_to_write_a_prompt_are_the_same_prompt() -> None:
    prompts = [
        parse_record(example.value, "", "ppo").prompt
        for example in examples()
        if example.heading == "Prompts"
    ]
    assert len(prompts) == 3
    assert prompts[0] == prompts[1] == prompts[2]
    assert [turn["role"] for turn in prompts[0]] == ["user", "assistant", "user"]


def test_a_transcript_is_the_same_as_text_and_as_messages() -> None:
    text, messages = (
        parse_record(example.value, "", "reward")
        for example in RECORDS
        if example.heading == "transcript"
    )
    assert text == messages


def test_a_ranking_is_read_best_first() -> None:
    rankings = [example for example in RECORDS if example.heading == "ranking"]
    assert len(rankings) == 4
    records = [parse_record(ranking.value, "", "reward") for ranking in rankings]
    assert {record.responses[:3] for record in records} == {("Coffee", "Water", "Tea")}
    assert [record.levels for record in records] == [(), (), (0, 1, 1), ()]
    assert [record.unranked for record in records] == [0, 0, 0, 2]


def test_the_sections_of_a_config_are_valid() -> None:
    sections = [example.value for example in examples() if "data" in example.value]
    assert len(sections) == 3
    for section in sections:
        DataSettings.model_validate_json(json.dumps(section["data"]))


def test_defaults_are_those_of_the_settings() -> None:
    for name, default in re.findall(r"`(max_\w+)` \((\d+)\)", README):
        assert DataSettings.model_fields[name].default == int(default)
    assert DataSettings.model_fields["eval_fraction"].default == 0.05
    assert DataSettings.model_fields["stage_proportions"].default == (0.2, 0.4, 0.4)


def test_what_is_printed_is_in_the_code() -> None:
    """Every entry of the table is a message of the code, up to the names put into it."""
    table = README.split("| printed | meaning |")[1].split("\n\n")[0]
    first_column = " ".join(row.split("|")[1] for row in table.splitlines()[2:])
    entries = re.findall(r"`([^`]+)`", first_column)
    assert len(entries) > 15
    for entry in entries:
        assert all(part in CODE for part in re.split("STAGE|SETTING", entry)), entry
