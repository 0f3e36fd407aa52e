"""What is measured on: all of it or a random part, the same for every policy, told apart."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from step2_reward.config import RewardConfig
from step3_rlhf.config import EvaluationConfig
from step3_rlhf.evaluation.held_out import HeldOut, chosen_rows, load_held_out
from step3_rlhf.evaluation.resume import fingerprint
from step3_rlhf.response_sets import FiniteSet
from training.config import check_config
from training.data import read_records, tokenize
from training.fitting import prepare

pytestmark = pytest.mark.usefixtures("process_group")


def config(settings: dict[str, Any], **changes: Any) -> EvaluationConfig:
    known = {
        name: value for name, value in settings.items() if name in EvaluationConfig.model_fields
    }
    return check_config(EvaluationConfig, {**known, "reward": FUNCTION, **changes}, "config:")


FUNCTION = {"function": "operator:add"}


def test_max_prompts_leaves_a_random_part_in_order(
    stage_settings, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = stage_settings("ppo")
    some = config(settings, evaluation={"max_prompts": 10})
    rows = chosen_rows(1000, some, "prompts")
    assert rows == sorted(set(rows))
    assert len(rows) == 10
    assert rows[-1] > 500  # not the first ones
    assert "max_prompts: 10 of 1000 held-out prompts, chosen at random" in capsys.readouterr().out
    # The evaluation's own seed draws responses; the prompts stay, so that policies are comparable.
    other = config(settings, evaluation={"max_prompts": 10}, seed=7)
    assert chosen_rows(1000, other, "prompts") == rows
    capsys.readouterr()
    assert chosen_rows(10, some, "prompts") == list(range(10))
    assert chosen_rows(3, config(settings, evaluation={}), "prompts") == [0, 1, 2]
    assert capsys.readouterr().out == ""


def test_chosen_prompts_keep_their_ids_and_texts(
    stage_settings, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = Dataset.from_dict(
        {
            "messages": [f'[{{"role": "user", "content": "p{n}"}}]' for n in range(40)],
            "prompt": [f"p{n}" for n in range(40)],
            "group": [f"g{n // 2}" for n in range(40)],
            "prompt_ids": [[n] for n in range(40)],
        }
    )
    some = config(stage_settings("ppo"), evaluation={"max_prompts": 4})
    found = load_held_out(some, prompts, world_tokenizer)
    assert len(found.prompts) == 4
    assert found.prompt_texts == [f"p{ids[0]}" for ids in found.prompt_ids]
    assert found.groups == [f"g{ids[0] // 2}" for ids in found.prompt_ids]


def test_nothing_is_measured_on_what_chose(
    stage_settings, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Prompts, texts and response sets of the test are in no stage's validation data."""
    settings = stage_settings("ppo")
    settings["data"] |= {"max_eval_samples": None}
    sets = settings["data"]["eval_sources"][0].replace("comparisons_eval", "response_sets")
    everything = config(settings, evaluation={"response_sets": sets})
    records = read_records(everything.data, "ppo")
    data = tokenize(records, world_tokenizer, everything.data, "ppo").eval
    test, validation = (
        load_held_out(everything, data, world_tokenizer, split) for split in ("test", "validation")
    )
    assert (test.split, validation.split) == ("test", "validation")
    assert sorted(test.prompt_texts + validation.prompt_texts) == sorted(data["prompt"][:])
    assert not set(test.prompt_texts) & set(validation.prompt_texts)
    assert test.texts
    assert validation.texts
    chose = {finite.prompt for finite in validation.sets} | set(validation.prompt_texts)
    assert chose
    assert not {finite.prompt for finite in test.sets} & chose
    # The reward model's weights were chosen on the same prompts.
    reward = check_config(RewardConfig, stage_settings("reward") | {"data": settings["data"]}, ":")
    _, compared = prepare(reward, "reward")
    assert set(compared.held_out["validation"]["prompt"][:]) <= chose


def test_other_data_are_another_evaluation(stage_settings) -> None:
    """All that is measured counts; what counted before, weights and settings, is in test_resume."""
    held_out = HeldOut([[1, 2]], ["a"], [([1], [2])], [FiniteSet("q", ("x", "y"), None, None)])
    same = HeldOut([[1, 2]], ["a"], [([1], [2])], [FiniteSet("q", ("x", "y"), None, None)])
    assert held_out.digest == same.digest
    changes: list[dict[str, Any]] = [
        {"prompt_ids": [[1, 3]]},
        {"prompts": ["b"]},
        {"texts": [([1], [3])]},
        {"sets": [FiniteSet("q", ("x", "z"), None, None)]},
        {"sets": [FiniteSet("q", ("x", "y"), (0.5, 0.5), None)]},
    ]
    settings = config(stage_settings("ppo"))
    fingerprints = [fingerprint(settings, replace(held_out, **change)) for change in [{}, *changes]]
    assert len({entry["held_out"] for entry in fingerprints}) == 6
    assert fingerprints[0]["held_out"] == held_out.digest


def test_another_spelling_of_a_path_is_the_same_evaluation(
    stage_settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, held_out = stage_settings("ppo"), HeldOut([], [], [], [])
    model = Path(settings["model_name_or_path"])
    monkeypatch.chdir(model.parent)
    spellings = [str(model), model.name, f"./{model.name}/", f"{model}/../{model.name}"]
    # A bare name of one part may be one of the Hub's.
    found = [
        fingerprint(config(settings, model_name_or_path=path, output_dir=f"runs/{n}"), held_out)
        for n, path in enumerate(spellings)
        if "/" in path
    ]
    assert len(found) == 3
    assert found[0] == found[1] == found[2]
    assert fingerprint(config(settings, seed=7), held_out) != found[0]
