"""Stage 3: align the policy with the reward model by PPO under a regularizer.

    bash scripts/step3_rlhf.sh CONFIG.json [key.path=value ...]

Writes `actor/` and `critic/` (Hugging Face directories, tokenizer included), `evaluation.json`,
`instances.jsonl`, `metrics.jsonl` and `config.json`.
"""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from step3_rlhf.checks import check_models
from step3_rlhf.config import EvaluationConfig, PPOConfig
from step3_rlhf.dry_run import plan
from step3_rlhf.evaluation.held_out import HeldOut, load_held_out
from step3_rlhf.evaluation.measure import evaluate, summary, write_evaluation
from step3_rlhf.evaluation.resume import Blocks, identity
from step3_rlhf.evaluation.scoring import Models
from step3_rlhf.evaluation.settings import settings_of_run
from step3_rlhf.prompts import Prompts, iterations
from step3_rlhf.rewards.sources import load_reward
from step3_rlhf.roles import critic_source, reference_source
from step3_rlhf.trainer import PPOTrainer
from training.cli import prepare_output, run_stage
from training.data import read_records, tokenize
from training.errors import UserError
from training.fitting import require_evaluation
from training.models.export import export
from training.models.loading import load_policy, load_scalar_model
from training.models.lora import WithoutAdapter
from training.models.tokenizers import load_tokenizer
from training.runtime import engine, ranks
from training.runtime.checkpoint import Checkpoints, check_resumable
from training.runtime.signals import Stopped, requests
from training.runtime.tracking import Tracker, say

SHOWN = ("objective/rlhf_reward", "objective/kl", "policy/entropy_per_token", "response/length")


def main(config: PPOConfig) -> None:
    check_resumable(config)
    records = read_records(config.data, "ppo")
    require_evaluation(records)
    tokenizer = load_tokenizer(config.model_name_or_path, config.trust_remote_code)
    check_models(config, tokenizer)
    with ranks.rank_zero_first():
        data = tokenize(records, tokenizer, config.data, "ppo")
    try:
        count = iterations(config, len(data.train))
    except ValueError as error:
        raise UserError(str(error)) from error

    say(f"{records.report}\n{data.report}")
    for warning in config.warnings():
        say(f"Warning: {warning}")
    evaluation = EvaluationConfig.of(config)
    held_out = load_held_out(evaluation, data.eval, tokenizer)
    trainer = build(config, Prompts(data.train, config), tokenizer, count)
    output = prepare_output(config)
    with requests.deferred():
        went_on_from = train(trainer, count, held_out, evaluation)
        write_models(trainer, output, trained_to_the_end_before=went_on_from == count)
    say(f"Evaluating; where that is stopped, `bash scripts/evaluate.sh {output}` goes on")
    blocks = Blocks(output, identity(settings_of_run(str(output)), held_out))
    report, instances = evaluate(models(trainer), held_out, config.regularizer, evaluation, blocks)
    write_evaluation(report, instances, output)
    blocks.remove()
    say(
        f"PPO with {config.regularizer.name} is done after {count} iterations\n{summary(report)}\n"
        f"  actor:      {output / 'actor'}\n  critic:     {output / 'critic'}\n"
        f"  evaluation: {output / 'evaluation.json'}\n  metrics:    {output / 'metrics.jsonl'}"
    )


def build(
    config: PPOConfig, prompts: Prompts, tokenizer: PreTrainedTokenizerBase, count: int
) -> PPOTrainer:
    """The four models in their engines."""
    dtype = engine.precision(config)
    options = {"trust_remote_code": config.trust_remote_code, "packing": config.packing}
    trained = options | {
        "gradient_checkpointing": config.gradient_checkpointing,
        "lora": config.lora,
    }
    steps = count * config.num_ppo_epochs * config.num_mini_batches

    actor = load_policy(config.model_name_or_path, tokenizer, dtype, **trained)
    critic_path, why = critic_source(config, tokenizer)
    if why:
        say(why)
    critic = load_scalar_model(critic_path, tokenizer, dtype, new_head=True, **trained)
    trained_actor = engine.TrainedModule(actor, config, config.actor, steps)
    return PPOTrainer(
        config,
        trained_actor,
        engine.TrainedModule(critic, config, config.critic, steps),
        load_reference(config, trained_actor, tokenizer),
        load_reward(config.reward, tokenizer, config),
        prompts,
        tokenizer,
    )


def load_reference(
    config: PPOConfig, actor: engine.TrainedModule, tokenizer: PreTrainedTokenizerBase
) -> nn.Module | WithoutAdapter:
    """π_ref: a frozen model, or the actor without its adapter where it started as π_ref."""
    path = reference_source(config)
    if path is None:
        return WithoutAdapter(actor.engine)
    dtype = engine.precision(config)
    reference = load_policy(
        path,
        tokenizer,
        dtype,
        trust_remote_code=config.trust_remote_code,
        packing=config.packing,
    )
    return engine.frozen(reference, config.frozen_deepspeed, dtype)


def write_models(trainer: PPOTrainer, output: Path, trained_to_the_end_before: bool) -> None:
    """`actor/` and `critic/`; those of a run that was stopped after its training stay as they are,
    and so does what has been measured of them."""
    trained = {"actor": trainer.actor, "critic": trainer.critic}
    wanted = [
        name for name in trained if not (trained_to_the_end_before and (output / name).is_dir())
    ]
    ranks.barrier()  # all ranks have looked before the first writes
    for name in wanted:
        export(trained[name].module.model, trainer.tokenizer, output / name)


def train(trainer: PPOTrainer, count: int, held_out: HeldOut, evaluation: EvaluationConfig) -> int:
    """All iterations from the one at which a resumed run goes on, which is returned."""
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
    episodes = config.local_rollout_size() * ranks.world_size()
    for number in range(first, count):
        metrics = trainer.iteration(number) | {"episode": float((number + 1) * episodes)}
        done = number + 1
        if config.eval_steps and done % config.eval_steps == 0 and done < count:
            report, _ = evaluate(models(trainer), held_out, config.regularizer, evaluation)
            metrics |= flattened(report)
        if done % config.logging_steps == 0 or done == count:
            tracker.log(done, metrics, SHOWN)
        tracker.advance()
        stop = requests.agreed()
        if stop or checkpoints.is_due(done, count):
            checkpoints.save(done, {"reward_center": trainer.reward_center})
        if stop:
            tracker.close()
            raise Stopped(stop, done)
    tracker.close()
    return first


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
    run_stage(PPOConfig, main, plan=plan)
