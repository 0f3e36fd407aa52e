"""Settings of stage 3: PPO and RLOO, rollouts, reward sources, the regularizer, evaluation."""

import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from step3_rlhf.regularizers.base import Regularizer
from step3_rlhf.regularizers.registry import REGULARIZERS, RegularizerField
from step3_rlhf.rewards.calibration import BetaCalibration, with_calibrated_beta
from training.config import (
    Count,
    Fraction,
    NonNegative,
    PathText,
    Positive,
    StrictModel,
    Variants,
)
from training.data.settings import DataSettings
from training.deepspeed_section import deepspeed_faults
from training.stage_config import OptimizerSettings, RunConfig, StageConfig, model_path_faults

BETA = ("regularizer", "beta")
"""The place of β in a config."""
NO_CERTIFICATE = (
    "because r + R + πR′ is not constant at the optimum of total_variation or of a token-level "
    "f-divergence"
)


class RewardModelSettings(StrictModel):
    """One sequence-classification model with one label, and its weight in the sum of rewards."""

    model_name_or_path: PathText
    """Hub name or directory of a sequence-classification model with one label."""
    weight: float = 1.0
    """Factor of the model's reward in the sum."""
    labels: dict[str, float] = Field(default_factory=dict)
    """Weights of the outputs of a model with several labels; see reward.labels."""

    def faults(self) -> list[str]:
        return model_path_faults("model_name_or_path", self.model_name_or_path)


class GroupSettings(StrictModel):
    """One group of people: the reward model of its preferences, and its share."""

    model_name_or_path: PathText
    """Hub name or directory of a sequence-classification model with one label."""
    share: Positive
    """Share of the population that belongs to the group; the groups' shares add up to 1."""
    labels: dict[str, float] = Field(default_factory=dict)
    """Weights of the outputs of a model with several labels; see reward.labels."""

    def faults(self) -> list[str]:
        return model_path_faults("model_name_or_path", self.model_name_or_path)


class RewardSettings(StrictModel):
    """Where rewards come from: one model, several with weights or shares, a function, a server."""

    model_name_or_path: PathText | None = None
    """A single reward model: what stage 2 wrote, or any with one label."""
    labels: dict[str, float] = Field(default_factory=dict)
    """The reward of a model with several labels: the weights with which the outputs of its labels
    (before any softmax or sigmoid) are added up, by the labels' names or numbers, as in
    {"POSITIVE": 1.0, "NEGATIVE": -1.0}. Empty for a model with one label."""
    models: Annotated[tuple[RewardModelSettings, ...], Field(strict=False)] = ()
    """Several reward models, whose weighted rewards are added up. For groups of people this is the
    geometric pool of their preferences, which gives little to what one group dislikes."""
    mixture: Annotated[tuple[GroupSettings, ...], Field(strict=False)] = ()
    """Groups of people, each with its reward model: the optimum is the mixture of their optima."""
    function: Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")] | None = None
    """A Python function as `module:callable`, which is given two lists of texts, prompts and
    responses, and returns a list of numbers; it may be asynchronous."""
    url: Annotated[str, Field(pattern=r"^https?://[^\s/]")] | None = None
    """Address of a reward server, which answers a POST of {"query": […], "prompts": […],
    "responses": […], "messages": […]} with {"rewards": […]}, as OpenRLHF's do."""
    batch_size: Count = 64
    """Responses in one request to the server; each process asks for its own."""
    timeout: Positive = 180.0
    """Seconds that the server may be silent before an attempt counts as failed."""
    retries: Annotated[int, Field(ge=0)] = 5
    """Further attempts if the server cannot be reached, is silent, or has an error (HTTP 5xx)."""

    def faults(self) -> list[str]:
        sources = (self.model_name_or_path, self.models, self.mixture, self.function, self.url)
        if sum(map(bool, sources)) != 1:
            return ["give exactly one of model_name_or_path, models, mixture, function, url"]
        found = super().faults()
        if self.labels and not self.model_name_or_path:
            found.append(
                "labels: only beside model_name_or_path; each of models and mixture has its own"
            )
        if not self.url:
            defaults = type(self).model_fields
            found += [
                f"{name}: only a reward server (url) has it"
                for name in ("batch_size", "timeout", "retries")
                if getattr(self, name) != defaults[name].default
            ]
        shares = [group.share for group in self.mixture]
        if len(shares) == 1:
            found.append("mixture: one group is no mixture; use model_name_or_path")
        elif shares and not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
            found.append(f"mixture: the shares add up to {sum(shares):g}; 1 is needed")
        if self.model_name_or_path:
            found += model_path_faults("model_name_or_path", self.model_name_or_path)
        return found

    @property
    def weighted_models(self) -> list[RewardModelSettings]:
        """The reward models with their weights or, in a mixture, shares."""
        if self.model_name_or_path:
            return [
                RewardModelSettings(model_name_or_path=self.model_name_or_path, labels=self.labels)
            ]
        groups = [
            RewardModelSettings(
                model_name_or_path=group.model_name_or_path,
                weight=group.share,
                labels=group.labels,
            )
            for group in self.mixture
        ]
        return groups or list(self.models)

    @property
    def shares(self) -> tuple[float, ...]:
        """The groups' shares of the population; () without a mixture."""
        return tuple(group.share for group in self.mixture)

    def mixture_faults(self, regularizer: Regularizer | None) -> list[str]:
        """What speaks against a mixture under this regularizer."""
        if not self.mixture or regularizer is None:
            return []
        if regularizer.response_classes is not None:
            return ["reward.mixture: not together with classes of responses"]
        if regularizer.is_log_linear and regularizer.effective_reward_name == "rewards":
            return []
        return [
            f"reward.mixture: {regularizer.name} cannot have the mixture of its groups' optima as "
            "its optimum, because this is not proportional to w·e^(r/β); pm, conditional_pm and kl "
            "are among those that can"
        ]


class SamplingSettings(StrictModel):
    """How responses are drawn. PPO's mathematics holds for temperature 1, top_p 1 and top_k 0."""

    response_length: Count = 256
    """Tokens after which a response is cut. In training it moves the optimum, which is over cut
    responses too."""
    temperature: Positive = 1.0
    """Divisor of the logits when drawing. In training, any value but 1 moves the optimum."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Draw from the likeliest tokens that hold this much probability. In training, a value below 1
    moves the optimum."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw from this many of the likeliest tokens; 0 draws from all. In training, a value above 0
    moves the optimum."""
    rollout_batch_size: Count = 64
    """Prompts to which one process draws responses at the same time."""

    def warnings(self) -> list[str]:
        """Why the sampled policy would not be the scored policy."""
        off = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        return [
            f"{name}={getattr(self, name)}: responses are drawn from another distribution than the "
            f"one that is scored and trained, which moves the optimum; {name}={value} does not"
            for name, value in off.items()
            if getattr(self, name) != value
        ]


class EvaluationSettings(StrictModel):
    """What is measured after training, and by `scripts/evaluate.sh`."""

    response_sets: PathText | None = None
    """JSONL file of prompts with all their natural responses, for the exact metrics; null measures
    none."""
    max_prompts: Count | None = None
    """Number of held-out prompts, of held-out texts and of response sets that are used, chosen at
    random; null uses all."""
    pairs_per_prompt: Count = 1
    """Pairs of responses to each prompt for its PM divergence; the paper draws one."""
    sampling: SamplingSettings | None = None
    """How the evaluation after training draws responses; null draws as training does.
    `scripts/evaluate.sh` takes its own response_length, temperature and so on instead."""

    def faults(self) -> list[str]:
        found = super().faults()
        if self.response_sets and not Path(self.response_sets).is_file():
            found.append(f"response_sets: {self.response_sets} does not exist")
        return found


def frozen_faults(section: dict[str, Any]) -> list[str]:
    """Faults of `frozen_deepspeed`: a frozen model is whole, or divided by ZeRO stage 3."""
    found = [f"frozen_deepspeed.{fault}" for fault in deepspeed_faults(section)]
    zero = section.get("zero_optimization", {})
    if not found and section and zero.get("stage") != 3:
        found.append(
            "frozen_deepspeed: only zero_optimization.stage 3 divides a frozen model; {} is whole"
        )
    return found


class AlignmentConfig(SamplingSettings, RunConfig):
    """What training and evaluating an aligned policy have in common."""

    reference_model_name_or_path: PathText | None = None
    """π_ref; null is the policy named by model_name_or_path."""
    reward: RewardSettings | None = None
    """Where the rewards r(x, y) come from; null measures what needs none."""
    data: DataSettings = Field(examples=[{"sources": ["owner/dataset"]}])
    """Prompts to draw responses to, and held-out texts."""
    frozen_deepspeed: dict[str, Any] = Field(default_factory=dict)
    """DeepSpeed section of the models that are not trained (reference, reward): {} keeps a whole
    copy on each process, ZeRO stage 3 divides them over the processes."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """What is measured on held-out prompts."""
    beta_calibration: BetaCalibration | None = None
    """Where the regularizer's beta came from, if it was "calibrated"; the run writes this itself.
    """

    @model_validator(mode="wrap")
    @classmethod
    def _with_calibrated_beta(cls, data: Any, handler: Any) -> Any:
        data, fault = cls._calibrated(data)
        if not fault:
            return handler(data)
        error = {"error": ValueError(fault)}
        found = [InitErrorDetails(type="value_error", loc=BETA, input="calibrated", ctx=error)]
        try:
            handler(data)
        except ValidationError as others:
            found += [cls._explained(detail) for detail in others.errors()]
        raise ValidationError.from_exception_data(cls.__name__, found)

    @classmethod
    def _calibrated(cls, data: Any) -> tuple[Any, str]:
        """The settings with a number in place of a calibrated β, and why there is none."""
        return with_calibrated_beta(data)

    @property
    def group_shares(self) -> tuple[float, ...]:
        """The shares of the groups whose mixture gives the rewards; () without a mixture."""
        return self.reward.shares if self.reward else ()

    @property
    def sampling(self) -> SamplingSettings:
        return SamplingSettings(
            **{name: getattr(self, name) for name in SamplingSettings.model_fields}
        )

    def faults(self) -> list[str]:
        found = super().faults()
        found += frozen_faults(self.frozen_deepspeed)
        if self.reference_model_name_or_path:
            found += model_path_faults(
                "reference_model_name_or_path", self.reference_model_name_or_path
            )
        return found


class EarlyStoppingSettings(StrictModel):
    """Ends training once the policy has arrived at its optimum."""

    optimum_gap: Positive
    """Largest `optimum/gap`, in units of reward, that counts as arrived."""
    patience: Count = 5
    """Iterations in a row whose gap has to be that small."""


class PPOConfig(StageConfig, AlignmentConfig):
    """Aligns the policy with the reward model under a regularizer."""

    script = "step3_rlhf"
    variants: ClassVar[Variants] = {"regularizer": REGULARIZERS}

    reward: RewardSettings = Field(examples=[{"function": "module:callable"}])
    """Where the rewards r(x, y) come from."""
    critic_model_name_or_path: PathText | None = None
    """What the critic starts from. Null is the first reward model; or the policy, if there is none
    or if it has another vocabulary or no value after each token."""
    regularizer: RegularizerField = Field(examples=[{"name": "pm"}])
    """The regularizer by its name and parameters, or by {"class": "module:Class"}. Its beta may be
    "calibrated": the temperature that `scripts/calibrate.sh` found for the reward model."""
    actor: OptimizerSettings = Field(examples=[{"learning_rate": 1e-6}])
    """The actor's optimizer."""
    critic: OptimizerSettings | None = Field(default=None, examples=[{"learning_rate": 1e-6}])
    """The critic's optimizer; "gae" needs it, "rloo" has no critic."""
    advantage_estimator: Literal["gae", "rloo"] = "gae"
    """Where a token's advantage comes from. "gae" trains a critic (PPO). "rloo" has none: the other
    responses to the same prompt are the baseline, so num_generations must be 2 or more."""

    num_train_epochs: Positive = 1.0
    """Passes over the prompts."""
    total_episodes: Count | None = None
    """Responses in the whole run, a multiple of those in one iteration, in place of
    num_train_epochs; null uses that."""
    num_generations: Count = 1
    """Responses to each prompt of an iteration; it divides per_device_train_batch_size. From 2 on,
    `optimum/gap` says how far the policy is from its optimum."""
    early_stopping: EarlyStoppingSettings | None = None
    """Ends the run when it has arrived; null runs to its end. It needs num_generations of 2."""
    num_ppo_epochs: Count = 1
    """Passes over each rollout."""
    num_mini_batches: Count = 1
    """Optimizer steps into which each pass over a rollout is divided."""
    cliprange: Positive = 0.2
    """PPO's ε: how far the ratio of new to old probabilities may move from 1 before it is
    clipped."""
    cliprange_value: Positive = 0.2
    """How far a new value may move from the old one before it is clipped, in units of reward."""
    vf_coef: Positive = 0.5
    """Factor of the value loss."""
    gamma: Fraction = 1.0
    """Discount per token. Only at 1 do the tokens' penalties add up to the response's."""
    lam: Fraction = 0.95
    """λ of generalized advantage estimation: 0 trusts the critic, 1 the drawn rewards."""
    advantage_normalization: Literal["none", "center", "full"] = "none"
    """Subtract the batch's mean from the advantages ("center"), and divide by their deviation
    ("full", which blows up noise near the optimum)."""

    ptx_coef: NonNegative = 0.0
    """Weight of the mean log-probability of a token of ptx_data in the actor's objective. A value
    above 0 moves the optimum towards those texts."""
    ptx_data: DataSettings | None = Field(default=None, examples=[{"sources": ["owner/dataset"]}])
    """Texts as in stage 1 that are learned beside the rewards; one text to each response."""
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Share that the moving average of the actor's weights keeps at each optimizer step, as in
    0.992. The average is exported as actor_ema/; null keeps none."""

    reward_centering: Literal["none", "reference_mean", "prompt_mean"] = "none"
    """Whether to subtract the mean reward of the reference policy (Example 2): one number, C_1,
    with "reference_mean"; one for each prompt, C_{1,x}, with "prompt_mean". The optimum stays."""
    reward_centering_samples: Count = 256
    """Responses of the reference from which "reference_mean" is estimated, before the first
    iteration."""
    reward_centering_draws: Count = 4
    """Responses of the reference to each prompt from which "prompt_mean" is estimated, in every
    iteration."""
    reward_clip: Positive | None = None
    """Bound on the absolute reward; null is none. It moves the optimum wherever it takes effect."""
    missing_eos_penalty: NonNegative | None = None
    """Reward that is taken from a response without EOS; null is none. It moves the optimum."""
    eval_steps: Annotated[int, Field(ge=0)] = 0
    """Iterations between evaluations; 0 evaluates at the end only."""

    @property
    def has_critic(self) -> bool:
        return self.advantage_estimator == "gae"

    @property
    def algorithm(self) -> str:
        """The name of the algorithm, for people to read."""
        return "PPO" if self.has_critic else "RLOO"

    def local_rollout_size(self) -> int:
        """Responses that one process draws in one iteration."""
        return (
            self.per_device_train_batch_size
            * self.gradient_accumulation_steps
            * self.num_mini_batches
        )

    @property
    def uses_rollout_once(self) -> bool:
        """Whether one forward pass can both score and train."""
        whole_batch = self.gradient_accumulation_steps == 1
        return (
            self.num_ppo_epochs == 1
            and self.num_mini_batches == 1
            and (self.advantage_normalization == "none" or whole_batch)
        )

    def faults(self) -> list[str]:
        found = super().faults()
        if self.critic_model_name_or_path:
            found += model_path_faults("critic_model_name_or_path", self.critic_model_name_or_path)
        if self.has_critic and self.critic is None:
            found.append(
                'critic: missing; {"learning_rate": …} trains a critic, and '
                'advantage_estimator="rloo" needs none'
            )
        if not self.has_critic:
            found += self._rloo_faults()
        if (self.ptx_coef > 0) != (self.ptx_data is not None):
            found.append("ptx_coef: above 0 it needs ptx_data, and ptx_data needs it")
        zero = self.deepspeed.get("zero_optimization")
        offload = zero.get("offload_param") if isinstance(zero, dict) else None
        to_disk = isinstance(offload, dict) and offload.get("device") == "nvme"
        if self.ema_decay is not None and to_disk:
            found.append("ema_decay: weights that are offloaded to NVMe cannot be averaged")
        if self.lora is not None and self.lora.lora_dropout > 0:
            found.append(
                "lora.lora_dropout: PPO scores what it trains, and dropout would score another "
                "policy; 0 is the value here"
            )
        if self.eval_steps and self.data.validation_share == 0:
            found.append("eval_steps: needs validation data, a data.validation_share above 0")
        if self.per_device_train_batch_size % self.num_generations:
            found.append(
                f"num_generations: {self.num_generations} does not divide "
                f"per_device_train_batch_size, {self.per_device_train_batch_size}"
            )
        found += self.reward.mixture_faults(self.regularizer)
        if self.reward.mixture and self.num_generations < 2:
            found.append(
                "num_generations: a mixture needs 2 or more, because the level of each group's "
                "rewards on a prompt is estimated from the other responses to it"
            )
        if self.reward.mixture and self.reward_centering != "none":
            found.append("reward_centering: not with a mixture, whose reward has no fixed level")
        if self.early_stopping and self.num_generations < 2:
            found.append("early_stopping: the gap is only known with num_generations of 2 or more")
        if self.early_stopping and not self.regularizer.levels_credit:
            found.append(f"early_stopping: {self.regularizer.name} has no gap, {NO_CERTIFICATE}")
        rollout = self.local_rollout_size()
        if rollout % self.rollout_batch_size and self.rollout_batch_size < rollout:
            found.append(
                f"rollout_batch_size: {self.rollout_batch_size} does not divide the {rollout} "
                "responses of an iteration (per_device_train_batch_size x "
                "gradient_accumulation_steps x num_mini_batches)"
            )
        return found

    def _rloo_faults(self) -> list[str]:
        """What contradicts advantage_estimator="rloo"."""
        found = []
        if self.num_generations < 2:
            found.append(
                "num_generations: rloo compares the responses to a prompt with one another, so 2 "
                "or more are needed"
            )
        if self.advantage_normalization != "none":
            found.append(
                f"advantage_normalization: {self.advantage_normalization} does not go with rloo, "
                "whose baseline is the other responses; at the optimum all advantages are 0, so "
                "that a division by their standard deviation would be 0/0"
            )
        if self.gamma != 1.0:
            found.append(
                "gamma: rloo gives every token the credit of the whole response, so it is 1"
            )
        return found

    def warnings(self) -> list[str]:
        found = super().warnings()
        if not self.has_critic:
            of_critic = ["critic", "critic_model_name_or_path", "cliprange_value", "vf_coef", "lam"]
            defaults = type(self).model_fields
            unused = [name for name in of_critic if getattr(self, name) != defaults[name].default]
            if unused:
                found.append(f"{', '.join(unused)}: without effect, because rloo has no critic")
        if not self.has_critic and self.reward_centering == "prompt_mean":
            found.append(
                "reward_centering=prompt_mean: draws responses for nothing, because the baseline "
                "of rloo takes every prompt's level out of its rewards already"
            )
        if self.gamma != 1.0:
            found.append(f"gamma={self.gamma}: token penalties no longer add up to the sequence's")
        if self.reward_clip is not None:
            found.append(f"reward_clip={self.reward_clip}: moves the optimum wherever it binds")
        if self.ptx_coef > 0:
            found.append(
                f"ptx_coef={self.ptx_coef}: moves the optimum towards the texts of ptx_data"
            )
        if self.missing_eos_penalty:
            found.append("missing_eos_penalty: responses that were cut get another reward")
        if self.advantage_normalization == "full":
            found.append("advantage_normalization=full: blows up noise near the optimum")
        if self.reward.mixture and self.num_generations < 4:
            found.append(
                f"num_generations={self.num_generations}: until prompts have been visited several "
                "times, a mixture is far from exact; 8 is better"
            )
        if self.reward.mixture and self.early_stopping:
            found.append(
                "early_stopping: of few draws, optimum/gap of a mixture stays above 0 at the "
                "optimum, because the level of each group's rewards is estimated"
            )
        if self.num_generations > 1 and not self.regularizer.levels_credit:
            found.append(f"num_generations: no optimum/gap is logged, {NO_CERTIFICATE}")
        if self.evaluation.sampling is not None:
            own = self.evaluation.sampling.warnings()
            found += [f"evaluation.sampling.{warning}" for warning in own]
        return found


class EvaluationConfig(AlignmentConfig):
    """What `scripts/evaluate.sh` needs to know; the config.json of a stage-3 run has all of it."""

    variants: ClassVar[Variants] = {"regularizer": REGULARIZERS}

    regularizer: RegularizerField | None = None
    """The regularizer whose optimum the policy is compared with on finite sets; null: with none."""

    def faults(self) -> list[str]:
        against = self.reward.mixture_faults(self.regularizer) if self.reward else []
        return super().faults() + against

    @classmethod
    def of(cls, config: AlignmentConfig) -> "EvaluationConfig":
        """The evaluation of a training run."""
        shared = {name: getattr(config, name) for name in cls.model_fields}
        if config.evaluation.sampling is not None:
            shared |= dict(config.evaluation.sampling)
        return cls(**shared)


if __name__ == "__main__":  # what scripts/launch.sh starts
    from training.cli import command

    command(PPOConfig, "step3_rlhf.main")
