"""Measures a policy against a reference and a reward model, wherever they come from.

    bash scripts/evaluate.sh RUN_DIR [key.path=value ...]

RUN_DIR is the output directory of stage 3, whose config.json names the actor, reference, reward and
regularizer; or that of stage 1; or any other directory, which may not exist yet, if the overrides
name the models. Writes `evaluation.json` and `instances.jsonl` (one line per prompt) into RUN_DIR.
An evaluation that was stopped resumes where it was. One that is finished is replaced only with
--overwrite.
"""

import gc
from dataclasses import replace
from pathlib import Path

from step3_rlhf.checks import check_models, readable_records
from step3_rlhf.classes.shares import class_shares
from step3_rlhf.config import EvaluationConfig
from step3_rlhf.evaluation.held_out import load_held_out
from step3_rlhf.evaluation.measure import evaluate, summary, write_evaluation
from step3_rlhf.evaluation.resume import FinishedBlocks, fingerprint
from step3_rlhf.evaluation.scoring import Models
from step3_rlhf.evaluation.settings import evaluation_config, evaluation_parser
from step3_rlhf.loading import load_frozen_policy
from step3_rlhf.rewards.sources import load_reward
from step3_rlhf.roles import Roles, roles_of
from training.cli import errors_end_cleanly, reserve, start
from training.data import read_records, tokenize
from training.fitting import require_evaluation
from training.runtime import ranks
from training.runtime.tracking import say


def run(config: EvaluationConfig) -> None:
    """Measure the policy and write `evaluation.json` and `instances.jsonl`."""
    for warning in config.sampling.warnings():
        say(f"Warning: {warning}")
    records = read_records(config.data, "ppo")
    require_evaluation(records)
    roles = roles_of(config)
    check_models(config, roles)
    records = readable_records(config, roles, replace(records, train=[]))
    tokenizer = roles.policy.tokenizer
    with ranks.rank_zero_first():
        data = tokenize(records, tokenizer, config.data, "ppo")
    say("\n".join([*records.tally.lines(), *data.tally.lines()]))
    held_out = load_held_out(config, data.eval, tokenizer, "test")
    output = Path(config.output_dir)
    reserve(output)
    finished = FinishedBlocks(output, fingerprint(config, held_out))
    figures, instances = evaluate(
        load_models(config, roles), held_out, config.regularizer, config, finished
    )
    write_evaluation(figures, instances, output)
    finished.remove()
    say(f"{summary(figures)}\n  written to: {output / 'evaluation.json'}")


def load_models(config: EvaluationConfig, roles: Roles) -> Models:
    """Load policy, reference and reward, all frozen; a reference that is the policy loads once."""
    policy = load_frozen_policy(roles.policy, roles.policy.tokenizer, config)
    reference = policy
    if roles.reference is not roles.policy:
        reference = load_frozen_policy(
            roles.reference, roles.policy.tokenizer, config, same_ends_as=policy
        )
    tokenizer = roles.policy.tokenizer
    classes = class_shares(config.regularizer, reference, tokenizer, config)
    return Models(policy, reference, load_reward(config, roles), tokenizer, classes)


def main(arguments: list[str] | None = None) -> None:
    gc.enable()  # off while this was imported, see training/launch/process.py
    options = evaluation_parser().parse_intermixed_args(arguments)
    with errors_end_cleanly(options.debug):
        config = evaluation_config(options)
        start(lambda: run(config), config)


if __name__ == "__main__":
    main()
