"""A PPO trainer with tiny random models, on the tiny world."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from step3_rlhf.config import PPOConfig
from step3_rlhf.prompts import Prompts
from step3_rlhf.rewards.functions import FunctionReward
from step3_rlhf.trainer import PPOTrainer
from training.config import check_config
from training.data import read_records, tokenize
from training.models.loading import load_policy, load_scalar_model
from training.models.pretrained import Pretrained
from training.runtime import engine
from training.runtime.engine import TrainedModule


@pytest.fixture
def configured(stage_settings: Callable[[str], dict[str, Any]]) -> Callable[..., PPOConfig]:
    """A config whose first Adam step is nearly linear in the gradient.

    Two equal steps then mean two equal gradients.
    """

    def config(**changes: Any) -> PPOConfig:
        optimizer = {
            "learning_rate": 0.1,
            "adam_epsilon": 1.0,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
        }
        settings = stage_settings("ppo") | {
            "actor": optimizer,
            "critic": optimizer,
            "reward": {"function": "operator:add"},
            "regularizer": {"name": "kl", "beta": 0.5},
            "per_device_train_batch_size": 8,
        }
        return check_config(PPOConfig, settings | changes, "config:")

    return config


@pytest.fixture
def build(
    configured: Callable[..., PPOConfig], world_tokenizer: PreTrainedTokenizerBase
) -> Callable[..., PPOTrainer]:
    """A trainer with the same random models each time; the reference differs from the actor.

    The reward of a response is a tenth of its length in characters.
    """

    def trainer(**changes: Any) -> PPOTrainer:
        config = configured(**changes)
        records = read_records(config.data, "ppo")
        data = tokenize(records, world_tokenizer, config.data, "ppo").train
        path = config.model_name_or_path
        actor, reference = (load_policy(Pretrained(path), world_tokenizer) for _ in range(2))
        critic = load_scalar_model(Pretrained(path), world_tokenizer, new_head=True)
        torch.manual_seed(0)
        for head in (actor.model.lm_head, reference.model.lm_head, critic.model.score):
            torch.nn.init.normal_(head.weight, std=0.2)
        trained_critic = None
        if config.critic is not None:
            trained_critic = TrainedModule(critic, config, config.critic, 10)
        return PPOTrainer(
            config,
            TrainedModule(actor, config, config.actor, 10),
            trained_critic,
            engine.frozen(reference, {}, torch.float32),
            FunctionReward(lambda prompts, texts: [len(text) / 10 for text in texts], "m:f"),
            Prompts(data, config),
            world_tokenizer,
        )

    return trainer
