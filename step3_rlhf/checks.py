"""Checks the models of stage 3 or of its evaluation before any weights are loaded."""

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from step3_rlhf.classes.answer_key import read_answer_key
from step3_rlhf.classes.shares import check_classes
from step3_rlhf.config import AlignmentConfig, EvaluationConfig, PPOConfig
from step3_rlhf.regularizers.base import Regularizer
from step3_rlhf.response_sets import FiniteSet, read_response_sets
from step3_rlhf.rewards.links import check_links
from step3_rlhf.rewards.readings import reads_policy_tokens, refusal
from step3_rlhf.rewards.sources import check_reward
from step3_rlhf.roles import CRITIC, Roles
from step3_rlhf.rollout import encode_prompt_texts
from training.data import (
    Record,
    StageRecords,
    TemplateRefusal,
    dialogue_text,
    encode_responses,
    prompt_messages,
)
from training.data.tally import Mistakes
from training.data.tokens import WHAT_HELPS
from training.errors import UserError
from training.models.checks import check_positions, check_scalar, require_same_tokens
from training.models.pretrained import Pretrained
from training.runtime.tracking import say


def check_models(config: AlignmentConfig, roles: Roles, stand_in: str | None = None) -> None:
    """Refuse models that do not fit one another or the settings.

    Args:
        stand_in: in a dry run, the model that stands in for a reward model not trained yet.

    Raises:
        UserError: names the model and the settings.
    """
    sets = read_response_sets(config.evaluation.response_sets)
    if isinstance(config, PPOConfig | EvaluationConfig):
        check_classes(config.regularizer, roles.policy.tokenizer, config.response_length)
    check_reward(config.reward, roles, untrained=stand_in)
    regularizer: Regularizer | None = getattr(config, "regularizer", None)
    check_links(regularizer, [model for _, model in roles.rewards if str(model) != stand_in])
    for setting, model in roles.named.items():
        if renamed := require_same_tokens(model, roles.policy, setting):
            names = ", ".join(sorted(renamed)[:5]) + (" …" if len(renamed) > 5 else "")
            say(f"{setting}: {model} knows {len(renamed)} tokens by other names: {names}")
    if CRITIC in roles.named:
        check_critic(roles.named[CRITIC])
    check_lengths(config, roles, sets)


def readable_records(config: AlignmentConfig, roles: Roles, records: StageRecords) -> StageRecords:
    """Try every prompt on the chat templates of the reward models that read it anew.

    Returns:
        The records without those that a template refuses, if the settings say to skip such records;
        the tally has them.

    Raises:
        UserError: names those records, if the settings say to stop; or a response set.
    """
    mistakes = Mistakes()
    parts: dict[str, list[Record]] = {"training": records.train, "evaluation": records.eval}
    for _, reward in roles.rewards:
        why = refusal(reward, roles.policy.tokenizer)
        for finite in read_response_sets(config.evaluation.response_sets):
            if reason := why(prompt_messages(finite.prompt)):
                raise UserError(_refused_set(reward, finite, reason))
        for name, content in parts.items():
            kept, refused = [], Mistakes()
            for record in content:
                if reason := why(record.prompt):
                    for found in (refused, mistakes):
                        found.add(record.origin, f"the chat template of {reward} refuses: {reason}")
                else:
                    kept.append(record)
            parts[name] = kept
            for what, count in refused.left_out():
                records.tally.add(name, what, count)
    if mistakes and config.data.on_bad_record == "stop":
        raise UserError([*mistakes.lines(), WHAT_HELPS], "The data cannot be used:")
    for name, content in parts.items():
        if not content and getattr(records, "train" if name == "training" else "eval"):
            raise UserError(records.tally.lines(), f"No {name} records are left:")
    return replace(records, train=parts["training"], eval=parts["evaluation"])


def check_answer_key(config: PPOConfig, records: StageRecords) -> None:
    """Say how many of the training prompts an answer key has, if the regularizer reads one.

    Raises:
        UserError: it has none of them.
    """
    classes = config.regularizer.response_classes
    if classes is None or classes.answer_key is None:
        return
    key = read_answer_key(classes.answer_key)
    found = sum(dialogue_text(record.prompt) in key for record in records.train)
    share = f"{classes.answer_key} has classes for {found} of {len(records.train)} training prompts"
    if not found:
        raise UserError(f"regularizer.classes.answer_key: {share}")
    say(f"{share}; responses to others keep the reference's weight")


def _refused_set(model: Pretrained, finite: FiniteSet, reason: str) -> str:
    return (
        f"evaluation.response_sets: the chat template of {model} refuses the prompt "
        f"{finite.prompt!r}: {reason}"
    )


def check_critic(critic: Pretrained) -> None:
    """Refuse a model that cannot become a critic.

    Raises:
        UserError: it has several labels, or no linear head named `score`.
    """
    check_scalar(critic, new_head=True)
    if not critic.has_linear_score:
        raise UserError(
            f"{CRITIC}: {critic} has no value after each token; a critic needs a linear head named "
            "'score' on its last hidden states"
        )


def check_lengths(config: AlignmentConfig, roles: Roles, sets: list[FiniteSet]) -> None:
    """Refuse settings that allow sequences longer than one of the models can read.

    Raises:
        UserError: names the model and the settings; or the response set that the policy's chat
            template refuses.
    """
    data = config.data
    for finite in sets:
        try:
            encode_prompt_texts([finite.prompt], roles.policy.tokenizer)
        except TemplateRefusal as reason:
            raise UserError(_refused_set(roles.policy, finite, str(reason))) from None
    needs = {
        "data.max_prompt_length + response_length": data.max_prompt_length + config.response_length,
        **data.lengths(),  # the evaluation takes the perplexity of held-out texts
        "a prompt and a response of evaluation.response_sets": longest(
            sets, roles.policy.tokenizer
        ),
    }
    if isinstance(config, PPOConfig) and config.ptx_data is not None:
        for name, length in config.ptx_data.lengths().items():
            needs[name.replace("data.", "ptx_data.")] = length
    trains = not isinstance(config, EvaluationConfig)  # which has its own sampling already
    if trains and config.evaluation.sampling is not None:
        needs["data.max_prompt_length + evaluation.sampling.response_length"] = (
            data.max_prompt_length + config.evaluation.sampling.response_length
        )
    models = [roles.policy, *roles.named.values()]
    models += [
        reward
        for _, reward in roles.rewards
        if reads_policy_tokens(reward, roles.policy.tokenizer)  # the others truncate their input
    ]
    for model in {model.name_or_path: model for model in models}.values():
        check_positions(model, needs)


def longest(sets: list[FiniteSet], tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of tokens of the longest prompt and response together; 0 if there are no sets."""
    prompts = encode_prompt_texts([finite.prompt for finite in sets], tokenizer) if sets else []
    return max(
        (
            len(prompt) + max(map(len, encode_responses(list(finite.responses), tokenizer)))
            for finite, prompt in zip(sets, prompts, strict=True)
        ),
        default=0,
    )
