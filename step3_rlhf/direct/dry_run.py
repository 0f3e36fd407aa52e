"""Estimates what direct optimization would do and need, for `--dry-run`."""

from step3_rlhf.checks import check_models
from step3_rlhf.config import EvaluationConfig
from step3_rlhf.direct.config import DirectConfig
from step3_rlhf.roles import roles_of
from training.dry_run import DryRun, sharding_of, supervised_steps
from training.memory import activations, drawing, forward, frozen_weights, key_value_cache, logits
from training.models.options import precision


def dry_run(config: DirectConfig, run: DryRun) -> None:
    """Fill in the trained model and the memory of the phases, for comparisons of two responses.

    The reference is in memory only before training, when it scores the responses, and after it, in
    the evaluation. The trained model's states are counted in all phases.
    """
    roles = roles_of(config)
    check_models(config, roles, run.stand_in)
    actor = run.policy_shape(roles.policy, lora=True)
    reference = run.policy_shape(roles.reference)
    run.add_trained("actor", actor)
    supervised_steps(config, run, "reward", 2, roles.policy.tokenizer)

    dtype, data = precision(config), config.data
    frozen = frozen_weights(reference, dtype, sharding_of(config.frozen_deepspeed, run.processes))
    evaluated = config.per_device_eval_batch_size
    run.phases["scoring with the reference"] = {
        "reference": frozen,
        "a layer": forward(reference, evaluated * data.longest, dtype),
        "logits": logits(reference, evaluated * data.max_response_length, dtype, kept=False),
    }
    sequences = 2 * config.per_device_train_batch_size
    kept = activations(actor, sequences * data.longest, dtype, config.gradient_checkpointing)
    run.phases["training"] = {
        "activations": kept,
        "logits": logits(
            actor,
            sequences * data.max_response_length,
            dtype,
            kept=not config.gradient_checkpointing,
        ),
    }
    sampling = EvaluationConfig.of(config).sampling
    length = data.max_prompt_length + sampling.response_length
    run.phases["evaluating"] = {
        "actor and reference": 2 * frozen,
        "key-value cache": key_value_cache(actor, sampling.rollout_batch_size, length, dtype),
        "sampler": drawing(actor, sampling.rollout_batch_size),
    }
