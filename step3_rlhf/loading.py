"""Loads the policies of stage 3 that are not trained."""

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
    """Load a policy that only draws and scores.

    `frozen_deepspeed` decides whether each process has a whole copy or ZeRO-3 divides it.

    Args:
        tokenizer: the tokenizer of the policy that is trained or measured.
        same_ends_as: the policy that is trained, if the loaded policy is its reference.
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
