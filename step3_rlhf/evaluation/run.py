"""One evaluation: reads its data, loads its models, measures, and writes the results."""

from dataclasses import replace
from pathlib import Path

from step3_rlhf.checks import check_models, readable_records
from step3_rlhf.classes.shares import class_shares
from step3_rlhf.config import EvaluationConfig
from step3_rlhf.evaluation.held_out import HeldOut, load_held_out
from step3_rlhf.evaluation.measure import evaluate, summary, write_evaluation
from step3_rlhf.evaluation.resume import FinishedBlocks, fingerprint
from step3_rlhf.evaluation.scoring import Models
from step3_rlhf.loading import load_frozen_policy
from step3_rlhf.rewards.sources import load_reward
from step3_rlhf.roles import Roles, roles_of
from training.cli import reserve
from training.data import read_records, tokenize
from training.fitting import require_evaluation
from training.runtime import ranks
from training.runtime.tracking import say


def run(config: EvaluationConfig) -> None:
    """Measure the policy and write `evaluation.json` and `instances.jsonl`."""
    for warning in config.sampling.warnings():
        say(f"Warning: {warning}")
    roles = roles_of(config)
    held_out = read_held_out(config, roles)
    output = Path(config.output_dir)
    reserve(output)
    finished = FinishedBlocks(output, fingerprint(config, held_out))
    figures, instances = evaluate(
        load_models(config, roles), held_out, config.regularizer, config, finished
    )
    write_evaluation(figures, instances, output)
    finished.remove()
    say(f"{summary(figures)}\n  written to: {output / 'evaluation.json'}")


def read_held_out(config: EvaluationConfig, roles: Roles) -> HeldOut:
    """The data of an evaluation, read and checked together with its models; loads no weights.

    Raises:
        UserError: the data or a model is at fault.
    """
    records = read_records(config.data, "ppo")
    require_evaluation(records)
    check_models(config, roles)
    records = readable_records(config, roles, replace(records, train=[]))
    tokenizer = roles.policy.tokenizer
    with ranks.rank_zero_first():
        data = tokenize(records, tokenizer, config.data, "ppo")
    say("\n".join([*records.tally.lines(), *data.tally.lines()]))
    return load_held_out(config, data.eval, tokenizer, "test")


def load_models(config: EvaluationConfig, roles: Roles) -> Models:
    """Load policy, reference and reward, all frozen; a reference that is the policy loads once."""
    policy = load_frozen_policy(roles.policy, roles.policy.tokenizer, config)
    reference = policy
    if roles.reference is not roles.policy:
        reference = load_frozen_policy(
            roles.reference, roles.policy.tokenizer, config, same_ends_as=policy
        )
    reward = load_reward(config, roles) if config.reward else None
    tokenizer = roles.policy.tokenizer
    classes = class_shares(config.regularizer, reference, tokenizer, config)
    return Models(policy, reference, reward, tokenizer, classes)
