"""The partition: disjoint by prompt, the same in every stage, independent of order and sources."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.config import check_config
from training.data import STAGES, DataSettings, read_records
from training.data.split import chosen_at_random, normalized, split_rows, stage_of, uniform

PROPORTIONS = (0.2, 0.4, 0.4)


def settings_for(*paths, **options):
    sources = [{"path": str(p)} if not isinstance(p, dict) else p for p in paths]
    return check_config(DataSettings, {"sources": sources, **options}, "bad:")


@pytest.fixture
def file(tmp_path):
    """1000 prompts, two comparisons each."""
    path = tmp_path / "a.jsonl"
    records = [
        {"prompt": f"Question {n}?", "chosen": f"yes {k}", "rejected": "no"}
        for n in range(1000)
        for k in range(2)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prompts(records):
    return [record.prompt_text for record in records]


def test_stages_are_disjoint_and_cover_everything(file):
    parts = {stage: read_records(settings_for(file), stage) for stage in STAGES}
    seen = {stage: set(prompts(part.train + part.eval)) for stage, part in parts.items()}
    assert set.union(*seen.values()) == {f"Question {n}?" for n in range(1000)}
    assert sum(len(part) for part in seen.values()) == 1000
    # Binomial: three standard deviations are 38, 46 and 46.
    assert abs(len(seen["sft"]) - 200) < 38
    assert abs(len(seen["reward"]) - 400) < 46
    for part in parts.values():
        assert not set(prompts(part.train)) & set(prompts(part.eval))


def test_the_partition_ignores_order_and_other_sources(file, tmp_path):
    lines = file.read_text().splitlines(keepends=True)
    backwards = tmp_path / "b.jsonl"
    backwards.write_text("".join(reversed(lines[:600])))
    alone = read_records(settings_for(file), "reward")
    whole = set(prompts(alone.train + alone.eval))
    other = read_records(settings_for(backwards), "reward")
    assert set(prompts(other.train + other.eval)) == {p for p in whole if int(p[9:-1]) < 300}
    both = read_records(settings_for(backwards, file), "reward")
    assert set(prompts(both.train + both.eval)) == whole
    assert set(prompts(both.eval)) == set(prompts(alone.eval))


def test_the_seed_changes_the_partition(file):
    one = read_records(settings_for(file, split_seed=1), "sft")
    two = read_records(settings_for(file, split_seed=2), "sft")
    assert set(prompts(one.train)) != set(prompts(two.train))


def test_eval_fraction_counts_prompts(file):
    found = read_records(settings_for(file, eval_fraction=0.1), "ppo")
    total = len(found.train) + len(found.eval)
    assert len(found.eval) == round(0.1 * total)
    pairs = read_records(settings_for(file, eval_fraction=0.1), "reward")
    assert set(Counter(prompts(pairs.eval)).values()) == {2}
    assert read_records(settings_for(file, eval_fraction=0.0), "sft").eval == []


def test_eval_sources_are_neither_partitioned_nor_trained_on(file, tmp_path):
    eval_file = tmp_path / "eval.jsonl"
    eval_file.write_text("".join(file.read_text().splitlines(keepends=True)[:200]))
    plain = read_records(settings_for(file, eval_fraction=0.0), "reward")
    found = read_records(settings_for(file, eval_sources=[str(eval_file)]), "reward")
    assert len(found.eval) == 200
    expected = [p for p in prompts(plain.train) if int(p[9:-1]) >= 100]
    assert prompts(found.train) == expected
    assert found.tally.count("kept for evaluation only") == len(plain.train) - len(expected)


@pytest.mark.parametrize(("weight", "times"), [(0.5, 0.5), (1.0, 1), (2.0, 2), (2.25, 2.25)])
def test_weights(file, weight, times):
    plain = read_records(settings_for(file), "reward").train
    settings = settings_for({"path": str(file), "weight": weight})
    found = read_records(settings, "reward").train
    assert len(found) == int(times) * len(plain) + round(times % 1 * len(plain))
    counts = Counter(record.origin for record in found)
    assert set(counts.values()) <= {int(weight), int(weight) + 1}
    assert (
        found == read_records(settings_for({"path": str(file), "weight": weight}), "reward").train
    )


def test_sample_limits_are_random_but_fixed_and_reported(file):
    plain = read_records(settings_for(file), "reward")
    found = read_records(settings_for(file, max_train_samples=50, max_eval_samples=7), "reward")
    assert (len(found.train), len(found.eval)) == (50, 7)
    assert found.train != plain.train[:50]
    origins = [record.origin for record in plain.train]
    positions = [origins.index(record.origin) for record in found.train]
    assert positions == sorted(positions)
    assert found.tally.count("left out by max_train_samples") == len(plain.train) - 50
    assert found.tally.count("left out by max_eval_samples") == len(plain.eval) - 7


def test_the_partition_is_pinned():
    """Another hash would silently give every finished run's stages overlapping data."""
    assert uniform("stage", 42, "Suggest a drink.") == pytest.approx(0.06509498026150914)
    assert [stage_of(f"Question {n}?", PROPORTIONS, 42) for n in range(8)] == (
        "ppo reward reward reward reward sft ppo ppo".split()
    )


@given(st.text(), st.integers())
def test_stage_of_is_total_and_respects_empty_stages(text, seed):
    assert stage_of(text, PROPORTIONS, seed) in STAGES
    assert stage_of(text, (0.0, 1.0, 0.0), seed) == "reward"
    assert stage_of(text, (0.3, 0.7 - 1e-9, 0.0), seed) in ("sft", "reward")


@given(st.text())
def test_normalization_is_idempotent(text):
    assert normalized(normalized(text)) == normalized(text)


def test_normalization_joins_what_looks_the_same():
    assert normalized(" cafe\u0301 \n a") == normalized("café a")


@given(st.lists(st.integers()), st.integers(0, 5), st.randoms())
def test_random_choice_ignores_the_order(keys, count, random):
    shuffled = list(keys)
    random.shuffle(shuffled)
    chosen = chosen_at_random(keys, count, "salt")
    assert chosen == chosen_at_random(shuffled, count, "salt")
    assert len(chosen) == min(count, len(set(keys)))


def test_validation_and_test_share_no_prompt_in_any_stage() -> None:
    """A held-out prompt chooses in all stages or reports in all of them, wherever it occurs."""
    one = [f"Prompt {n}?" for n in range(300)]
    other = [f" Prompt  {n}?" for n in range(250, 600)]  # white space makes no difference
    first, second = split_rows(one, 0.5, 42), split_rows(other, 0.5, 42)
    for rows, prompts_of in ((first, one), (second, other)):
        assert sorted(rows["validation"] + rows["test"]) == list(range(len(prompts_of)))
        assert 0.4 < len(rows["test"]) / len(prompts_of) < 0.6
    chosen_by = {normalized(one[row]) for row in first["validation"]}
    assert not chosen_by & {normalized(other[row]) for row in second["test"]}
    # The wrong variant: a cut by position would report on what another stage chose by.
    assert chosen_by & {normalized(text) for text in other[:175]}


def test_rows_of_one_prompt_stay_together() -> None:
    rows = split_rows(["a", "b", "a", "c", "b"] * 3, 0.5, 1)
    texts = {split: {"abacb"[row % 5] for row in part} for split, part in rows.items()}
    assert not texts["validation"] & texts["test"]


@pytest.mark.parametrize("seed", range(30))
def test_few_prompts_still_make_both_splits(seed: int) -> None:
    assert all(split_rows(["one", "two"], 0.5, seed).values())
    assert split_rows(["one"], 0.5, seed) == {"validation": [], "test": [0]}
    assert split_rows([], 0.5, seed) == {"validation": [], "test": []}
    assert split_rows(["one", "two"], 0.0, seed) == {"validation": [], "test": [0, 1]}
