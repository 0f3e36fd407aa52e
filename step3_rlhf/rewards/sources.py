"""Where rewards come from: models (reward_models.py), sums of them, or a Python function."""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from step3_rlhf.config import EvaluationConfig, PPOConfig, RewardSettings
from step3_rlhf.rewards.model import ModelReward
from step3_rlhf.rewards.readings import reading
from step3_rlhf.rollout import Rollout
from training.errors import UserError
from training.models.loading import load_reward_model
from training.models.pretrained import check_scalar_config, load_model_config
from training.models.tokenizers import load_tokenizer
from training.plugins import import_object
from training.runtime import engine, ranks

RewardFunction = Callable[[list[str], list[str]], list[float]]


class RewardSource(Protocol):
    def __call__(self, rollout: Rollout) -> Tensor:
        """[B] rewards r(x, y), float32."""
        ...


class FunctionReward:
    """Rewards from `module:callable`, checked: one finite number per response."""

    def __init__(self, function: RewardFunction, name: str) -> None:
        self.function = function
        self.name = name

    def __call__(self, rollout: Rollout) -> Tensor:
        try:
            rewards, own = self._checked(list(rollout.prompts), list(rollout.responses)), None
        except UserError as error:
            rewards, own = [], error
        # A fault of one rank ends all of them, with its message.
        faults = [fault for fault in ranks.gather_objects([own and str(own)]) if fault]
        if faults:
            raise UserError(faults[0]) from own
        return torch.tensor(rewards, device=rollout.input_ids.device)

    def _checked(self, prompts: list[str], responses: list[str]) -> list[float]:
        try:
            rewards = [float(reward) for reward in self.function(prompts, responses)]
        except Exception as error:
            raise UserError(f"reward.function {self.name} raised {error!r}") from error
        if len(rewards) != len(responses):
            raise UserError(
                f"reward.function {self.name} returned {len(rewards)} rewards for "
                f"{len(responses)} responses"
            )
        for prompt, response, reward in zip(prompts, responses, rewards, strict=True):
            if not math.isfinite(reward):
                raise UserError(
                    f"reward.function {self.name} returned {reward} for the prompt {prompt!r} and "
                    f"the response {response!r}"
                )
        return rewards


class WeightedSum:
    """Σ weight · reward over several sources."""

    def __init__(self, sources: list[tuple[float, RewardSource]]) -> None:
        self.sources = sources

    def __call__(self, rollout: Rollout) -> Tensor:
        return torch.stack([weight * source(rollout) for weight, source in self.sources]).sum(0)


def import_function(path: str) -> RewardFunction:
    """The callable that `module:callable` names.

    Raises:
        UserError: it cannot be imported, or is not callable.
    """
    try:
        found = import_object(path, form="module:callable")
    except ValueError as error:
        raise UserError(f"reward.function: {path} cannot be imported: {error}") from error
    if not callable(found):
        raise UserError(f"reward.function: {path} is not callable")
    function: RewardFunction = found
    return function


def check_reward(
    settings: RewardSettings, trust_remote_code: bool, untrained: str | None = None
) -> None:
    """Find what is wrong with the source without loading any weights.

    Args:
        untrained: a model that need not be a reward model: it stands for one.

    Raises:
        UserError: a function that cannot be imported, a model that is no reward model.
    """
    if settings.function:
        import_function(settings.function)
    for member in settings.weighted_models:
        config = load_model_config(member.model_name_or_path, trust_remote_code)
        stands_in = member.model_name_or_path == untrained
        check_scalar_config(config, member.model_name_or_path, new_head=stands_in)


def load_reward(
    settings: RewardSettings,
    policy_tokenizer: PreTrainedTokenizerBase,
    config: PPOConfig | EvaluationConfig,
) -> RewardSource:
    """The configured source; models are frozen."""
    if settings.function:
        return FunctionReward(import_function(settings.function), settings.function)
    sources: list[tuple[float, RewardSource]] = [
        (member.weight, load_model_reward(member.model_name_or_path, policy_tokenizer, config))
        for member in settings.weighted_models
    ]
    return sources[0][1] if len(sources) == 1 and sources[0][0] == 1.0 else WeightedSum(sources)


def load_model_reward(
    path: str, policy_tokenizer: PreTrainedTokenizerBase, config: PPOConfig | EvaluationConfig
) -> ModelReward:
    trusted, dtype = config.trust_remote_code, engine.precision(config)
    tokenizer = load_tokenizer(path, trusted, of_pairs=True)
    read = reading(path, tokenizer, policy_tokenizer, load_model_config(path, trusted), trusted)
    model = load_reward_model(path, tokenizer, dtype, trusted, config.packing)
    frozen = engine.frozen(model, config.frozen_deepspeed, dtype)
    return ModelReward(frozen, read, config.per_device_eval_batch_size)
