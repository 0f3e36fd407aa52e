"""Stage 3: align the policy with the reward model by PPO under a regularizer.

    bash scripts/step3_rlhf.sh CONFIG.json [key.path=value ...]

Writes `actor/` and `critic/` (Hugging Face directories, tokenizer included), `evaluation.json`,
`instances.jsonl`, `metrics.jsonl` and `config.json`.
"""

from typing import Any

from torch import nn

from step3_rlhf.config import EvaluationConfig, PPOConfig
from step3_rlhf.evaluation import (
    HeldOut,
    Models,
    evaluate,
    load_held_out,
    summary,
    write_evaluation,
)
from step3_rlhf.prompts import Prompts, iterations
from step3_rlhf.response_sets import read_response_sets
from step3_rlhf.rewards import import_function, load_reward
from step3_rlhf.trainer import PPOTrainer
from training import engine
from training.checkpoint import Checkpoints, export
from training.cli import prepare_output, run_stage
from training.data import read_records, tokenize
from training.errors import UserError
from training.models import load_policy, load_scalar_model, load_tokenizer
from training.tracking import Tracker, say

SHOWN = ("objective/rlhf_reward", "objective/kl", "policy/entropy_per_token", "response/length")


def main(config: PPOConfig) -> None:
    records = read_records(config.data, "ppo")
    read_response_sets(config.evaluation.response_sets)
    if config.reward.function:
        import_function(config.reward.function)
    tokenizer = load_tokenizer(config.model_name_or_path, config.trust_remote_code)
    with engine.rank_zero_first():
        data = tokenize(records, tokenizer, config.data, "ppo")
    try:
        count = iterations(config, len(data.train))
    except ValueError as error:
        raise UserError(str(error)) from error

    output = prepare_output(config)
    for text in (
        str(records.report),
        str(data.report),
        *(f"Warning: {w}" for w in config.warnings()),
    ):
        say(text)
    evaluation = EvaluationConfig.of(config)
    held_out = load_held_out(evaluation, data.eval, tokenizer)
    trainer = build(config, Prompts(data.train, config), tokenizer, count)
    output = prepare_output(config)
    train(trainer, count, held_out, evaluation)

    report, instances = evaluate(models(trainer), held_out, config.regularizer, evaluation)
    write_evaluation(report, instances, output)
    export(trainer.actor.module.model, tokenizer, output / "actor")
    export(trainer.critic.module.model, tokenizer, output / "critic")
    say(
        f"PPO with {config.regularizer.name} is done after {count} iterations\n{summary(report)}\n"
        f"  actor:      {output / 'actor'}\n  critic:     {output / 'critic'}\n"
        f"  evaluation: {output / 'evaluation.json'}\n  metrics:    {output / 'metrics.jsonl'}"
    )


def build(config: PPOConfig, prompts: Prompts, tokenizer: Any, count: int) -> PPOTrainer:
    """The four models in their engines."""
    dtype = engine.precision(config)
    options = {"trust_remote_code": config.trust_remote_code}
    trained = options | {"gradient_checkpointing": config.gradient_checkpointing}
    steps = count * config.num_ppo_epochs * config.num_mini_batches

    actor = load_policy(config.model_name_or_path, tokenizer, dtype, **trained)
    critic = load_scalar_model(critic_source(config), tokenizer, dtype, new_head=True, **trained)
    reference_path = config.reference_model_name_or_path or config.model_name_or_path
    reference = load_policy(reference_path, tokenizer, dtype, **options)
    return PPOTrainer(
        config,
        engine.TrainedModule(actor, config, config.actor, steps),
        engine.TrainedModule(critic, config, config.critic, steps),
        engine.frozen(reference, config.frozen_deepspeed, dtype),
        load_reward(config.reward, tokenizer, config),
        prompts,
        tokenizer,
    )


def critic_source(config: PPOConfig) -> str:
    """The critic starts from the reward model where there is one, otherwise from the policy."""
    rewards = config.reward.weighted_models
    default = rewards[0].model_name_or_path if rewards else config.model_name_or_path
    return config.critic_model_name_or_path or default


def train(trainer: PPOTrainer, count: int, held_out: HeldOut, evaluation: EvaluationConfig) -> None:
    config = trainer.config
    checkpoints = Checkpoints(config, {"actor": trainer.actor, "critic": trainer.critic})
    first, state = checkpoints.restore()
    if state:
        trainer.reward_center = state["reward_center"]
    elif config.reward_centering == "reference_mean":
        trainer.center_rewards()
        say(f"Rewards are centered at {trainer.reward_center:.4f}, the reference policy's mean")
    name = f"PPO, {config.regularizer.name}"
    tracker = Tracker(config.output_dir, count, name, config.deepspeed, done=first)
    episodes = config.local_rollout_size() * engine.world_size()
    for number in range(first, count):
        metrics = trainer.iteration(number) | {"episode": float((number + 1) * episodes)}
        done = number + 1
        if config.eval_steps and done % config.eval_steps == 0 and done < count:
            report, _ = evaluate(models(trainer), held_out, config.regularizer, evaluation)
            metrics |= flattened(report)
        if done % config.logging_steps == 0 or done == count:
            tracker.log(done, metrics, SHOWN)
        tracker.advance()
        if config.save_steps and done % config.save_steps == 0:
            checkpoints.save(done, {"reward_center": trainer.reward_center})
    tracker.close()


def models(trainer: PPOTrainer) -> Models:
    actor: nn.Module = trainer.actor.engine
    actor.eval()
    return Models(actor, trainer.reference, trainer.reward, trainer.tokenizer)


def flattened(report: dict[str, Any]) -> dict[str, float]:
    """`eval/name` figures of an evaluation's means."""
    everything = {**report, **report.get("exact", {})}
    means = {name: value for name, value in everything.items() if isinstance(value, dict)}
    return {f"eval/{name}": value["mean"] for name, value in means.items() if "mean" in value}


if __name__ == "__main__":
    run_stage(PPOConfig, main)
