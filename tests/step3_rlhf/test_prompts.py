"""The order of prompts and the seeds of draws: the same on any number of ranks."""

import json
from typing import Any

import pytest
from datasets import Dataset

from step3_rlhf import prompts as module
from step3_rlhf.config import PPOConfig
from step3_rlhf.prompts import Prompts, iterations
from training.config import check_config
from training.data import dialogue_text

TEXTS = [f"prompt {i}" for i in range(10)]
DATA = Dataset.from_dict(
    {
        "prompt": TEXTS,
        "prompt_ids": [[1, i] for i in range(10)],
        "messages": [json.dumps([{"role": "user", "content": text}]) for text in TEXTS],
    }
)


@pytest.fixture
def configured(stage_settings):
    def config(**changes: Any) -> PPOConfig:
        return check_config(PPOConfig, stage_settings("ppo") | changes, "config:")

    return config


def of_all_ranks(config: PPOConfig, number: int, ranks: int, patch: pytest.MonkeyPatch) -> list:
    """Per rank the prompts of an iteration: (ids, text, seed) rows."""
    patch.setattr(module, "world_size", lambda: ranks)
    batches = []
    for rank in range(ranks):
        patch.setattr(module, "rank", lambda rank=rank: rank)
        ids, dialogues, seeds = Prompts(DATA, config).of_iteration(number)
        texts = [dialogue_text(dialogue) for dialogue in dialogues]
        batches.append([(tuple(i), t, s) for i, t, s in zip(ids, texts, seeds, strict=True)])
    return batches


@pytest.mark.parametrize("number", [0, 1, 5])
def test_one_rank_and_two_see_the_same_in_every_optimizer_step(
    configured, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = {"num_mini_batches": 2, "per_device_train_batch_size": 2}
    (alone,) = of_all_ranks(
        configured(**shared, gradient_accumulation_steps=2), number, 1, monkeypatch
    )
    first, second = of_all_ranks(configured(**shared), number, 2, monkeypatch)
    assert len(alone) == 8
    for k in range(2):
        whole = alone[4 * k : 4 * k + 4]
        parts = first[2 * k : 2 * k + 2] + second[2 * k : 2 * k + 2]
        assert sorted(parts) == sorted(whole)


@pytest.mark.parametrize("number", [0, 3])
def test_all_responses_to_a_prompt_are_on_one_rank_and_adjacent(
    configured, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = {"num_mini_batches": 2, "per_device_train_batch_size": 4, "num_generations": 2}
    (alone,) = of_all_ranks(
        configured(**shared, gradient_accumulation_steps=2), number, 1, monkeypatch
    )
    first, second = of_all_ranks(configured(**shared), number, 2, monkeypatch)
    for k in range(2):
        whole = alone[8 * k : 8 * k + 8]
        parts = first[4 * k : 4 * k + 4] + second[4 * k : 4 * k + 4]
        assert sorted(parts) == sorted(whole)
    for batch in (alone, first, second):
        for one, other in zip(batch[::2], batch[1::2], strict=True):
            assert one[:2] == other[:2]
            assert other[2][-1] == one[2][-1] + 1  # another draw of the same prompt
            assert one[2][-1] % 2 == 0
    firsts = [row for batch in (alone,) for row in batch[::2]]
    single = configured(num_mini_batches=2, gradient_accumulation_steps=1)
    expected = of_all_ranks(single, number, 1, monkeypatch)[0]
    assert [row[1] for row in firsts] == [row[1] for row in expected]  # the same prompts in order


def test_every_epoch_is_a_permutation_of_its_own(configured, monkeypatch) -> None:
    config = configured(per_device_train_batch_size=5)
    texts = [text for n in range(4) for _, text, _ in of_all_ranks(config, n, 1, monkeypatch)[0]]
    assert sorted(texts[:10]) == sorted(texts[10:]) == TEXTS
    assert texts[:10] != texts[10:]


def test_ids_texts_and_seeds_belong_together(configured) -> None:
    ids, dialogues, seeds = Prompts(DATA, configured()).of_iteration(3)
    assert [f"prompt {row[1]}" for row in ids] == [dialogue_text(d) for d in dialogues]
    assert seeds == [(42, module.TRAINING, position) for position in range(12, 16)]


def test_the_order_is_a_function_of_the_seed_and_the_iteration(configured) -> None:
    config = configured()
    forwards = [Prompts(DATA, config).of_iteration(n) for n in range(6)]
    stream = Prompts(DATA, config)
    assert [stream.of_iteration(n) for n in reversed(range(6))] == forwards[::-1]
    other = [Prompts(DATA, configured(seed=43)).of_iteration(n)[1] for n in range(6)]
    assert other != [texts for _, texts, _ in forwards]


def test_centering_divides_its_prompts_over_the_ranks(
    configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Prompts(DATA, configured())
    _, _, seeds = stream.for_centering(7)
    assert seeds == [(42, module.CENTERING, position) for position in range(7)]
    monkeypatch.setattr(module, "world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(module, "rank", lambda rank=rank: rank)
        parts += stream.for_centering(7)[2]
    rounded_up = [(42, module.CENTERING, position) for position in range(8)]
    assert sorted(parts) == rounded_up  # as many on every rank


def test_iterations(configured, monkeypatch: pytest.MonkeyPatch) -> None:
    def config(**changes: Any) -> PPOConfig:
        return configured(gradient_accumulation_steps=2, num_mini_batches=3, **changes)

    assert iterations(config(total_episodes=48), prompts=10) == 2  # 4 · 2 · 3 = 24 each
    assert iterations(config(total_episodes=None, num_train_epochs=5.0), prompts=24) == 5
    assert iterations(config(total_episodes=None, num_train_epochs=0.1), prompts=24) == 1
    twice = {"num_generations": 2, "per_device_train_batch_size": 4}
    assert iterations(config(total_episodes=None, num_train_epochs=5.0, **twice), prompts=24) == 10
    monkeypatch.setattr(module, "world_size", lambda: 2)
    assert iterations(config(total_episodes=48), prompts=10) == 1
    with pytest.raises(ValueError, match="total_episodes: 24 is not a multiple of the 48"):
        iterations(config(total_episodes=24), prompts=10)
