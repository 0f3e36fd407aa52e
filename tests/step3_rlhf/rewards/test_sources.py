"""Sources of rewards: functions, whose faults are the user's, sums, and what a config names."""

import asyncio
import math
import re
from pathlib import Path

import pytest
import torch

from step3_rlhf.config import PPOConfig
from step3_rlhf.rewards import answers as module
from step3_rlhf.rewards.functions import FunctionReward, import_function
from step3_rlhf.rewards.sources import WeightedSum, load_reward
from step3_rlhf.roles import roles_of
from step3_rlhf.rollout import Rollout, assemble, encode_prompt_texts
from training.config import check_config
from training.data import encode_responses
from training.errors import UserError
from training.models.loading import load_scalar_model
from training.models.pretrained import Pretrained

PROMPTS = ("Please suggest a drink.", "What is a good pet?", "Hi")
RESPONSES = ("tea", "a cat, or perhaps two of them", "hello")


@pytest.fixture
def rollout(world_tokenizer) -> Rollout:
    return assemble(
        encode_prompt_texts(PROMPTS, world_tokenizer),
        encode_responses(list(RESPONSES), world_tokenizer),
        PROMPTS,
        world_tokenizer,
        torch.device("cpu"),
    )


# Functions


def test_a_function_gets_prompts_and_responses_as_texts(rollout: Rollout) -> None:
    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        assert (tuple(prompts), tuple(responses)) == (PROMPTS, RESPONSES)
        return [len(response) for response in responses]

    assert FunctionReward(reward, "m:f")(rollout).tolist() == [3.0, 29.0, 5.0]


def raises(prompts: list[str], responses: list[str]) -> list[float]:
    raise KeyError("colour")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, "reward.function m:f raised KeyError('colour')"),
        (lambda p, r: [1.0, 2.0], "m:f returned 2 rewards for 3 responses"),
        (lambda p, r: [1.0, math.nan, 2.0], f"m:f returned nan for the prompt {PROMPTS[1]!r}"),
        (lambda p, r: [1.0, 2.0, -math.inf], f"the response {RESPONSES[2]!r}"),
        (lambda p, r: None, "reward.function m:f returned None; one number for each response"),
        (
            lambda p, r: ["good", "bad", "ugly"],
            f"m:f returned 'good' for the prompt {PROMPTS[0]!r}",
        ),
        (lambda p, r: {"value": 1}, "m:f returned an object without 'rewards': it has 'value'"),
        (
            lambda p, r: [1 / (len(text) - 5) for text in r],
            f"m:f raised ZeroDivisionError('division by zero') for the prompt {PROMPTS[2]!r} and "
            f"the response {RESPONSES[2]!r}",
        ),
    ],
)
def test_faults_of_a_function(rollout: Rollout, function, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        FunctionReward(function, "m:f")(rollout)


def test_a_function_may_be_asynchronous(rollout: Rollout) -> None:
    loops = set()

    async def one(text: str) -> float:
        await asyncio.sleep(0)
        return float(len(text))

    async def reward(prompts: list[str], responses: list[str]) -> list[float]:
        loops.add(asyncio.get_running_loop())
        return await asyncio.gather(*map(one, responses))

    source = FunctionReward(reward, "m:f")
    assert source(rollout).tolist() == source(rollout).tolist() == [3.0, 29.0, 5.0]
    assert len(loops) == 1  # a client that the function keeps goes on working

    async def fails(prompts: list[str], responses: list[str]) -> list[float]:
        if RESPONSES[1] in responses:
            raise KeyError("colour")
        return [0.0 for _ in responses]

    with pytest.raises(UserError, match=f"KeyError.'colour'. for the prompt '{PROMPTS[1][:9]}"):
        FunctionReward(fails, "m:f")(rollout)


@pytest.mark.parametrize(
    "answer", [torch.tensor([1.0, 2.0, 3.0]), {"rewards": torch.tensor([[1.0], [2.0], [3.0]])}]
)
def test_what_a_function_may_return(rollout: Rollout, answer) -> None:
    assert FunctionReward(lambda p, r: answer, "m:f")(rollout).tolist() == [1.0, 2.0, 3.0]


def test_a_fault_on_another_rank_ends_this_one_too(
    rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.ranks, "gather_objects", lambda own: [*own, "rank 1 said so"])
    with pytest.raises(UserError, match="rank 1 said so"):
        FunctionReward(lambda p, r: [1.0, 2.0, 3.0], "m:f")(rollout)


def test_functions_are_imported_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text("class A:\n    f = staticmethod(len)\nnumber = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert import_function("my_rewards:A.f") is len
    for path, message in {
        "my_rewards:B": "my_rewards:B cannot be imported",
        "no_such_module_here:f": "cannot be imported",
        "my_rewards:number": "is not callable",
    }.items():
        with pytest.raises(UserError, match=message):
            import_function(path)


def test_weighted_sums(rollout: Rollout) -> None:
    lengths = FunctionReward(lambda p, r: [len(x) for x in r], "a:b")
    ones = FunctionReward(lambda p, r: [1.0 for _ in r], "c:d")
    found = WeightedSum([(0.5, lengths), (-2.0, ones)])(rollout)
    assert found.tolist() == [-0.5, 12.5, 0.5]


def test_the_configured_source(
    rollout: Rollout, tiny_world: Path, world_tokenizer, stage_settings, tmp_path: Path
) -> None:
    scalar = load_scalar_model(Pretrained(str(tiny_world / "base")), world_tokenizer, new_head=True)
    torch.manual_seed(0)
    torch.nn.init.normal_(scalar.model.score.weight)
    path = str(tmp_path / "reward")
    scalar.model.save_pretrained(path)
    world_tokenizer.save_pretrained(path)
    with torch.no_grad():
        own = scalar.rewards(rollout.input_ids, rollout.attention_mask)
    assert own.std() > 1e-3
    for settings, expected in (
        ({"model_name_or_path": path}, own),
        ({"models": [{"model_name_or_path": path, "weight": 0.25}]}, 0.25 * own),
        ({"models": [{"model_name_or_path": path}, {"model_name_or_path": path}]}, 2 * own),
        ({"model_name_or_path": path, "labels": {"LABEL_0": -3.0}}, -3 * own),
        ({"models": [{"model_name_or_path": path, "labels": {"0": 2.0}, "weight": 0.5}]}, own),
    ):
        config = check_config(PPOConfig, stage_settings("ppo") | {"reward": settings}, "config:")
        source = load_reward(config, roles_of(config))
        torch.testing.assert_close(source(rollout), expected, rtol=0, atol=1e-5)
    config = check_config(
        PPOConfig, stage_settings("ppo") | {"reward": {"function": "operator:add"}}, "config:"
    )
    named = load_reward(config, roles_of(config))
    assert isinstance(named, FunctionReward)
    assert named.name == "operator:add"
