"""The policies of stage 3 that are not trained."""

from deepspeed import DeepSpeedEngine
from torch import nn
from transformers import PreTrainedTokenizerBase

from step3_rlhf.config import AlignmentConfig
from training.models.loading import load_policy
from training.models.options import LoadOptions
from training.models.policy import Policy
from training.models.pretrained import Pretrained
from training.runtime import engine


def load_frozen_policy(
    pretrained: Pretrained,
    tokenizer: PreTrainedTokenizerBase,
    config: AlignmentConfig,
    same_ends_as: nn.Module | None = None,
) -> nn.Module:
    """A policy that only draws and scores, whole or divided as `frozen_deepspeed` says.

    Args:
        tokenizer: that of the policy which is trained or measured.
        same_ends_as: that policy, where this is its reference.
    """
    options = LoadOptions.frozen(config)
    ends = None if same_ends_as is None else response_ends_of(same_ends_as)
    policy = load_policy(pretrained, tokenizer, options, ends)
    return engine.frozen(policy, config.frozen_deepspeed, options.dtype)


def response_ends_of(policy: nn.Module) -> tuple[int, ...]:
    """The ids that end a response of a Policy, or of the one in a DeepSpeed engine."""
    own = policy.module if isinstance(policy, DeepSpeedEngine) else policy
    assert isinstance(own, Policy)
    return own.ends
