"""Which model plays which role in stage 3, where the config leaves it open."""

from transformers import PreTrainedTokenizerBase

from step3_rlhf.config import PPOConfig
from training.models.pretrained import has_linear_score, load_model_config
from training.models.tokenizers import load_tokenizer, reads_pairs


def critic_source(config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Where the critic starts, and why where that is not what was to be expected.

    At the first reward model that reads the policy's tokens and has a value after each of them;
    else at the policy.
    """
    if config.critic_model_name_or_path:
        return config.critic_model_name_or_path, ""
    why = ""
    for member in config.reward.weighted_models[:1]:
        path, trusted = member.model_name_or_path, config.trust_remote_code
        own = load_tokenizer(path, trusted, of_pairs=True)
        if own.get_vocab() != tokenizer.get_vocab():
            why = "The reward model has another vocabulary: the critic starts from the policy"
        elif reads_pairs(own) or not has_linear_score(load_model_config(path, trusted), trusted):
            why = (
                "The reward model has no value after each token: the critic starts from the policy"
            )
        else:
            return path, ""
    return config.model_name_or_path, why


def reference_source(config: PPOConfig) -> str | None:
    """The reference model; None where it is the actor without its adapter."""
    path = config.reference_model_name_or_path
    if config.lora is not None and path is None:
        return None
    return path or config.model_name_or_path
