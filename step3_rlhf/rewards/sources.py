"""Sources of rewards: models, weighted sums or mixtures of them, a Python function or a server."""

from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from step3_rlhf.config import AlignmentConfig, RewardSettings
from step3_rlhf.rewards.functions import FunctionReward, import_function
from step3_rlhf.rewards.model import ModelReward
from step3_rlhf.rewards.readings import reading
from step3_rlhf.rewards.server import ServerReward, try_server
from step3_rlhf.roles import Roles
from step3_rlhf.rollout import Rollout
from training.models.checks import check_scalar
from training.models.loading import load_reward_model
from training.models.options import LoadOptions
from training.models.pretrained import Pretrained
from training.runtime import engine


class RewardSource(Protocol):
    def __call__(self, rollout: Rollout) -> Tensor:
        """[B] rewards r(x, y), float32; of a mixture [B, G], those of each group."""
        ...


class WeightedSum:
    """Σ weight · reward over several sources: of groups of people, the geometric pool."""

    def __init__(self, sources: list[tuple[float, RewardSource]]) -> None:
        self.sources = sources

    def __call__(self, rollout: Rollout) -> Tensor:
        return torch.stack([weight * source(rollout) for weight, source in self.sources]).sum(0)


class ByGroup:
    """The rewards of each group of a mixture; mixture.py makes one reward of them."""

    def __init__(self, sources: list[RewardSource]) -> None:
        self.sources = sources

    def __call__(self, rollout: Rollout) -> Tensor:
        return torch.stack([source(rollout) for source in self.sources], dim=-1)


def check_reward(
    settings: RewardSettings | None, roles: Roles, untrained: str | None = None
) -> None:
    """Check the reward source without loading any weights.

    Args:
        untrained: a model that need not be a reward model, because it stands in for one.

    Raises:
        UserError: the function cannot be imported, the server gives no reward for a response that
            is tried, or a model is not a reward model.
    """
    if settings and settings.function:
        import_function(settings.function)
    if settings and settings.url:
        try_server(settings, roles.policy.tokenizer)
    for _, reward in roles.rewards:
        check_scalar(reward, new_head=reward.name_or_path == untrained)


def load_reward(config: AlignmentConfig, roles: Roles) -> RewardSource:
    """Load the source of a config that has one; its models are frozen."""
    assert config.reward is not None
    if config.reward.function:
        return FunctionReward(import_function(config.reward.function), config.reward.function)
    if config.reward.url:
        return ServerReward(config.reward, roles.policy.tokenizer)
    sources: list[tuple[float, RewardSource]] = [
        (weight, load_model_reward(reward, roles.policy.tokenizer, config))
        for weight, reward in roles.rewards
    ]
    if config.reward.mixture:
        return ByGroup([source for _, source in sources])
    return sources[0][1] if len(sources) == 1 and sources[0][0] == 1.0 else WeightedSum(sources)


def load_model_reward(
    reward: Pretrained, policy_tokenizer: PreTrainedTokenizerBase, config: AlignmentConfig
) -> ModelReward:
    """Load one frozen reward model, and choose how it reads the policy's responses."""
    read = reading(reward, policy_tokenizer)
    options = LoadOptions.frozen(config)
    model = engine.frozen(
        load_reward_model(reward, options), config.frozen_deepspeed, options.dtype
    )
    return ModelReward(model, read, config.per_device_eval_batch_size)
