"""Figures that are not finite, in whole runs: the step is not taken, and its batch is kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from step1_sft import main as sft
from step1_sft.config import SFTConfig
from step2_reward import main as reward
from step2_reward.config import RewardConfig
from step3_rlhf import main as ppo
from step3_rlhf.config import PPOConfig
from training.config import check_config
from training.errors import RunError

pytestmark = pytest.mark.usefixtures("process_group")
Settings = Callable[[str], dict[str, Any]]


def kept(output: str, step: int) -> Any:
    (only,) = (Path(output) / "debug").iterdir()
    assert only.name == f"step-{step}.pt"
    (rank,) = torch.load(only, weights_only=True)["ranks"]
    return rank


def test_weights_that_exploded_end_the_run_with_the_batch(stage_settings: Settings) -> None:
    settings = stage_settings("sft") | {"learning_rate": 1e30, "max_steps": 9}
    with pytest.raises(RunError, match=r"Step \d was not taken(.|\n)*lower the learning rate"):
        sft.main(check_config(SFTConfig, settings, "config:"))
    output = Path(settings["output_dir"])
    step = len((output / "metrics.jsonl").read_text().splitlines()) + 1
    (micro_batch,) = kept(str(output), step)
    assert len(micro_batch) == 4
    assert all(isinstance(row["prompt"], str) and row["prompt"] for row in micro_batch)
    assert all(row["prompt_ids"] for row in micro_batch)


def test_rewards_that_are_no_numbers_end_the_run_with_the_rollout(
    stage_settings: Settings, tmp_path: Path
) -> None:
    """A reward model whose head was damaged: its config and loading are in order."""
    trained = stage_settings("reward") | {"max_steps": 1}
    reward.main(check_config(RewardConfig, trained, "config:"))
    model = Path(trained["output_dir"]) / "model"
    weights = load_file(model / "model.safetensors")
    weights["score.weight"].fill_(torch.nan)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})

    settings = stage_settings("ppo") | {
        "reward": {"model_name_or_path": str(model)},
        "critic_model_name_or_path": stage_settings("ppo")["model_name_or_path"],
    }
    with pytest.raises(RunError, match=r"Step 1 was not taken: rewards: 4 not finite"):
        ppo.main(check_config(PPOConfig, settings, "config:"))
    rollout = kept(settings["output_dir"], 1)
    assert len(rollout["prompts"]) == len(rollout["responses"]) == 4
    assert all(isinstance(prompt, str) and prompt for prompt in rollout["prompts"])
    assert rollout["input_ids"].shape == rollout["attention_mask"].shape


def test_a_critic_that_exploded_ends_ppo_before_the_actor_steps(stage_settings: Settings) -> None:
    settings = stage_settings("ppo") | {"total_episodes": 24}
    reward_model = stage_settings("reward") | {"max_steps": 1}
    reward.main(check_config(RewardConfig, reward_model, "config:"))
    settings["reward"] = {"model_name_or_path": str(Path(reward_model["output_dir"]) / "model")}
    settings["critic"] = settings["critic"] | {"learning_rate": 1e30}
    with pytest.raises(RunError, match=r"Step [2-6] was not taken: the loss is \["):
        ppo.main(check_config(PPOConfig, settings, "config:"))
