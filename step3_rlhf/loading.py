"""Loads the policies of stage 3 that are not trained."""

from torch import nn
from transformers import PreTrainedTokenizerBase

from step3_rlhf.config import AlignmentConfig
from training.models.loading import load_policy
from training.models.options import LoadOptions
from training.models.pretrained import Pretrained
from training.runtime import engine


def load_frozen_policy(
    pretrained: Pretrained, tokenizer: PreTrainedTokenizerBase, config: AlignmentConfig
) -> nn.Module:
    """Load a policy that only draws and scores.

    `frozen_deepspeed` decides whether each process has a whole copy or ZeRO-3 divides it.

    Args:
        tokenizer: the tokenizer of the policy that is trained or measured.
    """
    options = LoadOptions.frozen(config)
    policy = load_policy(pretrained, tokenizer, options)
    return engine.frozen(policy, config.frozen_deepspeed, options.dtype)
