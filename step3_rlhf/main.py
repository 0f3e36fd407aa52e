"""Stage 3: align the policy with the reward model by PPO or RLOO under a regularizer.

    bash scripts/step3_rlhf.sh CONFIG.json [key.path=value ...]

Writes into output_dir: `actor/`, `critic/` (PPO only) and `actor_ema/` (with `ema_decay`), which
are Hugging Face directories, tokenizer included; `evaluation.json`, `instances.jsonl`,
`metrics.jsonl` and `config.json`.
"""

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from step3_rlhf.checks import check_answer_key, check_models, readable_records
from step3_rlhf.config import EvaluationConfig, PPOConfig
from step3_rlhf.dry_run import dry_run
from step3_rlhf.evaluation.card import policy_card
from step3_rlhf.evaluation.held_out import HeldOut, load_held_out
from step3_rlhf.evaluation.measure import evaluate, summary, write_evaluation
from step3_rlhf.evaluation.resume import FinishedBlocks, fingerprint
from step3_rlhf.evaluation.scoring import Models
from step3_rlhf.evaluation.settings import settings_of_run
from step3_rlhf.iteration_metrics import EarlyStopping
from step3_rlhf.loading import load_frozen_policy
from step3_rlhf.prompts import Prompts, iterations
from step3_rlhf.ptx import PtxTexts
from step3_rlhf.reference.cuts import cut_warning
from step3_rlhf.rewards.sources import load_reward
from step3_rlhf.roles import TrainingRoles, training_roles_of
from step3_rlhf.trainer import PPOTrainer
from training.cli import prepare_output, run_stage
from training.data import read_records, tokenize
from training.errors import Stopped, UserError
from training.fitting import announce_resume, require_evaluation
from training.models.export import InterimExports, export
from training.models.loading import load_policy, load_scalar_model
from training.models.lora import WithoutAdapter
from training.models.options import LoadOptions
from training.runtime import ranks
from training.runtime.checkpoint import Checkpoints
from training.runtime.engine import TrainedModule
from training.runtime.model_card import write_card
from training.runtime.signals import stop_requests
from training.runtime.tracking import Tracker, peak_memory, say

SHOWN = (
    "objective/rlhf_reward",
    "optimum/gap",
    "objective/kl",
    "policy/entropy_per_token",
    "response/length",
)
"""Metrics that are shown beside the progress bar."""


def main(config: PPOConfig) -> None:
    announce_resume(config)
    records = read_records(config.data, "ppo")
    require_evaluation(records)
    roles = training_roles_of(config)
    check_models(config, roles)
    records = readable_records(config, roles, records)
    check_answer_key(config, records)
    tokenizer = roles.policy.tokenizer
    with ranks.rank_zero_first():
        data = tokenize(records, tokenizer, config.data, "ppo")
    try:
        count = iterations(config, len(data.train))
    except ValueError as error:
        raise UserError(str(error)) from error

    say(f"{records.tally}\n{data.tally}")
    for warning in config.warnings():
        say(f"Warning: {warning}")
    evaluation = EvaluationConfig.of(config)
    held_out = load_held_out(evaluation, data.eval, tokenizer, "test")
    validation = None
    if config.eval_steps:
        validation = load_held_out(evaluation, data.eval, tokenizer, "validation")
    trainer = build(config, roles, Prompts(data.train, config), count, read_ptx(config, tokenizer))
    output = prepare_output(config)
    with stop_requests.deferred():
        first, done = train(trainer, count, validation, evaluation)
        write_models(trainer, output, was_trained=first == done)
    say(f"Evaluating; if this is stopped, `bash scripts/evaluate.sh {output}` resumes it")
    finished = FinishedBlocks(output, fingerprint(settings_of_run(str(output)), held_out))
    figures, instances = evaluate(
        models_of(trainer), held_out, config.regularizer, evaluation, finished
    )
    write_evaluation(figures, instances, output)
    write_card(output / "actor", policy_card(config, config.regularizer, config.algorithm, figures))
    finished.remove()
    written = {name: output / name for name in [*trainer.trained, *trainer.averages]}
    written |= {"evaluation": output / "evaluation.json", "metrics": output / "metrics.jsonl"}
    places = "\n".join(f"  {name + ':':<12}{path}" for name, path in written.items())
    say(
        f"{config.algorithm} with {config.regularizer.name} is done after {done} iterations\n"
        f"{summary(figures)}\n{places}"
    )


def read_ptx(config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> PtxTexts | None:
    """Read and encode the texts of `ptx_data`; None without them."""
    if config.ptx_data is None:
        return None
    records = read_records(config.ptx_data, "sft")
    with ranks.rank_zero_first():
        texts = tokenize(records, tokenizer, config.ptx_data, "sft")
    say(f"ptx_data: {records.tally}\n{texts.tally}")
    return PtxTexts(texts.train, config, tokenizer.pad_token_id)


def build(
    config: PPOConfig,
    roles: TrainingRoles,
    prompts: Prompts,
    count: int,
    ptx: PtxTexts | None = None,
) -> PPOTrainer:
    """Load the models into their engines, ready for `count` iterations; RLOO has no critic."""
    tokenizer = roles.policy.tokenizer
    options = LoadOptions.trained(config)
    steps = count * config.num_ppo_epochs * config.num_mini_batches
    actor = load_policy(roles.policy, tokenizer, options)
    trained_critic = None
    if roles.critic is not None and config.critic is not None:
        if roles.critic_note:
            say(roles.critic_note)
        critic = load_scalar_model(roles.critic, tokenizer, options, new_head=True)
        trained_critic = TrainedModule(critic, config, config.critic, steps)
    trained_actor = TrainedModule(actor, config, config.actor, steps)
    return PPOTrainer(
        config,
        trained_actor,
        trained_critic,
        load_reference(config, roles, trained_actor),
        load_reward(config, roles),
        prompts,
        tokenizer,
        ptx,
    )


def load_reference(
    config: PPOConfig, roles: TrainingRoles, actor: TrainedModule
) -> nn.Module | WithoutAdapter:
    """π_ref: a frozen model or, if only an adapter is trained, the actor without the adapter."""
    if roles.reference_is_adapted:
        return WithoutAdapter(actor.engine)
    return load_frozen_policy(
        roles.reference, roles.policy.tokenizer, config, same_ends_as=actor.module
    )


def train(
    trainer: PPOTrainer, count: int, validation: HeldOut | None, evaluation: EvaluationConfig
) -> tuple[int, int]:
    """Run all iterations that are not done yet, up to `count` or until the policy has arrived.

    Args:
        validation: what is measured every `eval_steps` iterations; None for nothing.

    Returns:
        The number of iterations that a resumed run found done, 0 in a new run; and that of all that
        are done now.
    """
    config = trainer.config
    checkpoints = Checkpoints(config, trainer.trained, trainer.averages)
    exports = interim_exports(trainer)
    first, state = checkpoints.restore()
    if state:
        trainer.reward_center, trainer.cuts = state["reward_center"], state["cuts"]
        if trainer.mixture:
            trainer.mixture.log_sums = state["mixture"]
    else:
        trainer.foresee_cuts()
        if warning := cut_warning(trainer.cuts, config.response_length):
            say(warning)
        if config.reward_centering == "reference_mean":
            trainer.center_rewards()
            say(f"Rewards are centered at {trainer.reward_center:.4f}, the reference policy's mean")
    early = EarlyStopping(config.early_stopping, state.get("iterations_within_gap", 0))
    name = f"{config.algorithm}, {config.regularizer.name}"
    tracker = Tracker(config.output_dir, count, name, config.deepspeed, done=first)
    episodes = config.local_rollout_size() * ranks.world_size()
    done = first
    while done < count and not early.has_arrived():
        with trainer.clock.phase("iteration"):
            metrics = trainer.iteration(done)
        done += 1
        metrics |= {"episode": float(done * episodes)} | trainer.clock.read() | peak_memory()
        if validation and config.eval_steps and done % config.eval_steps == 0 and done < count:
            figures, _ = evaluate(models_of(trainer), validation, config.regularizer, evaluation)
            metrics |= means_of(figures)
        early.observe(metrics)
        last = done if early.has_arrived() else count
        if done % config.logging_steps == 0 or done == last:
            tracker.log(done, metrics, SHOWN)
        tracker.advance()
        exports.after(done, last)
        stop = stop_requests.agreed()
        if stop or checkpoints.is_due(done, last):
            state = {
                "reward_center": trainer.reward_center,
                "cuts": trainer.cuts,
                "mixture": trainer.mixture.log_sums if trainer.mixture else {},
                "iterations_within_gap": early.iterations,
            }
            checkpoints.save(done, state)
        if stop:
            tracker.close()
            raise Stopped(stop, done)
    tracker.close()
    if early.has_arrived():
        say(f"The policy is at its optimum after {done} of {count} iterations (early_stopping)")
    return first, done


def write_models(trainer: PPOTrainer, output: Path, was_trained: bool) -> None:
    """Export the trained models, `actor/` and `critic/`, and the averaged `actor_ema/`.

    Args:
        was_trained: the run resumes after its last iteration. Models that it exported before are
            kept, so that the finished part of their evaluation stays valid.
    """
    trained, averages = trainer.trained, trainer.averages
    names = [*trained, *averages]
    wanted = [name for name in names if not (was_trained and (output / name).is_dir())]
    ranks.barrier()  # all ranks look before the first one writes
    for name in wanted:
        write_model(trainer, name, output / name)


def write_model(trainer: PPOTrainer, name: str, place: Path) -> None:
    """Export one of the trained models or averages."""
    if name in trainer.trained:
        export(trainer.trained[name].module.model, trainer.tokenizer, place)
    else:
        with trainer.averages[name].in_place():
            export(trainer.actor.module.model, trainer.tokenizer, place)


def interim_exports(trainer: PPOTrainer) -> InterimExports:
    """What `export_steps` writes: the policy and its average, which people use; not the critic."""
    config = trainer.config
    return InterimExports(
        config,
        {name: partial(write_model, trainer, name) for name in ["actor", *trainer.averages]},
        policy_card(config, config.regularizer, config.algorithm),
    )


def models_of(trainer: PPOTrainer) -> Models:
    """The trained policy and the models that it is compared with."""
    actor: nn.Module = trainer.actor.engine
    actor.eval()
    return Models(actor, trainer.reference, trainer.reward, trainer.tokenizer, trainer.classes)


def means_of(figures: dict[str, Any]) -> dict[str, float]:
    """The means of the figures that the validation data give, as metrics named `validation/...`."""
    everything = {**figures, **figures.get("exact", {})}
    estimates = {name: value for name, value in everything.items() if isinstance(value, dict)}
    return {f"validation/{k}": value["mean"] for k, value in estimates.items() if "mean" in value}


if __name__ == "__main__":
    run_stage(PPOConfig, main, dry_run=dry_run)
