"""Figures that are not finite, in whole runs: the step is not taken, and its batch is kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from step1_sft import main as sft
from step1_sft.config import SFTConfig
from step2_reward import main as reward
from step2_reward.config import RewardConfig
from step3_rlhf import main as ppo
from step3_rlhf.config import PPOConfig
from training.config import check_config
from training.errors import RunError, UserError
from training.models.comparison import Text

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
    """A reward model with damaged embeddings, except those of the tokens tried at loading."""
    model = trained_reward_model(stage_settings)
    tokenizer = AutoTokenizer.from_pretrained(model)
    weights = load_file(model / "model.safetensors")
    damaged = torch.ones(len(tokenizer), dtype=torch.bool)
    damaged[[*Text.of(tokenizer, None).ids, tokenizer.pad_token_id]] = False
    weights["model.embed_tokens.weight"][damaged] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})

    settings = ppo_with(model, stage_settings)
    with pytest.raises(RunError, match=r"Step 1 was not taken: rewards: 4 not finite"):
        ppo.main(check_config(PPOConfig, settings, "config:"))
    rollout = kept(settings["output_dir"], 1)
    assert len(rollout["prompts"]) == len(rollout["responses"]) == 4
    assert all(isinstance(prompt, str) and prompt for prompt in rollout["prompts"])
    assert rollout["input_ids"].shape == rollout["attention_mask"].shape


def test_a_reward_model_with_a_damaged_head_is_refused(stage_settings: Settings) -> None:
    model = trained_reward_model(stage_settings)
    weights = load_file(model / "model.safetensors")
    weights["score.weight"].fill_(torch.nan)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="its own forward gives values that are not finite"):
        ppo.main(check_config(PPOConfig, ppo_with(model, stage_settings), "config:"))


def trained_reward_model(stage_settings: Settings) -> Path:
    settings = stage_settings("reward") | {"max_steps": 1}
    reward.main(check_config(RewardConfig, settings, "config:"))
    return Path(settings["output_dir"]) / "model"


def ppo_with(reward_model: Path, stage_settings: Settings) -> dict[str, Any]:
    """Settings of a PPO run whose critic starts from the policy."""
    settings = stage_settings("ppo")
    return settings | {
        "reward": {"model_name_or_path": str(reward_model)},
        "critic_model_name_or_path": settings["model_name_or_path"],
    }


def test_a_critic_that_exploded_ends_ppo_before_the_actor_steps(stage_settings: Settings) -> None:
    settings = stage_settings("ppo") | {"total_episodes": 24}
    reward_model = stage_settings("reward") | {"max_steps": 1}
    reward.main(check_config(RewardConfig, reward_model, "config:"))
    settings["reward"] = {"model_name_or_path": str(Path(reward_model["output_dir"]) / "model")}
    settings["critic"] = settings["critic"] | {"learning_rate": 1e30}
    with pytest.raises(RunError, match=r"Step [2-6] was not taken: the loss is \["):
        ppo.main(check_config(PPOConfig, settings, "config:"))
