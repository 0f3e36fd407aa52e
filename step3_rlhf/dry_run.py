"""Estimates what a stage-3 config would do and need, for `--dry-run`."""

from functools import partial
from typing import Any

from step3_rlhf.checks import check_models, readable_records
from step3_rlhf.config import EvaluationConfig, PPOConfig, SamplingSettings
from step3_rlhf.prompts import iterations
from step3_rlhf.roles import TrainingRoles, training_roles_of
from training.data import read_records, tokenize
from training.dry_run import DryRun
from training.errors import UserError
from training.memory import Shape, activations, drawing, forward, key_value_cache, logits
from training.models.options import precision


def dry_run(config: PPOConfig, run: DryRun) -> None:
    """Fill in the models of a run and the memory of its phases, which follow one another."""
    roles = training_roles_of(config)
    check_models(config, roles, run.stand_in)
    actor = run.policy_shape(roles.policy, lora=True)
    trained = [actor]
    run.add_trained("actor", actor)
    if roles.critic is not None:
        trained.append(run.scalar_shape(roles.critic, lora=True))
        run.add_trained("critic", trained[-1])
    if config.ema_decay is not None:
        run.add_average("actor_ema", actor)
    reference = actor
    if not roles.reference_is_adapted:
        reference = run.policy_shape(roles.reference)
        run.add_frozen("reference", reference, config.frozen_deepspeed)
    scoring = [reference]
    for number, (_, reward) in enumerate(roles.rewards, start=1):
        scoring.append(run.reward_shape(reward))
        name = "reward" if len(roles.rewards) == 1 else f"reward {number}"
        run.add_frozen(name, scoring[-1], config.frozen_deepspeed)

    _count_iterations(config, run, roles)
    if config.ptx_data is not None:
        texts = tokenize(
            read_records(config.ptx_data, "sft"), roles.policy.tokenizer, config.ptx_data, "sft"
        )
        run.facts["ptx_data"] = f"{len(texts.train)} texts, one to each response"
    run.notes += [f"Warning: {warning}" for warning in config.warnings()]
    run.notes += [roles.critic_note] if roles.critic_note else []
    actor_divided = _partitioned(config.deepspeed)
    reference_divided = _partitioned(
        config.deepspeed if roles.reference_is_adapted else config.frozen_deepspeed
    )
    settings, evaluation = config.sampling, EvaluationConfig.of(config).sampling
    local = config.local_rollout_size()
    phases = run.phases
    if config.reward_centering == "reference_mean":
        phases["centering rewards"] = _drawing(
            config, reference, settings, config.reward_centering_samples, reference_divided
        )
    if config.reward_centering == "prompt_mean":
        draws = local // config.num_generations * config.reward_centering_draws
        phases["centering rewards"] = _drawing(
            config, reference, settings, draws, reference_divided
        )
        run.facts["responses for centering"] = f"{draws * run.processes:,} in each iteration"
    phases["drawing responses"] = _drawing(config, actor, settings, local, actor_divided)
    phases["scoring"] = _scoring(config, scoring)
    phases["training"] = _training(config, trained)
    phases["evaluating"] = _drawing(
        config, actor, evaluation, evaluation.rollout_batch_size, actor_divided
    )


def _drawing(
    config: PPOConfig, shape: Shape, settings: SamplingSettings, responses: int, divided: bool
) -> dict[str, int]:
    """Bytes that a policy needs to draw `responses`; ZeRO-3 gathers a divided policy whole."""
    dtype = precision(config)
    length = config.data.max_prompt_length + settings.response_length
    drawn = min(settings.rollout_batch_size, responses)
    parts = {
        "key-value cache": key_value_cache(shape, drawn, length, dtype),
        "sampler": drawing(shape, drawn),
    }
    return parts | ({"gathered weights": dtype.itemsize * shape.parameters} if divided else {})


def _scoring(config: PPOConfig, shapes: list[Shape]) -> dict[str, int]:
    """Bytes of forward passes without gradients, one frozen model after the other."""
    rows = config.per_device_eval_batch_size
    length = config.data.max_prompt_length + config.response_length
    return {
        "a layer": max(forward(shape, rows * length, precision(config)) for shape in shapes),
        "logits": logits(shapes[0], rows * config.response_length, precision(config), False),
    }


def _training(config: PPOConfig, trained: list[Shape]) -> dict[str, int]:
    """Bytes that a micro-batch keeps for the backward passes of the trained models."""
    rows = config.per_device_train_batch_size
    tokens = rows * (config.data.max_prompt_length + config.response_length)
    kept = [
        activations(shape, tokens, precision(config), config.gradient_checkpointing)
        for shape in trained
    ]
    parts = dict(zip(("actor's activations", "critic's"), kept, strict=False))
    if config.ptx_data is not None:
        shape, texts = trained[0], rows * config.ptx_data.longest
        parts["activations of ptx_data"] = activations(
            shape, texts, precision(config), config.gradient_checkpointing
        )
    return parts | {
        "logits": logits(
            trained[0],
            rows * config.response_length,
            precision(config),
            kept=not config.gradient_checkpointing,
        ),
    }


def _partitioned(section: dict[str, Any]) -> bool:
    """Whether a DeepSpeed section divides weights over the processes (ZeRO stage 3)."""
    zero = section.get("zero_optimization")
    return isinstance(zero, dict) and zero.get("stage") == 3


def _count_iterations(config: PPOConfig, run: DryRun, roles: TrainingRoles) -> None:
    """Add the number of responses, tokens, iterations and optimizer steps to the facts."""
    readable = partial(readable_records, config, roles)
    prompts = run.examples(config.data, "ppo", roles.policy.tokenizer, readable)
    drawn = config.local_rollout_size() * run.processes
    count = None
    if prompts is not None or config.total_episodes is not None:
        try:
            count = iterations(config, prompts or 0, run.processes)
        except ValueError as error:
            raise UserError(str(error)) from error
    steps = config.num_ppo_epochs * config.num_mini_batches
    trained = ["actor", "critic"] if config.has_critic else ["actor"]
    length = config.data.max_prompt_length + config.response_length
    run.facts |= {
        "responses drawn": f"{drawn:,} in each iteration",
        "tokens per iteration": f"{drawn * length:,} at most, prompts included",
        "iterations": f"{count:,}" if count else f"prompts / {drawn:,} x num_train_epochs",
        "optimizer steps": f"{steps} of {' and '.join(trained)} in each iteration",
    }
