"""What a stage-3 config would do and need, for `--dry-run`."""

from pathlib import Path

from step3_rlhf.checks import check_models
from step3_rlhf.config import EvaluationConfig, PPOConfig
from step3_rlhf.prompts import iterations
from training.dry_run import Plan
from training.engine import precision
from training.errors import UserError
from training.fitting import require_evaluation
from training.loading import load_tokenizer
from training.memory import activations, drawing, key_value_cache, logits


def plan(config: PPOConfig, planned: Plan) -> None:
    """Four models; drawing, scoring and training take their memory one after the other."""
    dtype, data = precision(config), config.data
    tokenizer = load_tokenizer(config.model_name_or_path, config.trust_remote_code)
    check_models(config, tokenizer, planned.stand_in)
    actor = planned.shape(config.model_name_or_path, scalar=False, lora=True)
    rewards = [member.model_name_or_path for member in config.reward.weighted_models]
    critic_path = config.critic_model_name_or_path or [*rewards, config.model_name_or_path][0]
    critic = planned.shape(critic_path, scalar=True, lora=True)
    planned.add_trained("actor", actor)
    planned.add_trained("critic", critic)
    reference_path = config.reference_model_name_or_path
    if config.lora is None or reference_path is not None:
        path = reference_path or config.model_name_or_path
        reference = planned.shape(path, scalar=False)
        planned.add_frozen("reference", reference, config.frozen_deepspeed)
    for path in rewards:
        reward = planned.shape(path, scalar=True)
        name = "reward" if len(rewards) == 1 else f"reward {Path(path).name}"[:20]
        planned.add_frozen(name, reward, config.frozen_deepspeed)

    _plan_iterations(config, planned)
    length = data.max_prompt_length + config.response_length
    drawn = min(config.rollout_batch_size, config.local_rollout_size())
    planned.phases["drawing responses"] = {
        "key-value cache": key_value_cache(actor, drawn, length, dtype),
        "sampler": drawing(actor, drawn),
    }
    if config.deepspeed.get("zero_optimization", {}).get("stage") == 3:
        whole = dtype.itemsize * actor.parameters
        planned.phases["drawing responses"]["gathered actor"] = whole
    rows = config.per_device_train_batch_size
    kept = [
        activations(shape, rows * length, dtype, config.gradient_checkpointing)
        for shape in (actor, critic)
    ]
    planned.phases["training"] = {
        "actor's activations": kept[0],
        "critic's": kept[1],
        "logits": logits(actor, rows * config.response_length),
    }


def _plan_iterations(config: PPOConfig, planned: Plan) -> None:
    records = planned.records(config.data, "ppo")
    if records is not None:
        require_evaluation(records)
    drawn = config.local_rollout_size() * planned.processes
    count = None
    if records is not None or config.total_episodes is not None:
        try:
            count = iterations(config, len(records.train) if records else 0, planned.processes)
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
    warnings = [*config.warnings(), *EvaluationConfig.of(config).sampling.warnings()]
    planned.facts |= {f"warning {n}": text for n, text in enumerate(warnings, start=1)}
