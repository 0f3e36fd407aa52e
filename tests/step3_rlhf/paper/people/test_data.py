"""ProtoQA's questions as records: what is kept, proportions, splits, second phrasings."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from step3_rlhf.paper.people.data.convert import Sizes, convert, reworded, split, write_files
from step3_rlhf.paper.people.data.phrasing import rephrased
from step3_rlhf.paper.people.data.questions import Question, parse, read_questions, usable
from step3_rlhf.paper.people.data.records import (
    answers_elsewhere,
    asked,
    ranking,
    response_sets,
    systematic,
    texts,
)
from step3_rlhf.response_sets import read_response_sets
from training.data import read_records
from training.data.settings import DataSettings
from training.errors import UserError

PETS = Question("q1", "name a pet.", ("dog", "cat", "fish"), (50, 30, 10))
FRUIT = Question("q2", "name a fruit.", ("apple", "pear", "fig", "dog"), (40, 30, 10, 5))


def record(number: int, counts: dict[str, int], text: str = "") -> dict[str, Any]:
    """As in the data set's train.jsonl."""
    clusters = {
        f"q{number}.{i}": {"count": count, "answers": [answer]}
        for i, (answer, count) in enumerate(counts.items())
    }
    question = text or f"name something of kind {number}."
    return {
        "metadata": {"id": f"q{number}", "source": "train"},
        "question": {"original": question, "normalized": question},
        "answers": {"raw": counts, "clusters": clusters},
        "num": {"answers": sum(counts.values()), "clusters": len(clusters)},
    }


def many(count: int) -> list[Question]:
    return [parse(record(i, {f"a{i}": 50, f"b{i}": 30, f"c{i}": 10})) for i in range(count)]


# Questions


def test_counts_order_the_answers_and_become_shares() -> None:
    found = parse(record(1, {"fish": 10, "dog": 50, "cat": 40}))
    assert found.answers == ("dog", "cat", "fish")
    assert found.shares == (0.5, 0.4, 0.1)


def test_a_cluster_of_several_strings_is_one_answer() -> None:
    written = record(1, {})
    written["answers"]["clusters"] = {
        "q1.0": {"count": 60, "answers": ["dog", "a  dog", "puppy"]},
        "q1.1": {"count": 30, "answers": ["cat"]},
        "q1.2": {"count": 5, "answers": ["dog", "hound"]},
    }
    found = parse(written)
    assert (found.answers, found.counts) == (("dog", "cat"), (65, 30))
    assert found.strings == (("dog", "a dog", "puppy", "hound"), ("cat",))


@pytest.mark.parametrize("as_lists", [True, False])
def test_the_hubs_columns_are_read_too(as_lists: bool) -> None:
    groups: list[dict[str, Any]] = [
        {"count": 50, "answers": ["dog"], "clusterid": "q1.0"},
        {"count": 40, "answers": ["cat"], "clusterid": "q1.1"},
    ]
    columns = {name: [group[name] for group in groups] for name in groups[0]}
    row = {"id": "q1", "normalized-question": "name a pet.", "question": "Name a pet."}
    found = parse(row | {"answer-clusters": columns if as_lists else groups})
    assert (found.text, found.answers, found.counts) == ("name a pet.", ("dog", "cat"), (50, 40))


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ({"a": 50, "b": 40}, "not 3 to 8 answers"),
        ({str(i): 10 for i in range(9)}, "not 3 to 8 answers"),
        ({"a": 50, "b": 20, "c": 9}, "answers of not 80 to 102 people"),
        ({"a": 50, "b": 40, "c": 13}, "answers of not 80 to 102 people"),
        ({"a": 50, "b": 40, "c": 0}, "an answer that nobody gave"),
    ],
)
def test_boards_that_say_little_are_left_out_and_counted(
    counts: dict[str, int], reason: str
) -> None:
    kept = usable([PETS, parse(record(3, counts))])
    assert kept.questions == [PETS]
    assert kept.left_out == {reason: 1}
    assert f"1 left out: {reason}" in kept.lines()


def test_the_bounds_themselves_are_kept() -> None:
    low, high = {"a": 40, "b": 30, "c": 10}, {str(i): 12 for i in range(7)} | {"h": 18}
    assert len(usable([parse(record(1, low)), parse(record(2, high))]).questions) == 2


def test_a_question_in_other_punctuation_is_the_same() -> None:
    again = Question("q9", "Name a pet!", PETS.answers, PETS.counts)
    assert usable([PETS, again]).left_out == {"repeats another question": 1}


def test_files_are_read_and_faulty_lines_named(tmp_path: Path) -> None:
    lines = [json.dumps(record(i, {"a": 50, "b": 30, "c": 10})) for i in range(3)]
    path = tmp_path / "train.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write("\n".join([*lines, ""]))
    assert [q.id for q in read_questions(str(path)).questions] == ["q0", "q1", "q2"]
    faulty = tmp_path / "other.jsonl"
    faulty.write_text("\n".join([lines[0], '{"prompt": "a"}', "{"]))
    with pytest.raises(UserError) as caught:
        read_questions(str(faulty))
    assert all(f"{faulty}:{line}" in str(caught.value) for line in (2, 3))
    with pytest.raises(UserError, match="unreadable"):
        read_questions(str(tmp_path / "nowhere.jsonl"))


# Second phrasings


@pytest.mark.parametrize(
    ("question", "other"),
    [
        ("name something that smells.", "one thing that smells."),
        ("tell me something kids fight over", "one thing kids fight over"),
        ("Name someone who wears a hat.", "one person who wears a hat."),
        ("name a fruit.", "one fruit."),
        ("besides gold, name an expensive metal.", "besides gold, one expensive metal."),
        ("we asked 100 men...name something big", "we asked 100 men...one thing big"),
        ("name the best pet.", "what is the best pet."),
        ("give me your favorite colour", "what is your favorite colour"),
        ("what might you name a dog?", None),
        ("why do people laugh?", None),
        ("name one of the planets.", None),
        ("name a pet, or name a plant.", None),
        ("name a pet and tell me something about it", None),
    ],
)
def test_second_phrasings(question: str, other: str | None) -> None:
    assert rephrased(question) == other


def test_questions_without_a_second_phrasing_are_left_out_and_counted() -> None:
    why = Question("q3", "why do people laugh?", PETS.answers, PETS.counts)
    taken = Question("q4", "one fruit.", PETS.answers, PETS.counts)
    found, failures = reworded([why, FRUIT, PETS, taken], 2)
    assert [text for _, text in found] == ["one pet."]  # "one fruit." is a question by itself
    assert failures == 3


# Records


@pytest.mark.parametrize("draws", [1, 7, 90, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_texts_keep_peoples_proportions(draws: int, seed: int) -> None:
    found = Counter(text["response"] for text in texts(PETS, "name a pet.", "people", draws, seed))
    assert sum(found.values()) == draws
    for answer, share in zip(PETS.answers, PETS.shares, strict=True):
        assert abs(found[answer] - draws * share) < 1  # the floor or the ceiling


def test_texts_have_peoples_proportions_in_expectation() -> None:
    found = Counter(
        text["response"] for s in range(3000) for text in texts(PETS, "name a pet.", "people", 1, s)
    )
    assert found["fish"] / 3000 == pytest.approx(1 / 9, abs=0.02)
    with pytest.raises(AssertionError):  # each answer once would be another population
        assert found["fish"] / 3000 == pytest.approx(1 / 3, abs=0.02)


def test_systematic_draws_are_literal() -> None:
    assert systematic("ab", [0.75, 0.25], 4, 0.5) == ["a", "a", "a", "b"]
    assert systematic("ab", [0.75, 0.25], 2, 0.9) == ["a", "b"]
    assert systematic("ab", [0.1, 0.9 - 1e-12], 1, 1 - 1e-13) == ["b"]


def test_the_uniform_prior_gives_each_answer_once() -> None:
    found = texts(FRUIT, "name a fruit.", "uniform", 100, 0)
    assert [text["response"] for text in found] == list(FRUIT.answers)


def best_first(entry: dict[str, Any]) -> list[str]:
    return [entry["responses"][place] for place in entry["ranking"]]


def test_questions_are_asked_with_their_answers_or_by_themselves() -> None:
    assert asked(PETS, "name a pet.", "open", 0) == "name a pet."
    listed = {asked(PETS, "name a pet.", "listed", seed) for seed in range(99)}
    assert len(listed) == 6  # the board does not give the order away
    assert "name a pet.\nAnswers: cat; fish; dog" in listed


def test_rankings_are_plackett_luces() -> None:
    orders = Counter(
        tuple(best_first(ranking(PETS, "name a pet.", ["fig"], 0, n)))[:2] for n in range(9000)
    )
    assert orders["dog", "cat"] / 9000 == pytest.approx(50 / 90 * 30 / 40, abs=0.015)
    assert orders["fish", "dog"] / 9000 == pytest.approx(10 / 90 * 50 / 80, abs=0.01)
    assert all(
        best_first(ranking(PETS, "name a pet.", ["fig"], 0, n))[-1] == "fig" for n in range(50)
    )


def test_answers_of_other_questions_are_no_answers_to_this_one() -> None:
    found = {a for n in range(50) for a in answers_elsewhere(PETS, [PETS, FRUIT], 2, 0, n)}
    assert found == {"apple", "pear", "fig"}  # not dog


def test_response_sets_are_the_boards_and_all_strings_that_count() -> None:
    strings = (("dog", "puppy"), ("cat",), ("fish",))
    board, every = response_sets(Question(*astuple(PETS), strings), "one pet.", "seen")
    assert board["population"] == [50 / 90, 30 / 90, 10 / 90]
    assert (board["topic"], every["topic"]) == ("seen/q1", "seen-strings/q1")
    assert every["responses"] == ["dog", "puppy", "cat", "fish"]
    assert response_sets(PETS, "one pet.", "seen") == [board]


def astuple(question: Question) -> tuple[str, str, tuple[str, ...], tuple[int, ...]]:
    return question.id, question.text, question.answers, question.counts


# Files


def test_stages_share_no_question_and_the_split_keeps_its_proportions() -> None:
    questions = many(3000)
    found = split(questions, 42)
    ids = [q.id for of in found.stages.values() for part in of.values() for q in part]
    assert len(ids) == len(set(ids)) == 3000
    sizes = {name: sum(map(len, of.values())) / 3000 for name, of in found.stages.items()}
    assert sizes == pytest.approx({"sft": 0.2, "reward": 0.4, "ppo": 0.4}, abs=0.03)
    assert len(found.of("ppo", "test")) / 1200 == pytest.approx(0.10, abs=0.03)
    fewer = split(questions[::-2], 42)  # neither order nor the others make a difference
    assert {q.id for q in fewer.of("ppo", "test")} <= {q.id for q in found.of("ppo", "test")}
    assert split(questions, 43).of("sft", "train") != found.of("sft", "train")


def test_what_is_measured_was_not_learned_in_these_words() -> None:
    files = convert(usable(many(400)), "people", "listed", Sizes(), 42).records
    learned = {entry["prompt"] for entry in files["rewards"] + files["texts"] + files["prompts"]}
    groups = {entry["group"] for entry in files["rewards"] + files["texts"] + files["prompts"]}
    assert {entry["group"] for entry in files["rankings"]} <= groups
    for entry in files["sets_eval"]:
        assert entry["prompt"] not in learned
        label, _, identity = entry["topic"].partition("/")
        assert (identity in groups) == (label == "seen")
    chosen_by = {entry["prompt"] for entry in files["sets_validation"]}
    assert not chosen_by & {entry["prompt"] for entry in files["sets_eval"]}


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    for name, questions, seed in (("a", 300, 1), ("b", 300, 1), ("c", 300, 2)):
        files = convert(usable(many(questions)), "people", "listed", Sizes(), seed)
        write_files(files, tmp_path / name, Sizes())
    for name in ("texts", "rewards", "sets_eval"):
        first, same, other = ((tmp_path / n / f"{name}.jsonl").read_bytes() for n in "abc")
        assert first == same != other


def test_every_stage_reads_its_files(tmp_path: Path) -> None:
    write_files(convert(usable(many(300)), "people", "listed", Sizes(), 42), tmp_path, Sizes())
    for stage, name, shares in (
        ("sft", "texts", (1.0, 0.0, 0.0)),
        ("reward", "rewards", (0.0, 1.0, 0.0)),
        ("ppo", "prompts", (0.0, 0.0, 1.0)),
    ):
        path = str(tmp_path / f"{name}.jsonl")
        held_out = str(tmp_path / f"{name}_eval.jsonl")
        settings = DataSettings(
            sources=({"path": path},),  # type: ignore[arg-type]
            eval_sources=({"path": held_out},),  # type: ignore[arg-type]
            stage_proportions=shares,
        )
        records = read_records(settings, stage)  # type: ignore[arg-type]
        assert len(records.train) == len((tmp_path / f"{name}.jsonl").read_text().splitlines())
        assert records.train[0].group.startswith("q")
    assert len(read_response_sets(str(tmp_path / "sets_eval.jsonl"))) > 10


def test_direct_optimization_learns_all_prompts_but_one_whose_question_is_not_measured(
    tmp_path: Path,
) -> None:
    files = convert(usable(many(300)), "people", "listed", Sizes(), 42)
    write_files(files, tmp_path, Sizes())
    settings = DataSettings(
        sources=({"path": str(tmp_path / "rankings.jsonl")},),  # type: ignore[arg-type]
        eval_sources=({"path": str(tmp_path / "rankings_eval.jsonl")},),  # type: ignore[arg-type]
        stage_proportions=files.direct_proportions,
    )
    (spare,) = read_records(settings, "ppo").train
    learned = read_records(settings, "reward").train
    last = spare.prompt[0]["content"]
    others = [ranking for ranking in files.records["rankings"] if ranking["prompt"] != last]
    assert len(learned) == len(others)
    measured = {entry["topic"].partition("/")[2] for entry in files.records["sets_eval"]}
    assert spare.group not in measured
