"""The data section: what is accepted, and every fault with its path."""

import pytest

from training.config import check_config
from training.data import DataSettings
from training.errors import UserError


def faults_of(data: dict) -> list[str]:
    with pytest.raises(UserError) as caught:
        check_config(DataSettings, data, heading="bad:")
    return caught.value.faults


def test_a_plain_string_is_a_source(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("{}\n")
    settings = check_config(DataSettings, {"sources": [str(file), "Dahoas/full-hh-rlhf"]}, "")
    assert [source.path for source in settings.sources] == [str(file), "Dahoas/full-hh-rlhf"]
    assert [source.is_local for source in settings.sources] == [True, False]
    assert settings.sources[0].split == "train"
    assert settings.sources[0].weight == 1.0
    assert settings.stage_proportions == (0.2, 0.4, 0.4)
    assert settings.split_seed == 42


def test_missing_files_are_named_with_their_place(tmp_path):
    there = tmp_path / "there.jsonl"
    there.write_text("{}\n")
    missing, also_missing = str(tmp_path / "no.jsonl"), str(tmp_path / "neither.parquet")
    assert faults_of({"sources": [str(there), missing], "eval_sources": [also_missing]}) == [
        f"sources.1.path: {missing} does not exist",
        f"eval_sources.0.path: {also_missing} does not exist",
    ]


def test_a_local_file_has_no_hub_options(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("{}\n")
    source = {"path": str(file), "split": "test", "name": "x", "data_dir": "y"}
    assert faults_of({"sources": [source]}) == [
        f"sources.0.path: {file} is none of .jsonl, .json, .csv, .tsv, .jsonl.gz, "
        ".json.gz, .csv.gz, .tsv.gz, .parquet",
        f"sources.0.name: {file} is a local file and has none",
        f"sources.0.data_dir: {file} is a local file and has none",
        f"sources.0.split: {file} is a local file and has no split 'test'; write train, "
        "or a part of it such as train[:10%]",
    ]


def test_fields_and_patterns_that_fit_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    pattern = str(tmp_path / "b*.jsonl")
    sources = [
        {"path": str(tmp_path / "*.jsonl"), "field_map": {"promt": "question"}},
        pattern,
        {"path": str(tmp_path / "a.jsonl"), "split": "train[:10%"},
    ]
    found = faults_of({"sources": sources})
    assert found[0] == (
        "sources.0.field_map: no format has a field 'promt'; did you mean 'prompt'?"
    )
    assert found[1].startswith(f"sources.1.path: {pattern} matches no file of .jsonl, ")
    assert found[2].startswith("sources.2.split: ")
    assert len(found) == 3


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"stage_proportions": [0.2, 0.4, 0.3]}, "stage_proportions: they sum to 0.9, not to 1"),
        ({"eval_fraction": 1.0}, "eval_fraction: 1 leaves nothing to train on"),
        ({"sources": [{"path": "a/b", "weight": 0}]}, "sources: every weight is 0"),
        ({"max_prompt_lenght": 3}, "max_prompt_lenght: unknown key; did you mean"),
        ({"sources": [{"path": "a/b", "wieght": 1}]}, "sources.0.wieght: unknown key; did you"),
        ({"max_prompt_length": "256"}, "max_prompt_length: Input should be a valid integer"),
        ({"overlong_prompts": "cut"}, "overlong_prompts: Input should be 'truncate' or 'drop'"),
        ({"stage_proportions": [0.5, 0.5]}, "stage_proportions.2: Field required"),
        (
            {"max_length": 256},
            "max_length: 256 leaves no room for a response after a prompt of max_prompt_length, "
            "256",
        ),
        ({"max_length": 0}, "max_length: Input should be greater"),
        ({"sources": []}, "sources: name at least one"),
        ({"sources": [{"path": "a/b", "weight": -1}]}, "sources.0.weight: Input should be greater"),
    ],
)
def test_contradictions(change, fault):
    found = faults_of({"sources": ["a/b"], **change})
    assert len(found) == 1
    assert found[0].startswith(fault)


@pytest.mark.parametrize(
    ("lengths", "longest", "name"),
    [
        ({}, 512, "data.max_prompt_length + data.max_response_length"),
        ({"max_length": 512}, 512, "data.max_prompt_length + data.max_response_length"),
        ({"max_length": 511}, 511, "data.max_length"),
        ({"max_length": 257}, 257, "data.max_length"),
        ({"max_length": 600}, 512, "data.max_prompt_length + data.max_response_length"),
        (
            {"max_prompt_length": 384, "max_response_length": 384, "max_length": 512},
            512,
            "data.max_length",
        ),
    ],
)
def test_the_longest_sequence_and_what_allows_it(lengths, longest, name):
    settings = check_config(DataSettings, {"sources": ["a/b"], **lengths}, heading="bad:")
    assert settings.longest == longest
    assert settings.lengths() == {name: longest}
