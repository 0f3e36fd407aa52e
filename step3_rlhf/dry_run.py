"""What a stage-3 config would do and need, for `--dry-run`."""

from pathlib import Path

from step3_rlhf.checks import check_models
from step3_rlhf.config import EvaluationConfig, PPOConfig, SamplingSettings
from step3_rlhf.prompts import iterations
from step3_rlhf.roles import critic_source, reference_source
from training.dry_run import Plan
from training.errors import UserError
from training.memory import Shape, activations, drawing, forward, key_value_cache, logits
from training.models.tokenizers import load_tokenizer
from training.runtime.engine import precision


def plan(config: PPOConfig, planned: Plan) -> None:
    """Four models, and the phases of a run, which take their memory one after the other."""
    tokenizer = load_tokenizer(config.model_name_or_path, config.trust_remote_code)
    check_models(config, tokenizer, planned.stand_in)
    actor = planned.shape(config.model_name_or_path, scalar=False, lora=True)
    critic_path, why = critic_source(config, tokenizer)
    critic = planned.shape(critic_path, scalar=True, lora=True)
    planned.add_trained("actor", actor)
    planned.add_trained("critic", critic)
    reference, reference_path = actor, reference_source(config)
    if reference_path is not None:
        reference = planned.shape(reference_path, scalar=False)
        planned.add_frozen("reference", reference, config.frozen_deepspeed)
    scoring = [reference]
    rewards = [member.model_name_or_path for member in config.reward.weighted_models]
    for path in rewards:
        scoring.append(planned.shape(path, scalar=True, frozen=True))
        name = "reward" if len(rewards) == 1 else f"reward {Path(path).name}"[:20]
        planned.add_frozen(name, scoring[-1], config.frozen_deepspeed)

    _plan_iterations(config, planned)
    planned.notes += [f"Warning: {warning}" for warning in config.warnings()]
    planned.notes += [why] if why else []
    divided = {
        "actor": _partitioned(config.deepspeed),
        "reference": _partitioned(
            config.deepspeed if reference_path is None else config.frozen_deepspeed
        ),
    }
    settings, evaluation = config.sampling, EvaluationConfig.of(config).sampling
    local = config.local_rollout_size()
    phases = planned.phases
    if config.reward_centering == "reference_mean":
        phases["centering rewards"] = _drawing(
            config, reference, settings, config.reward_centering_samples, divided["reference"]
        )
    phases["drawing responses"] = _drawing(config, actor, settings, local, divided["actor"])
    phases["scoring"] = _scoring(config, scoring)
    phases["training"] = _training(config, actor, critic)
    phases["evaluating"] = _drawing(
        config, actor, evaluation, evaluation.rollout_batch_size, divided["actor"]
    )


def _drawing(
    config: PPOConfig, shape: Shape, settings: SamplingSettings, responses: int, divided: bool
) -> dict[str, int]:
    """What a policy needs to draw `responses`; one that ZeRO-3 divides is gathered whole."""
    dtype = precision(config)
    length = config.data.max_prompt_length + settings.response_length
    drawn = min(settings.rollout_batch_size, responses)
    parts = {
        "key-value cache": key_value_cache(shape, drawn, length, dtype),
        "sampler": drawing(shape, drawn),
    }
    return parts | ({"gathered weights": dtype.itemsize * shape.parameters} if divided else {})


def _scoring(config: PPOConfig, shapes: list[Shape]) -> dict[str, int]:
    """Forward passes without gradients, one frozen model after the other."""
    rows = config.per_device_eval_batch_size
    length = config.data.max_prompt_length + config.response_length
    return {
        "a layer": max(forward(shape, rows * length, precision(config)) for shape in shapes),
        "logits": logits(shapes[0], rows * config.response_length),
    }


def _training(config: PPOConfig, actor: Shape, critic: Shape) -> dict[str, int]:
    rows = config.per_device_train_batch_size
    tokens = rows * (config.data.max_prompt_length + config.response_length)
    kept = [
        activations(shape, tokens, precision(config), config.gradient_checkpointing)
        for shape in (actor, critic)
    ]
    return {
        "actor's activations": kept[0],
        "critic's": kept[1],
        "logits": logits(actor, rows * config.response_length),
    }


def _partitioned(section: dict[str, object]) -> bool:
    zero = section.get("zero_optimization")
    return isinstance(zero, dict) and zero.get("stage") == 3


def _plan_iterations(config: PPOConfig, planned: Plan) -> None:
    prompts = planned.examples("ppo")
    drawn = config.local_rollout_size() * planned.processes
    count = None
    if prompts is not None or config.total_episodes is not None:
        try:
            count = iterations(config, prompts or 0, planned.processes)
        except ValueError as error:
            raise UserError(str(error)) from error
    steps = config.num_ppo_epochs * config.num_mini_batches
    length = config.data.max_prompt_length + config.response_length
    planned.facts |= {
        "responses drawn": f"{drawn:,} in each iteration",
        "tokens per iteration": f"{drawn * length:,} at most, prompts included",
        "iterations": f"{count:,}" if count else f"prompts / {drawn:,} x num_train_epochs",
        "optimizer steps": f"{steps} of actor and critic in each iteration",
    }
