"""What can be wrong with the models of stage 3 or its evaluation, before any weights are loaded."""

from transformers import PreTrainedTokenizerBase

from step3_rlhf.config import EvaluationConfig, PPOConfig
from step3_rlhf.response_sets import FiniteSet, read_response_sets
from step3_rlhf.rewards.readings import reads_as
from step3_rlhf.rewards.sources import check_reward
from step3_rlhf.rollout import encode_prompt_texts
from training.data import encode_responses
from training.errors import UserError
from training.models.pretrained import (
    check_positions,
    check_scalar_config,
    has_linear_score,
    load_model_config,
)
from training.models.tokenizers import load_tokenizer, require_same_tokens
from training.runtime.tracking import say


def check_models(
    config: PPOConfig | EvaluationConfig,
    tokenizer: PreTrainedTokenizerBase,
    stand_in: str | None = None,
) -> None:
    """Refuse models that do not go together, or not with the settings.

    Args:
        tokenizer: the policy's.
        stand_in: a model that stands for a reward model, in a dry run.

    Raises:
        UserError: naming the model and the settings.
    """
    sets = read_response_sets(config.evaluation.response_sets)
    check_reward(config.reward, config.trust_remote_code, untrained=stand_in)
    for setting in ("reference_model_name_or_path", "critic_model_name_or_path"):
        if path := getattr(config, setting, None):
            renamed = require_same_tokens(
                path, tokenizer, setting, config.model_name_or_path, config.trust_remote_code
            )
            if renamed:
                names = ", ".join(sorted(renamed)[:5]) + (" …" if len(renamed) > 5 else "")
                say(f"{setting}: {path} knows {len(renamed)} tokens by other names: {names}")
    if critic := getattr(config, "critic_model_name_or_path", None):
        check_critic(critic, config.trust_remote_code)
    check_lengths(config, sets, tokenizer)


def check_critic(path: str, trust_remote_code: bool) -> None:
    """Refuse a model of which no critic can be made.

    Raises:
        UserError: it has several labels, or no linear `score`.
    """
    config = load_model_config(path, trust_remote_code)
    check_scalar_config(config, path, new_head=True)
    if not has_linear_score(config, trust_remote_code):
        raise UserError(
            f"critic_model_name_or_path: {path} has no value after each token (a linear head "
            "named 'score' on its last states)"
        )


def check_lengths(
    config: PPOConfig | EvaluationConfig, sets: list[FiniteSet], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse lengths that any of the models does not know.

    Raises:
        UserError: naming the model and the settings.
    """
    data = config.data
    needs = {
        "data.max_prompt_length + response_length": data.max_prompt_length + config.response_length,
        **data.lengths(),  # of held-out texts, whose perplexity the evaluation takes
        "a prompt and a response of evaluation.response_sets": longest(sets, tokenizer),
    }
    paths = [config.model_name_or_path, config.reference_model_name_or_path]
    if isinstance(config, PPOConfig):
        paths.append(config.critic_model_name_or_path)
        if config.evaluation.sampling is not None:
            needs["data.max_prompt_length + evaluation.sampling.response_length"] = (
                data.max_prompt_length + config.evaluation.sampling.response_length
            )
    for member in config.reward.weighted_models:
        path, trusted = member.model_name_or_path, config.trust_remote_code
        own = load_tokenizer(path, trusted, of_pairs=True)
        if reads_as(own, tokenizer, load_model_config(path, trusted)):
            paths.append(path)  # others cut texts to what they know
    for path in dict.fromkeys(path for path in paths if path):
        check_positions(path, needs, config.trust_remote_code)


def longest(sets: list[FiniteSet], tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest prompt with its longest response; 0 where there are no sets."""
    prompts = encode_prompt_texts([finite.prompt for finite in sets], tokenizer) if sets else []
    return max(
        (
            len(prompt) + max(map(len, encode_responses(list(finite.responses), tokenizer)))
            for finite, prompt in zip(sets, prompts, strict=True)
        ),
        default=0,
    )
