"""Every source format, every fault with file and line, and nothing lost in silence."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from training.config import check_config
from training.data import DataSettings, Source, prompt_messages, read_records
from training.data.fields import RecordFault, Unusable
from training.data.formats import Record, parse_record
from training.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures"
ALL_SFT, ALL_REWARD, ALL_PPO = [1, 0, 0], [0, 1, 0], [0, 0, 1]
EVERYTHING = {"sft": ALL_SFT, "reward": ALL_REWARD, "ppo": ALL_PPO}


def read(path, stage, **options):
    """All of a file's records for one stage, none held out."""
    data = {"sources": [str(path)], "stage_proportions": EVERYTHING[stage], "eval_fraction": 0.0}
    return read_records(check_config(DataSettings, {**data, **options}, "bad:"), stage)


def faults_of(path, stage="reward", **options):
    with pytest.raises(UserError) as caught:
        read(path, stage, **options)
    return caught.value.faults


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_transcripts():
    path = FIXTURES / "hh_transcripts.jsonl"
    found = read(path, "reward")
    assert [record.prompt for record in found.train] == [
        (user("How do I boil an egg?"),),
        (user("Hi"), assistant("Hello! How can I help?"), user("Name a river.")),
        (user("Half a pair: \ufffd"),),
        (user("The label Human: stays text."),),
    ]
    assert [record.responses for record in found.train] == [
        ("Eight minutes in boiling water.", "I would not know."),
        ("The Rhône — it’s long 🏞️.", "Rivers?"),
        ("Odd\u2028line \x00 here.", "\u202eReversed"),
        ("Yes, Human: and Assistant: too.", "No."),
    ]
    assert [record.origin for record in found.train] == [f"{path}:{n}" for n in (1, 2, 6, 8)]
    assert found.train[1].prompt_text == (
        "Human: Hi\n\nAssistant: Hello! How can I help?\n\nHuman: Name a river."
    )
    assert found.eval == []
    assert found.tally.counts == {
        str(path): {
            "read": 8,
            "dropped: the prompts of chosen and rejected differ": 1,
            "dropped: an empty response": 1,
            "dropped: identical responses": 1,
            "with invalid Unicode, replaced by U+FFFD": 1,
            "dropped: the dialogue does not end with the assistant's turn": 1,
            "used by reward": 4,
        }
    }
    assert str(found.tally).startswith(f"{path}: 8 read; 1 dropped: the prompts of")


def test_a_transcript_with_nothing_on_one_side_is_counted(tmp_path):
    text = "\n\nHuman: Hi\n\nAssistant: Hello."
    path = write(
        tmp_path / "data.jsonl",
        {"chosen": "", "rejected": text},
        {"chosen": text, "rejected": ""},
        {"prompt": "Hi", "chosen": "Hello.", "rejected": ""},
    )
    with pytest.raises(UserError) as caught:
        read(path, "reward")
    assert "3 dropped: an empty response" in str(caught.value)


def test_a_transcript_gives_sft_its_best_response_and_ppo_its_prompt():
    sft = read(FIXTURES / "hh_transcripts.jsonl", "sft").train
    assert sft[0].responses == ("Eight minutes in boiling water.",)
    # An identical pair still says what to write; an empty best response does not.
    assert [record.prompt[-1]["content"] for record in sft] == [
        "How do I boil an egg?", "Name a river.", "Same?", "Half a pair: \ufffd",
        "The label Human: stays text.",
    ]  # fmt: skip
    ppo = read(FIXTURES / "hh_transcripts.jsonl", "ppo").train
    assert {record.responses for record in ppo} == {()}
    assert user("Say nothing.") in [record.prompt[0] for record in ppo]


def test_full_hh():
    found = read(FIXTURES / "full_hh.jsonl", "reward").train
    assert found[0].prompt == (user("What is a fjord?"),)
    assert found[0].responses == ("A narrow inlet of the sea.", "A car.")
    assert found[1].prompt == (user("Hi"), assistant("Hello."), user("What is a fjord?"))


def test_a_prompts_text_gives_its_messages_back():
    for name in ("hh_transcripts", "full_hh", "rankings"):
        for record in read(FIXTURES / f"{name}.jsonl", "reward").train:
            assert prompt_messages(record.prompt_text) == record.prompt
    assert prompt_messages("Human: the word") == (user("Human: the word"),)
    system = {"role": "system", "content": "Be brief."}
    for prompt in ((system, user("Hi")), (system, user("Hi"), assistant("Hello."), user("Bye"))):
        assert prompt_messages(Record(prompt, (), "").prompt_text) == prompt
    assert prompt_messages("System: down") == (user("System: down"),)


def test_rankings_are_indices_best_first():
    found = read(FIXTURES / "rankings.jsonl", "reward").train
    assert [record.responses for record in found] == [
        ("Coffee", "Water", "Tea"),
        ("A cat", "A dog"),
    ]
    assert [r.responses for r in read(FIXTURES / "rankings.jsonl", "sft").train] == [
        ("Coffee",),
        ("A cat",),
    ]


def test_the_three_tldr_data_sets_share_their_prompts():
    comparison = read(FIXTURES / "tldr_comparisons.jsonl", "reward").train
    prompt = "SUBREDDIT: r/pets\n\nTITLE: Cat\n\nPOST: I moved and miss my cat.\n\nTL;DR:"
    assert comparison[0].prompt_text == prompt
    assert comparison[0].responses == ("Moved.", "I miss my cat.")
    assert comparison[1].prompt_text == "ARTICLE: It rained.\n\nTL;DR:"
    assert comparison[1].responses == ("Rain.", "Sun.")
    for name in ("tldr_prompts", "tldr_posts"):
        text = read(FIXTURES / f"{name}.jsonl", "sft").train[0]
        assert (text.prompt_text, text.responses) == (prompt, ("I miss my cat.",))
        assert read(FIXTURES / f"{name}.jsonl", "ppo").train[0].prompt_text == prompt


def test_messages():
    found = read(FIXTURES / "messages.jsonl", "reward").train
    assert found[0].prompt == ({"role": "system", "content": "Be brief."}, user("Name a tree."))
    assert found[0].responses == ("Oak", "Moss")
    assert found[1].prompt == (user("Name a stone."),)
    assert found[1].responses == ("Slate", "Oak")


def test_texts_are_skipped_and_counted_where_pairs_are_needed(tmp_path):
    path = write(
        tmp_path / "mixed.jsonl",
        {"prompt": "a", "response": "1"},
        {"prompt": "b", "chosen": "1", "rejected": "2"},
    )
    assert [record.responses for record in read(path, "sft").train] == [("1",), ("1",)]
    found = read(path, "reward")
    assert [record.prompt_text for record in found.train] == ["b"]
    assert found.tally.count("skipped: a text for SFT only, nothing to compare") == 1


def test_ppo_needs_prompts_only_and_each_once(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "One"},
        {"prompt": " One\n"},
        {"prompt": "Two", "chosen": "x", "rejected": "y"},
        {"prompt": ""},
        {"prompt": "Three", "responses": ["no", "ranking"]},
    )
    found = read(path, "ppo")
    assert [record.prompt_text for record in found.train] == ["One", "Two", "Three"]
    assert found.tally.counts[str(path)] == {
        "read": 5, "dropped: an empty prompt": 1, "repeat a prompt, used once": 1, "used by ppo": 3,
    }  # fmt: skip


def test_every_fault_has_its_file_and_line():
    path = FIXTURES / "broken.jsonl"
    assert faults_of(path) == [
        f"{path}:2: malformed JSON: Expecting ',' delimiter (column 36)",
        f"{path}:3: an object was expected, not list",
        f"{path}:4: no 'chosen'; did you mean 'choosen'?",
        f"{path}:6: 'prompt' is int, a text was expected",
        f"{path}:7: 'rejected' is null",
        f"{path}:8: no 'prompt'; did you mean 'promt'?",
        f"{path}:9: 'ranking' [1, 2] does not list the indices 0 to 1, best first, each once; "
        "those of unknown order belong in 'unranked'",
        f"{path}:10: a prompt without 'chosen' and 'rejected', 'responses' and 'ranking', "
        "or 'response'",
        f"{path}:11: no 'prompt'; known here: chosen, rejected",
    ]


def test_faults_of_all_sources_are_told_at_once_and_the_rest_is_counted(tmp_path):
    many = write(tmp_path / "many.jsonl", *[{"prompt": n, "response": "x"} for n in range(30)])
    faults = faults_of(FIXTURES / "rankings.jsonl", eval_sources=[str(many)])
    assert faults == [
        f"{many}:1: 'prompt' is int, a text was expected (30 such records: 1, 2, 3, …)"
    ]
    kinds = [{"prompt": "a", f"a{'x' * n}b": "?"} for n in range(2, 32)]
    found = faults_of(write(tmp_path / "kinds.jsonl", *kinds, {"prompt": 1, "response": "x"}))
    assert len(found) == 2
    assert found[0].endswith(" or 'response' (30 such records: 1, 2, 3, …)")
    roles = [{"messages": [{"role": "x" * n, "content": "a"}]} for n in range(1, 31)]
    found = faults_of(write(tmp_path / "roles.jsonl", *roles))
    assert found[19].startswith(f"{tmp_path / 'roles.jsonl'}:20: ")
    assert found[20:] == ["... and 10 more"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_unreadable_files(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"neither")
    (fault,) = faults_of(path)
    assert fault.startswith(f"{path}: unreadable: ")


def test_a_cut_off_gzip_file(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a", "response": "b"}\n' * 500)[:-20])
    (fault,) = faults_of(path, "sft")
    assert fault.startswith(f"{path}: unreadable: ")


def test_the_same_records_in_every_container(tmp_path):
    records = [
        {"prompt": "Où ? 🏞️", "response": "Là-bas"},
        {"prompt": "b\u2028c", "response": "d"},
    ]
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.json").write_text(json.dumps(records, indent=2), encoding="utf-8")
    (tmp_path / "d.json.gz").write_bytes(gzip.compress(lines))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "e.parquet")
    seen = [
        [(record.prompt_text, record.responses) for record in read(path, "sft").train]
        for path in sorted(tmp_path.iterdir())
    ]
    assert seen == [[("Où ? 🏞️", ("Là-bas",)), ("b\u2028c", ("d",))]] * 5


def test_elements_of_an_array_know_their_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n  {"prompt": "a", "response": "b"},\n\n  {"prompt": 1,\n "response": "x"},'
                    '\n 5]', encoding="utf-8")  # fmt: skip
    assert faults_of(path, "sft") == [
        f"{path}:4: 'prompt' is int, a text was expected",
        f"{path}:6: an object was expected, not int",
    ]
    path.write_text('[\n  {"prompt": "a", "response": "b"}\n  {"prompt": "c"}]')
    assert faults_of(path, "sft") == [
        f"{path}:3: malformed JSON: Expecting ',' delimiter (column 3)"
    ]


def test_bytes_that_are_no_unicode_are_replaced_and_counted(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "caf\xe9", "response": "y"}\n')
    found = read(path, "sft")
    assert found.train[0].prompt_text == "caf\ufffd"
    assert found.tally.count("with invalid Unicode, replaced by U+FFFD") == 1


def test_an_empty_split_says_where_the_records_went(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "response": "b"})
    with pytest.raises(UserError) as caught:
        read(path, "reward")
    assert caught.value.heading == f"No training records are left for the stage 'reward' in {path}:"
    assert caught.value.faults == [
        f"{path}: 1 read; 1 skipped: a text for SFT only, nothing to compare"
    ]
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert faults_of(empty, "sft") == ["no records"]
    with pytest.raises(UserError, match="No evaluation records"):
        read(path, "sft", eval_sources=[str(empty)])


def test_an_explicit_format_is_not_guessed(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "response": "b", "chosen": "c"})
    assert faults_of(path, "sft") == [
        f"{path}:1: no 'rejected'; known here: chosen, prompt, response"
    ]
    source = {"path": str(path), "format": "completion"}
    assert read(path, "sft", sources=[source]).train[0].responses == ("b",)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "no 'prompt'"),
        ({"prompt": [{"role": "user"}], "response": "b"}, "'prompt' is a list, but not of"),
        ({"prompt": [{"role": "critic", "content": ""}], "response": "b"}, "the role 'critic'"),
        ({"prompt": "a", "responses": ["b"], "ranking": [0]}, "fewer than two"),
        ({"prompt": "a", "responses": ["b", 1], "ranking": [0, 1]}, "not a list of texts"),
        ({"prompt": "a", "responses": ["b", "c"], "ranking": [0, True]}, "not a list of indices"),
        ({"info": {}, "summaries": [{}, {}], "choice": 2}, "'choice' is 2, not 0 or 1"),
        ({"info": {}, "summaries": [{}], "choice": 0}, "not a list of two objects"),
        ({"info": {}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}, "no 'subreddit'"),
        ({"prompt": "a", "respones": "b"}, "did you mean 'responses'"),
    ],
)
def test_faulty_records(raw, message):
    with pytest.raises(RecordFault, match=message):
        parse_record(raw, "x:1", "sft")


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ({"chosen": "Oh.\n\nHuman: a\n\nAssistant: b", "rejected": ""}, "text before the first"),
        ({"chosen": "\n\nAssistant: b", "rejected": "\n\nAssistant: c"}, "an empty prompt"),
    ],
)
def test_unusable_records(raw, reason):
    with pytest.raises(Unusable, match=reason):
        parse_record(raw, "x:1", "reward")


def test_sources_of_one_path_are_counted_apart(tmp_path):
    path = write(
        tmp_path / "data.jsonl",
        {"prompt": "Hi", "response": "Hello."},
        {"prompt": "Bye", "response": ""},
    )
    other = write(tmp_path / "other.jsonl", {"prompt": "Oh", "response": "Ah."})
    more = write(tmp_path / "more.jsonl", {"prompt": "Eh", "response": "What?"})
    twice = [str(path), {"path": str(path), "format": "completion"}, str(more)]
    found = read(path, "sft", sources=twice, eval_sources=[str(path), str(other)])
    assert {heading: counts["read"] for heading, counts in found.tally.counts.items()} == {
        str(path): 2,
        f"{path} (again, 2)": 2,
        str(more): 1,
        f"{path}, for evaluation": 2,
        f"{other}, for evaluation": 1,
    }
    assert found.tally.counts[f"{path}, for evaluation"] == {
        "read": 2, "dropped: an empty response": 1, "used for evaluation": 1,
    }  # fmt: skip
    # What is evaluated on is trained on by none of them.
    assert found.tally.count("kept for evaluation only") == 2
    assert [record.origin for record in found.train] == [f"{more}:1"]


def test_what_reports_call_a_source():
    for settings, label in (
        ({"path": "owner/set"}, "owner/set[train]"),
        ({"path": "owner/set", "name": "en", "split": "test"}, "owner/set[en:test]"),
        ({"path": "owner/set", "data_dir": "harmless-base"}, "owner/set[harmless-base:train]"),
        ({"path": "folder/file.jsonl.gz"}, "folder/file.jsonl.gz"),
    ):
        assert Source(**settings).label == label


def test_a_records_group_is_kept_in_every_format_and_stage(tmp_path):
    path = tmp_path / "grouped.jsonl"
    lines = [
        {"prompt": "Which pet?", "chosen": "A dog", "rejected": "A cat", "group": " pets "},
        {
            "prompt": "Which drink?",
            "responses": ["Tea", "Milk"],
            "ranking": [1, 0],
            "group": "pets",
        },
        {"prompt": "Which fruit?", "chosen": "A plum", "rejected": "A pear", "group": None},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for stage in ("sft", "reward", "ppo"):
        assert [record.group for record in read(path, stage).train] == ["pets", "pets", ""]
    path.write_text(json.dumps(lines[0] | {"group": 7}) + "\n")
    with pytest.raises(UserError, match=r"grouped.jsonl:1: 'group' is int, a text was expected"):
        read(path, "reward")


def test_half_a_character_in_a_name_is_replaced_like_one_in_a_text(tmp_path):
    """Tool calls carry objects with any names; tokenizers and Arrow take valid Unicode only."""
    call = {"function": {"name": "look", "arguments": {"\ud800": ["\udc00"]}}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    messages = [user("a"), turn, {"role": "tool", "content": "1"}, assistant("b")]
    found = read(write(tmp_path / "tools.jsonl", {"messages": messages}), "sft")
    assert "\ud800" not in str(found.train)
    assert "'\ufffd': ['\ufffd']" in str(found.train)
    assert any("invalid Unicode" in line for line in found.tally.lines())


def test_held_out_records_alone(tmp_path):
    """They are those of a whole reading; sources that have none of them are not read."""
    lines = [{"prompt": f"Q{i}", "response": f"A{i}", "group": "g"} for i in range(8)]
    write(tmp_path / "own.jsonl", *lines)
    write(tmp_path / "eval.jsonl", *lines[:3])
    for more in ({}, {"eval_sources": [str(tmp_path / "eval.jsonl")]}):
        data = {"sources": [str(tmp_path / "own.jsonl")], "stage_proportions": ALL_SFT, **more}
        settings = check_config(DataSettings, {"eval_fraction": 0.25, **data}, "bad:")
        alone, whole = (
            read_records(settings, "sft", held_out_only=True),
            read_records(settings, "sft"),
        )
        assert alone.eval == whole.eval
        assert whole.eval
        assert whole.train
        assert alone.train == []
    (tmp_path / "own.jsonl").write_text("no JSON")
    assert read_records(settings, "sft", held_out_only=True).eval == whole.eval
    with pytest.raises(UserError, match=r"own\.jsonl:1"):
        read_records(settings, "sft")
