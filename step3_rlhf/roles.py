"""Which model plays which role. Each model's config and tokenizer are read from disk once."""

from dataclasses import dataclass

from step3_rlhf.config import AlignmentConfig, PPOConfig
from training.models.pretrained import Pretrained, reads_pairs

REFERENCE, CRITIC = "reference_model_name_or_path", "critic_model_name_or_path"


@dataclass(frozen=True)
class Roles:
    """The models of an evaluation.

    policy     the model that is measured (or trained)
    reference  π_ref; the same object as `policy` unless the config names another model
    rewards    the reward models with their weights; empty if the reward is a function or none
    named      reference and critic if the config names them, keyed by the setting that does
    """

    policy: Pretrained
    reference: Pretrained
    rewards: tuple[tuple[float, Pretrained], ...]
    named: dict[str, Pretrained]


@dataclass(frozen=True)
class TrainingRoles(Roles):
    """The models of a training run.

    critic                the model that the critic starts from; None for RLOO, which has none
    critic_note           why that is not the reward model, if a user would expect it to be
    reference_is_adapted  π_ref is the actor with its adapter switched off; no second copy is loaded
    """

    critic: Pretrained | None
    critic_note: str
    reference_is_adapted: bool


def roles_of(config: AlignmentConfig) -> Roles:
    """The models that an evaluation compares."""
    trusted = config.trust_remote_code
    policy = Pretrained(config.model_name_or_path, trusted, template=config.template)
    other = config.reference_model_name_or_path
    reference = policy if other in (None, policy.name_or_path) else Pretrained(other, trusted)
    members = config.reward.weighted_models if config.reward else []
    rewards = tuple(
        (
            member.weight,
            Pretrained(member.model_name_or_path, trusted, scores_only=True, labels=member.labels),
        )
        for member in members
    )
    return Roles(policy, reference, rewards, {REFERENCE: reference} if other else {})


def training_roles_of(config: PPOConfig) -> TrainingRoles:
    """The models of a training run: those of its evaluation, and the critic if it has one."""
    roles = roles_of(config)
    critic, note = _critic(config, roles) if config.has_critic else (None, "")
    named = roles.named
    if critic is not None and config.critic_model_name_or_path:
        named = named | {CRITIC: critic}
    adapted = config.lora is not None and config.reference_model_name_or_path is None
    return TrainingRoles(roles.policy, roles.reference, roles.rewards, named, critic, note, adapted)


def _critic(config: PPOConfig, roles: Roles) -> tuple[Pretrained, str]:
    """What the critic starts from, and a note where that may surprise the user.

    It starts from the first reward model, provided that this model reads the policy's tokens and
    has a value after each of them; otherwise it starts from the policy.
    """
    if config.critic_model_name_or_path:
        return Pretrained(config.critic_model_name_or_path, config.trust_remote_code), ""
    if not roles.rewards:
        return roles.policy, ""
    _, reward = roles.rewards[0]
    if reward.tokenizer.get_vocab() != roles.policy.tokenizer.get_vocab():
        return (
            roles.policy,
            "The reward model has another vocabulary: the critic starts from the policy",
        )
    if reads_pairs(reward.tokenizer) or not reward.has_linear_score:
        return (
            roles.policy,
            "The reward model has no value after each token: the critic starts from the policy",
        )
    return reward, ""
