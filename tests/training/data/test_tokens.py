"""Token ids: columns, lengths, counts, and a cache that knows what it depends on."""

import dataclasses
import json
from typing import Any, ClassVar

import pytest

from training.config import check_config
from training.data import DataSettings, Record, StageRecords, Tally, tokenize
from training.data.tokens import cache_key
from training.errors import UserError
from training.world.base_model import build_tokenizer

PAIR = Record(({"role": "user", "content": "Suggest a drink."},), ("Tea", "A cat"), "a:1")
LONG = Record(({"role": "user", "content": "long " * 40},), ("Tea", "A cat"), "a:2")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def settings(tmp_path):
    def make(**options):
        data = {"sources": ["a/b"], "cache_dir": str(tmp_path / "cache"), **options}
        return check_config(DataSettings, data, "bad:")

    return make


def stage_records(*train, evaluation=()):
    return StageRecords(list(train), list(evaluation), Tally())


def keep(record, count):
    return dataclasses.replace(record, responses=record.responses[:count])


def test_columns(tokenizer, settings):
    prompt_ids = tokenizer("\n\nHuman: Suggest a drink.\n\nAssistant:").input_ids
    assert prompt_ids[0] == tokenizer.bos_token_id
    tea, cat = (
        [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        for text in PAIR.responses
    )
    prompt = "Suggest a drink."
    common = {"prompt": prompt, "group": prompt, "prompt_ids": prompt_ids}
    untied = {"levels": [0, 1], "unranked": 0, "largest_tie": 1}
    for stage, count, expected in (
        ("sft", 1, {**common, "response_ids": tea}),
        ("reward", 2, {**common, "responses_ids": [tea, cat], **untied}),
        ("ppo", 0, {**common, "messages": json.dumps(PAIR.prompt)}),
    ):
        found = tokenize(stage_records(keep(PAIR, count)), tokenizer, settings(), stage)
        assert found.train[0] == expected
        assert len(found.eval) == 0
        assert found.eval.column_names == list(expected)
        assert found.tally.lines() == []


def test_groups_are_the_records_own_or_their_prompts(tokenizer, settings):
    grouped = dataclasses.replace(keep(PAIR, 1), group="drinks")
    records = stage_records(grouped, keep(PAIR, 1))
    found = tokenize(records, tokenizer, settings(), "sft").train
    assert found["group"][:] == ["drinks", "Suggest a drink."]
    # The cache knows: the same records with other groups are other data.
    again = tokenize(stage_records(keep(PAIR, 1), grouped), tokenizer, settings(), "sft").train
    assert again["group"][:] == ["Suggest a drink.", "drinks"]


def test_overlong_prompts_lose_their_beginning(tokenizer, settings):
    records = stage_records(keep(PAIR, 1), keep(LONG, 1), evaluation=[keep(LONG, 1)])
    found = tokenize(records, tokenizer, settings(max_prompt_length=16), "sft")
    cut = found.train[1]["prompt_ids"]
    assert len(cut) == 16
    text = tokenizer.decode(cut, skip_special_tokens=True)
    # Header and end stay; from the text in between the beginning is gone.
    assert text.lstrip("\n").startswith("Human: ")
    assert text.endswith("long long \n\nAssistant:")
    assert found.tally.counts == {
        "training": {"prompts truncated from the left to max_prompt_length": 1},
        "evaluation": {"prompts truncated from the left to max_prompt_length": 1},
    }


def test_overlong_prompts_are_dropped(tokenizer, settings):
    options = settings(max_prompt_length=16, overlong_prompts="drop")
    found = tokenize(stage_records(LONG, PAIR, LONG), tokenizer, options, "reward")
    assert found.train["prompt"][:] == ["Suggest a drink."]
    assert found.tally.count("dropped: a prompt longer than max_prompt_length") == 2
    with pytest.raises(UserError) as caught:
        tokenize(stage_records(LONG), tokenizer, options, "reward")
    assert caught.value.heading == "No training records are left for the stage 'reward' in a:"
    assert caught.value.faults == ["training: 1 dropped: a prompt longer than max_prompt_length"]


def test_a_cut_response_has_no_eos(tokenizer, settings):
    record = dataclasses.replace(PAIR, responses=("A cat that sleeps", "Tea"))
    found = tokenize(stage_records(record), tokenizer, settings(max_response_length=2), "reward")
    first, second = found.train[0]["responses_ids"]
    assert tokenizer.decode(first) == "A cat"
    assert second[-1] == tokenizer.eos_token_id
    assert found.tally.count("responses cut to max_response_length, without EOS") == 1


def test_pairs_that_are_cut_to_the_same_ids_teach_nothing(tokenizer, settings):
    record = dataclasses.replace(PAIR, responses=("A cat that sleeps", "A cat on the sofa"))
    options = settings(max_response_length=2)
    found = tokenize(stage_records(record, PAIR), tokenizer, options, "reward")
    assert len(found.train) == 1
    assert found.tally.count("dropped: responses identical up to max_response_length") == 1


class LiteralTokenizer:
    """Words are token ids: "5 6" is [5, 6]; no template, no BOS, EOS 2."""

    bos_token_id, eos_token_id, chat_template = None, 2, "there is one"
    special_tokens_map: ClassVar[dict[str, str]] = {}

    def tokenize(self, text: str) -> list[str]:
        return text.split()

    def get_vocab(self) -> dict[str, int]:
        return {str(number): number for number in range(100)}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return " ".join(message["content"] for message in messages)

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def literal(prompt: str, *responses: str) -> Record:
    return Record(({"role": "user", "content": prompt},), responses, "a:1")


TO_MAX_LENGTH = "responses cut to max_length, without EOS"
TO_MAX_RESPONSE_LENGTH = "responses cut to max_response_length, without EOS"


@pytest.mark.parametrize(
    ("prompt", "prompt_ids", "response_ids", "cuts"),
    [
        # max_prompt_length 6, max_response_length 4, max_length 8, response 20 … 24 and EOS
        ("10 11 12", [10, 11, 12], [20, 21, 22, 23], {TO_MAX_RESPONSE_LENGTH: 1}),
        ("10 11 12 13", [10, 11, 12, 13], [20, 21, 22, 23], {TO_MAX_RESPONSE_LENGTH: 1}),
        ("10 11 12 13 14", [10, 11, 12, 13, 14], [20, 21, 22], {TO_MAX_LENGTH: 1}),
        ("10 11 12 13 14 15", [10, 11, 12, 13, 14, 15], [20, 21], {TO_MAX_LENGTH: 1}),
        (
            "10 11 12 13 14 15 16",
            [11, 12, 13, 14, 15, 16],
            [20, 21],
            {"prompts truncated from the left to max_prompt_length": 1, TO_MAX_LENGTH: 1},
        ),
    ],
)
def test_a_response_has_the_room_that_its_prompt_leaves(
    settings, prompt, prompt_ids, response_ids, cuts
):
    options = settings(max_prompt_length=6, max_response_length=4, max_length=8)
    records = stage_records(literal(prompt, "20 21 22 23 24"))
    found = tokenize(records, LiteralTokenizer(), options, "sft")
    assert found.train[0]["prompt_ids"] == prompt_ids
    assert found.train[0]["response_ids"] == response_ids
    assert found.tally.counts == {"training": cuts}


def test_a_response_that_fits_beside_its_prompt_keeps_its_eos(settings):
    options = settings(max_prompt_length=6, max_response_length=4, max_length=8)
    records = stage_records(literal("10 11 12 13 14 15", "20", "20 21", "30 31 32"))
    found = tokenize(records, LiteralTokenizer(), options, "reward")
    assert found.train[0]["responses_ids"] == [[20, 2], [20, 21], [30, 31]]
    assert found.tally.counts == {"training": {TO_MAX_LENGTH: 2}}


def test_pairs_that_are_identical_within_max_length_are_dropped_under_its_name(settings):
    options = settings(max_prompt_length=6, max_response_length=4, max_length=8)
    pair = ("20 21 22", "20 21 23")
    records = stage_records(literal("10 11 12 13 14 15", *pair), literal("10 11", *pair))
    found = tokenize(records, LiteralTokenizer(), options, "reward")
    assert found.train["responses_ids"][:] == [[[20, 21, 22, 2], [20, 21, 23, 2]]]
    assert found.tally.counts == {"training": {"dropped: responses identical up to max_length": 1}}


def test_a_prompt_that_the_chat_template_refuses_is_dropped_and_counted(settings):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    system = dataclasses.replace(
        PAIR, prompt=({"role": "system", "content": "Be brief."}, *PAIR.prompt)
    )
    options = settings(on_bad_record="skip")
    for _ in range(2):  # encoded, and read from the cache
        found = tokenize(stage_records(system, PAIR), tokenizer, options, "reward")
        assert found.train["prompt"][:] == ["Suggest a drink."]
        assert len(found.train[0]["responses_ids"]) == 2
        reason = "left out: the chat template refuses the dialogue: no system (at 1)"
        assert found.tally.counts == {"training": {reason: 1}}
    with pytest.raises(UserError) as caught:
        tokenize(stage_records(system, PAIR, system), tokenizer, settings(), "reward")
    assert caught.value.faults == [
        "a:1: the chat template refuses the dialogue: no system (2 such records: 1, 1)",
        "set another chat_template, or data.on_bad_record=skip to leave such records out",
    ]


def test_responses_stay_with_their_prompts_across_batches(tokenizer, settings, monkeypatch):
    monkeypatch.setattr("training.data.tokens.BATCH_SIZE", 3)
    records = [
        Record(
            ({"role": "user", "content": f"Question {n}"},), tuple(map(str, range(n, n + k))), ""
        )
        for n, k in enumerate([2, 3, 2, 4, 2, 2, 3])
    ]
    found = tokenize(stage_records(*records), tokenizer, settings(), "reward").train
    for row, record in zip(found, records, strict=True):
        assert row["prompt"] == record.prompt_text
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in row["responses_ids"]]
        assert tuple(texts) == record.responses


def test_every_answer_of_a_dialogue_is_learned_after_the_turns_before_it(tokenizer, settings):
    """As many tokens carry loss as in the answers, each with the context in which it is drawn."""
    asked = [{"role": "user", "content": text} for text in ("Hi", "Suggest a pet.", "Why?")]
    answers = [
        {"role": "assistant", "content": "Hello"},
        {"role": "assistant", "content": "A cat", "weight": 0},
    ]
    prompt = (asked[0], answers[0], asked[1], answers[1], asked[2])
    records = stage_records(Record(prompt, ("It sleeps",), "a:1", all_turns=True))
    found = tokenize(records, tokenizer, settings(), "sft")
    rows = [
        (tokenizer.decode(row["prompt_ids"], skip_special_tokens=True).strip(),
         tokenizer.decode(row["response_ids"]))
        for row in found.train
    ]  # fmt: skip
    first = "Human: Hi\n\nAssistant:"
    assert rows == [
        (first, "Hello</s>"),
        (f"{first} Hello\n\nHuman: Suggest a pet.\n\nAssistant: A cat\n\nHuman: Why?\n\nAssistant:",
         "It sleeps</s>"),
    ]  # fmt: skip
    assert found.tally.lines() == [
        "training: 1 answers not learned: weight 0, tool calls, thoughts, or no question before"
    ]
    last = tokenize(
        stage_records(Record(prompt, ("It sleeps",), "a:1")), tokenizer, settings(), "sft"
    )
    assert len(last.train) == 1


def test_the_second_run_reads_the_cache(tokenizer, settings, monkeypatch):
    records = stage_records(LONG, PAIR)
    options = settings(max_prompt_length=16)
    first = tokenize(records, tokenizer, options, "reward")

    def must_not_run(*_):
        raise AssertionError("encoded again")

    monkeypatch.setattr("training.data.tokens._encode_batch", must_not_run)
    second = tokenize(records, tokenizer, options, "reward")
    assert second.train[:] == first.train[:]
    assert second.train.features == first.train.features
    assert second.tally.counts == first.tally.counts


def test_a_cache_holds_no_pickles_and_no_drafts(tokenizer, settings, tmp_path):
    tokenize(stage_records(PAIR), tokenizer, settings(), "reward")
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".arrow", ".json"}
    assert not any(path.name.startswith(".") for path in (tmp_path / "cache").iterdir())


def test_a_damaged_cache_is_made_anew(tokenizer, settings, tmp_path):
    first = tokenize(stage_records(PAIR), tokenizer, settings(), "reward")
    for file in (tmp_path / "cache").rglob("counts.json"):
        file.write_text("{")
    assert tokenize(stage_records(PAIR), tokenizer, settings(), "reward").train[:] == first.train[:]


def test_an_unwritable_cache_does_not_stop_the_run(tokenizer, settings, tmp_path):
    (tmp_path / "cache").write_text("a file where the directory should be")
    with pytest.warns(UserWarning, match="token ids are not cached"):
        found = tokenize(stage_records(PAIR), tokenizer, settings(), "reward")
    assert len(found.train) == 1


def test_the_key_changes_with_everything_that_matters(tokenizer, settings):
    other = build_tokenizer(700)
    chat, no_bos = build_tokenizer(), build_tokenizer()
    chat.chat_template = "{{ messages[0].content }}"
    no_bos.bos_token = "<unk>"
    reordered = dataclasses.replace(PAIR, responses=PAIR.responses[::-1])
    keys = [
        cache_key([PAIR], tokenizer, settings(), "reward"),
        cache_key([PAIR, PAIR], tokenizer, settings(), "reward"),
        cache_key([LONG], tokenizer, settings(), "reward"),
        cache_key([reordered], tokenizer, settings(), "reward"),
        cache_key([PAIR], other, settings(), "reward"),
        cache_key([PAIR], chat, settings(), "reward"),
        cache_key([PAIR], no_bos, settings(), "reward"),
        cache_key([PAIR], tokenizer, settings(max_prompt_length=9), "reward"),
        cache_key([PAIR], tokenizer, settings(max_response_length=9), "reward"),
        cache_key([PAIR], tokenizer, settings(max_length=257), "reward"),
        cache_key([PAIR], tokenizer, settings(overlong_prompts="drop"), "reward"),
        cache_key([PAIR], tokenizer, settings(), "sft"),
    ]
    assert len(set(keys)) == len(keys)


def test_the_key_ignores_what_does_not_matter(tokenizer, settings):
    key = cache_key([PAIR], tokenizer, settings(), "reward")
    again = build_tokenizer()
    again(["a", "b c d"], padding=True, truncation=True, max_length=2)
    moved = dataclasses.replace(PAIR, origin="elsewhere:7")
    assert cache_key([moved], again, settings(eval_fraction=0.5), "reward") == key


def test_the_key_changes_with_the_code(tokenizer, settings, monkeypatch):
    key = cache_key([PAIR], tokenizer, settings(), "reward")
    monkeypatch.setattr("training.data.tokens.code_version", lambda: "another")
    assert cache_key([PAIR], tokenizer, settings(), "reward") != key
