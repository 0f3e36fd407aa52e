"""The formats that people have: what each gives to each stage, and what is never silently lost."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from training.config import check_config
from training.data import DataSettings, StageRecords, read_records
from training.data.formats import RecordFault, Unusable, check_usable, parse_record
from training.errors import UserError

EVERYTHING = {"sft": [1, 0, 0], "reward": [0, 1, 0], "ppo": [0, 0, 1]}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def read(path: Path | str, stage: str, source: dict[str, Any] | None = None, **options: Any):
    settings = {
        "sources": [{"path": str(path), **(source or {})}],
        "stage_proportions": EVERYTHING[stage],
        "eval_fraction": 0.0,
        **options,
    }
    return read_records(check_config(DataSettings, settings, "bad:"), stage)


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def texts(found: StageRecords) -> list[tuple[Any, ...]]:
    return [(record.prompt_text, *record.responses) for record in found.train]


def parsed(raw: dict[str, Any], stage: str = "sft", **options: Any):
    return check_usable(parse_record(raw, "x:1", stage, **options), stage)


DIALOGUE = [user("Hi"), assistant("Hello."), user("Name a tree."), assistant("Oak")]


# Dialogues


@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_a_dialogue_is_learned_turn_by_turn_or_at_its_end(form: str) -> None:
    turns = DIALOGUE
    if form == "conversations":
        names = {"user": "human", "assistant": "gpt"}
        turns = [{"from": names[t["role"]], "value": t["content"]} for t in DIALOGUE]
    for train_on, whole in (("all", True), ("last", False)):
        record = parsed({form: turns}, train_on=train_on)
        assert record.prompt == tuple(DIALOGUE[:3])
        assert record.responses == ("Oak",)
        assert record.all_turns == whole
    assert parsed({form: turns}, "ppo").prompt == tuple(DIALOGUE[:3])
    assert parsed({form: turns[:3]}, "ppo").prompt == tuple(DIALOGUE[:3])
    assert parsed({form: turns[:3]}).responses == ("Hello.",)
    with pytest.raises(Unusable, match="nothing to compare"):
        parsed({form: turns}, "reward")
    with pytest.raises(Unusable, match="without an answer"):
        parsed({form: turns[:1]})


def test_turns_that_are_not_to_be_learned_are_not_the_response() -> None:
    for mark in (
        {"weight": 0},
        {"train": False},
        {"loss": False},
        {"reasoning_content": "Trees ..."},
    ):
        record = parsed({"messages": [*DIALOGUE[:3], DIALOGUE[3] | mark]})
        assert (record.prompt, record.responses) == ((user("Hi"),), ("Hello.",))
    assert parsed({"messages": [*DIALOGUE[:3], DIALOGUE[3] | {"weight": 1}]}).responses == ("Oak",)


def test_a_system_text_beside_a_dialogue_is_its_first_turn() -> None:
    expected = (system("Be brief."), user("Hi"))
    conversation = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    for raw in (
        {"system": "Be brief.", "conversations": conversation},
        {"system": "Be brief.", "messages": DIALOGUE[:2]},
        {"system": "Be brief.", "instruction": "Hi", "output": "Hello."},
        {"system": "Be brief.", "prompt": "Hi", "response": "Hello."},
        {"prompt": [{"role": "developer", "content": "Be brief."}, user("Hi")], "response": "Hi"},
    ):
        assert parsed(raw).prompt == expected
    assert parsed({"system": "", "prompt": "Hi", "response": "Hello."}).prompt == (user("Hi"),)


def test_tool_turns_and_parts_reach_the_template() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    turns = [
        user("2+2?"),
        {"role": "assistant", "content": None, "tool_calls": [call | {"unused": None}]},
        {"role": "tool", "content": "4", "name": "add"},
    ]
    prompt = parsed({"prompt": turns, "response": "Four"}).prompt
    assert prompt == (
        user("2+2?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4", "name": "add"},
    )
    sharegpt = [
        {"from": "human", "value": "2+2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "Four"},
    ]
    found = parsed({"conversations": sharegpt})
    assert [turn["role"] for turn in found.prompt] == ["user", "assistant", "tool"]
    assert found.prompt[1] == prompt[1]
    parts = [{"type": "text", "text": "Name "}, {"type": "text", "text": "a tree."}]
    raw = {"prompt": [{"role": "user", "content": parts}], "response": "Oak"}
    assert parsed(raw).prompt == (user("Name a tree."),)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"role": "user", "content": [{"type": "image"}]}], "of type 'image', not text"),
        ([{"role": "user", "content": None}], "'content' is null"),
        ([{"role": "user"}], "not of"),
        ([{"from": "function_call", "value": "add(2)"}], "not JSON"),
        ("Hi", "is str, a list of messages"),
        ([{"from": "narrator", "value": "Once"}], "the role 'narrator'"),
    ],
)
def test_faulty_messages(turns: Any, message: str) -> None:
    with pytest.raises(RecordFault, match=message):
        parsed({"messages": turns})


def test_descriptions_of_tools_are_not_lost_in_silence() -> None:
    with pytest.raises(RecordFault, match="'tools' describes functions"):
        parsed({"messages": DIALOGUE, "tools": [{"name": "add"}]})
    assert parsed({"messages": DIALOGUE, "tools": []}).responses == ("Oak",)


# Instructions, labels, scores


def test_instructions() -> None:
    raw = {"instruction": "Name a tree.", "input": "Tall.", "output": "Oak", "text": "### ..."}
    assert parsed(raw).prompt == (user("Name a tree.\nTall."),)
    assert parsed(raw | {"input": ""}).prompt == (user("Name a tree."),)
    assert parsed(raw | {"input": None}).responses == ("Oak",)
    assert parsed(raw, "ppo").responses == ()
    chatty = parsed(raw | {"history": [["Hi", "Hello."]]})
    assert chatty.prompt == (user("Hi"), assistant("Hello."), user("Name a tree.\nTall."))
    dolly = {"instruction": "Name a tree.", "context": "Tall.", "response": "Oak"}
    assert parsed(dolly) == parsed(raw)
    pair = {"instruction": "Name a tree.", "input": "Tall.", "chosen": "Oak", "rejected": "Moss"}
    assert parsed(pair, "reward").prompt == parsed(raw).prompt
    assert parsed(pair, "reward").responses == ("Oak", "Moss")
    with pytest.raises(RecordFault, match="history"):
        parsed(raw | {"history": [["Hi"]]})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Say {}", "completion": "{}"},
        {"prompt": [user("Say {}")], "completion": [assistant("{}")]},
        {"instruction": "Say {}", "output": "{}"},
        {"messages": [user("Say {}"), assistant("{}")]},
        {"conversations": [{"from": "human", "value": "Say {}"}, {"from": "gpt", "value": "{}"}]},
    ],
    ids=lambda row: "-".join(row),
)
def test_what_is_labelled_bad_is_never_learned(row: dict[str, Any], tmp_path: Path) -> None:
    name = "kto_tag" if "conversations" in row else "label"
    lines = [json.dumps(row | {name: n % 2 == 0}).replace("{}", str(n)) for n in range(6)]
    path = tmp_path / "kto.jsonl"
    path.write_text("\n".join(lines))
    found = read(path, "sft")
    assert [record.responses for record in found.train] == [("0",), ("2",), ("4",)]
    assert found.tally.count("skipped: labelled false, an undesirable response (KTO)") == 3
    with pytest.raises(UserError, match=r"6 skipped: a response labelled by itself \(KTO\)"):
        read(path, "reward")
    assert len(read(path, "ppo").train) == 6


def test_labels_are_true_or_false() -> None:
    raw = {"prompt": "a", "completion": "b"}
    assert parsed(raw | {"label": 1}).responses == ("b",)
    for label in (2, "yes", [True]):
        with pytest.raises(RecordFault, match="true or false was expected"):
            parsed(raw | {"label": label})
    assert parsed(raw | {"label": None}).responses == ("b",)


def test_scores_make_rankings() -> None:
    raw = {"prompt": "a", "responses": ["one", "two", "three"], "scores": [0.5, 2, -1]}
    assert parsed(raw, "reward").responses == ("two", "one", "three")
    assert parsed(raw).responses == ("two",)
    tied = parsed(raw | {"scores": [0, 1, 1]}, "reward")
    assert (tied.responses, tied.levels) == (("two", "three", "one"), (0, 0, 1))
    assert (tied.tie_sizes, parsed(raw, "reward").levels) == ([2, 1], ())
    assert parsed(raw | {"scores": [1, 1, 1]}, "reward").levels == (0, 0, 0)
    again = raw | {"responses": ["one", "two", "one"], "scores": [1, 1, 1]}
    assert parsed(again, "reward").responses == ("one", "two")  # not a tie with itself
    for scores in ([1, 2], [1, 2, "3"], [1, 2, float("nan")], [1, 2, True], 3):
        with pytest.raises(RecordFault, match="'scores'"):
            parsed(raw | {"scores": scores}, "reward")
    ultra = {
        "instruction": "a",
        "completions": [
            {"response": "one", "overall_score": 6.5, "model": "x"},
            {"response": "two", "overall_score": 8},
        ],
    }
    assert parsed(ultra, "reward").responses == ("two", "one")
    assert parsed(ultra).prompt == (user("a"),)


def test_ties_and_partial_rankings() -> None:
    raw = {"prompt": "a", "responses": ["one", "two", "three", "four"]}
    tied = parsed(raw | {"ranking": [3, [0, 2], 1]}, "reward")
    assert (tied.responses, tied.levels) == (("four", "one", "three", "two"), (0, 1, 1, 2))
    best = parsed(raw | {"ranking": [3, 1], "unranked": [0, 2]}, "reward")
    assert best.responses == ("four", "two", "one", "three")
    assert (best.levels, best.unranked, best.tie_sizes) == ((), 2, [])
    both = parsed(raw | {"ranking": [[3, 1]], "unranked": [0, 2]}, "reward")
    assert (both.levels, both.unranked, both.tie_sizes) == ((0, 0, 1, 1), 2, [2])
    last = parsed(raw | {"ranking": [3, 1, 0], "unranked": [2]}, "reward")  # its place is known
    assert (last.responses[-1], last.unranked) == ("three", 0)
    for ranking, unranked in (
        ([3, 1], None), ([3, 1], [0]), ([3, 1], [0, 1]), ([], [0, 1, 2, 3]), ([3, 1, 0, 2, []], []),
        ([[[3]], 1, 0, 2], []), ([3, 1, 0, True], []), ([3, 1], "0, 2"),
    ):  # fmt: skip
        with pytest.raises(RecordFault, match="'ranking'"):
            parsed(raw | {"ranking": ranking, "unranked": unranked}, "reward")
    pair = {"prompt": "a", "chosen": "one", "rejected": "two"}
    assert parsed(pair | {"tie": True}, "reward").levels == (0, 0)
    assert parsed(pair | {"tie": False}, "reward").levels == ()
    with pytest.raises(RecordFault, match="'tie'"):
        parsed(pair | {"tie": "tie"}, "reward")
    for stage in ("sft", "ppo"):
        used = check_usable(parsed(raw | {"ranking": [3, [0, 2], 1]}, stage), stage)
        assert (used.levels, used.responses) == ((), ("four",) if stage == "sft" else ())


def test_ties_are_possible_in_sources_that_have_some(tmp_path: Path) -> None:
    pair = {"prompt": "a", "chosen": "one", "rejected": "two"}
    decided = write(tmp_path / "decided.jsonl", pair)
    mixed = write(tmp_path / "mixed.jsonl", pair, {**pair, "prompt": "b", "tie": True})
    found = read(mixed, "reward")
    assert [record.largest_tie for record in found.train] == [2, 2]
    assert found.tally.count("responses tied with another one of their ranking") == 2
    assert [record.largest_tie for record in read(decided, "reward").train] == [1]


def test_helpsteer_rows_of_one_prompt_make_a_ranking(tmp_path: Path) -> None:
    def row(prompt: str, response: str, helpfulness: int) -> dict[str, Any]:
        return {"prompt": prompt, "response": response, "helpfulness": helpfulness, "verbosity": 1}

    path = write(
        tmp_path / "steer.jsonl",
        row("a", "poor", 1), row("b", "fine", 3), row("a", "good", 4), row("b", "same", 3),
        row("c", "alone", 2), row("a", "as good", 4),
    )  # fmt: skip
    found = read(path, "reward")
    assert texts(found) == [("a", "good", "as good", "poor"), ("b", "fine", "same")]
    assert [record.levels for record in found.train] == [(0, 0, 1), (0, 0)]
    assert found.tally.counts[str(path)] == {
        "read": 6,
        "joined with others of their prompt into a ranking": 3,
        "skipped: a text for SFT only, nothing to compare": 1,
        "responses tied with another one of their ranking": 4,
        "used by reward": 2,
    }
    assert texts(read(path, "sft")) == [("a", "good"), ("b", "fine"), ("c", "alone")]
    assert [record.prompt_text for record in read(path, "ppo").train] == ["a", "b", "c"]


# Preferences


def test_ultrafeedback_and_the_implicit_prompt() -> None:
    asked = [system("Be brief."), user("Name a tree.")]
    pair = {
        "chosen": [*asked, assistant("Oak")],
        "rejected": [*asked, assistant("Moss")],
        "messages": [*asked, assistant("Oak")],
        "score_chosen": 8.0,
    }
    for prompt in ({}, {"prompt": "Name a tree."}, {"prompt": asked}):
        for stage in ("reward", "sft", "ppo"):
            record = parsed(pair | prompt, stage)
            assert record.prompt == tuple(asked), (prompt, stage)
        assert parsed(pair | prompt, "reward").responses == ("Oak", "Moss")
    with pytest.raises(Unusable, match="prompts of chosen and rejected differ"):
        parsed(pair | {"prompt": "Name a stone."}, "reward")


def test_a_transcript_in_the_response_repeats_no_prompt() -> None:
    prompt = "\n\nHuman: Hi\n\nAssistant:"
    raw = {"prompt": prompt, "chosen": prompt + " Hello.", "rejected": prompt + " What?"}
    assert parsed(raw, "reward").responses == ("Hello.", "What?")
    plain = {"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi."}
    assert parsed(plain, "reward").responses == ("Hi there", "Hi.")


# Containers


def test_null_is_absent_in_every_container(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "response": "1"},
        {"prompt": "b", "chosen": "1", "rejected": "2"},
        {"messages": [user("c"), assistant("3")]},
    ]
    names = {name for row in rows for name in row}
    padded = [{name: row.get(name) for name in sorted(names)} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(padded), tmp_path / "a.parquet")
    write(tmp_path / "b.jsonl", *rows)
    write(tmp_path / "c.jsonl", *padded)
    for path in sorted(tmp_path.iterdir()):
        assert texts(read(path, "sft")) == [("a", "1"), ("b", "1"), ("c", "3")]
        assert texts(read(path, "reward")) == [("b", "1", "2")]


def test_tables(tmp_path: Path) -> None:
    rows = (
        "prompt,completion,label\n"
        '"Two\nlines, and a comma",Yes,True\n'
        "[1] or true?,5,true\n"
        "Bad,No,False\n"
    )
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(rows.replace("\n", "\r\n").encode()))
    expected = [("Two\nlines, and a comma", "Yes"), ("[1] or true?", "5")]
    assert texts(read(tmp_path / "a.csv", "sft")) == expected
    assert [t[1] for t in texts(read(tmp_path / "b.csv.gz", "sft"))] == ["Yes", "5"]
    dialogue = json.dumps(DIALOGUE).replace('"', '""')
    (tmp_path / "c.tsv").write_text(f'messages\tid\n"{dialogue}"\t1\n')
    assert read(tmp_path / "c.tsv", "sft").train[0].prompt == tuple(DIALOGUE[:3])
    ranked = 'prompt,responses,ranking\na,"[""x"", ""y""]","[1, 0]"\n'
    (tmp_path / "d.csv").write_text(ranked)
    assert texts(read(tmp_path / "d.csv", "reward")) == [("a", "y", "x")]


def test_faults_of_tables_have_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,response\n"a\nb",1\nc,2,3\nd\n')
    with pytest.raises(UserError) as caught:
        read(path, "sft")
    assert caught.value.faults == [
        f"{path}:4: 3 cells under 2 names of columns",
        f"{path}:5: a prompt without 'chosen' and 'rejected', 'responses' and 'ranking', or "
        "'response'",
    ]
    path.write_text('prompt,response\n"a\nb,1\n')
    with pytest.raises(UserError, match=r"a\.csv:2: malformed CSV: "):
        read(path, "sft")


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ("train", range(20)),
        ("train[:10%]", range(2)),
        ("train[15:]", range(15, 20)),
        ("train[-2:]", range(18, 20)),
        ("train[:2]+train[50%:60%]", [0, 1, 10, 11]),
    ],
)
def test_parts_of_files_and_saved_data_sets(tmp_path: Path, split: str, rows: Any) -> None:
    records = [{"prompt": f"p{n}", "response": str(n)} for n in range(20)]
    path = write(tmp_path / "a.jsonl", *records)
    data = datasets.Dataset.from_list(records)
    data.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": data, "test": data.select([3])}).save_to_disk(
        str(tmp_path / "splits")
    )
    for source in (path, tmp_path / "saved", tmp_path / "splits"):
        found = read(source, "sft", {"split": split})
        assert texts(found) == [(f"p{n}", str(n)) for n in rows]
        assert [int(record.origin.rpartition(":")[2]) for record in found.train] == [
            n + 1 for n in rows
        ]
    assert texts(read(tmp_path / "splits", "sft", {"split": "test"})) == [("p3", "3")]
    for folder in ("saved", "splits"):
        with pytest.raises(UserError, match=r"cannot be loaded: .*\"dev\""):
            read(tmp_path / folder, "sft", {"split": "dev"})


def test_a_folder_of_files_has_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    for split in ("train", "test"):
        rows = [{"prompt": f"{split} {n}", "response": str(n)} for n in range(10)]
        write(folder / f"{split}.jsonl", *rows)
    found = read(folder, "sft", {"split": "test[20%:40%]"})
    assert texts(found) == [("test 2", "2"), ("test 3", "3")]


def test_patterns_name_many_files(tmp_path: Path) -> None:
    for number in (2, 1):
        write(tmp_path / f"part-{number}.jsonl", {"prompt": f"p{number}", "response": "x"})
    (tmp_path / "part-3.txt").write_text("not data")
    found = read(tmp_path / "part-*", "sft")
    assert [record.origin for record in found.train] == [
        f"{tmp_path}/part-1.jsonl:1", f"{tmp_path}/part-2.jsonl:1"
    ]  # fmt: skip


def test_other_names_of_fields(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"question": "Tree?", "good": "Oak", "bad": "Moss", "prompt": "not this"},
        {"qustion": "Tree?", "good": "Oak", "bad": "Moss"},
    )
    names = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    found = read(path, "reward", {"field_map": names}, on_bad_record="skip")
    assert texts(found) == [("Tree?", "Oak", "Moss")]
    with pytest.raises(UserError) as caught:
        read(path, "reward", {"field_map": names})
    assert caught.value.faults == [
        f"{path}:2: no 'question', which field_map names for 'prompt'; did you mean 'qustion'?"
    ]


# Bad records


def test_bad_records_are_left_out_and_reported(tmp_path: Path) -> None:
    good = {"prompt": "Tree?", "response": "Oak"}
    lines = [good, {"prompt": 5, "response": "x"}, {"prompt": "a", "response": None}]
    lines += [{"prompt": n, "response": "x"} for n in range(4)]
    path = write(tmp_path / "a.jsonl", *lines)
    path.write_text(path.read_text() + '{"prompt"')
    found = read(path, "sft", on_bad_record="skip")
    assert texts(found) == [("Tree?", "Oak")]
    assert found.tally.counts[str(path)] == {
        "read": 8,
        "left out: 'prompt' is int, a text was expected (at 2, 4, 5, …)": 5,
        "left out: a prompt without 'chosen' and 'rejected', 'responses' and 'ranking', or "
        "'response' ('response' is null) (at 3)": 1,
        "left out: malformed JSON: Expecting ':' delimiter (column 10) (at 8)": 1,
        "used by sft": 1,
    }
    with pytest.raises(UserError) as caught:
        read(path, "sft")
    assert caught.value.faults == [
        f"{path}:2: 'prompt' is int, a text was expected (5 such records: 2, 4, 5, …)",
        f"{path}:3: a prompt without 'chosen' and 'rejected', 'responses' and 'ranking', or "
        "'response' ('response' is null)",
        f"{path}:8: malformed JSON: Expecting ':' delimiter (column 10)",
    ]


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.json", '[{"prompt": "a", "response": "b"}, {"prompt"', "malformed JSON"),
        ("a.csv", 'prompt,response\na,b\n"c', "malformed CSV"),
    ],
)
def test_what_hides_the_rest_of_a_file_is_not_skipped_as_one_record(
    tmp_path: Path, name: str, content: str, fault: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=fault):
        read(path, "sft", on_bad_record="skip")


def test_deep_nesting_is_a_fault_of_its_record(tmp_path: Path) -> None:
    deep = "[" * 600 + "]" * 600
    path = tmp_path / "a.jsonl"
    path.write_text(
        f'{{"messages": [{{"role": "user", "content": {deep}}}]}}\n'
        '{"prompt": "Tree?", "response": "Oak"}\n'
    )
    found = read(path, "sft", on_bad_record="skip")
    assert texts(found) == [("Tree?", "Oak")]
