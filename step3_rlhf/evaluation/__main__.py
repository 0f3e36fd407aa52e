"""Measures a policy against a reference and a reward model, wherever they come from.

    bash scripts/evaluate.sh RUN_DIR [key.path=value ...]

RUN_DIR is what stage 3 wrote (its actor, reference, reward and regularizer are taken from its
config.json), or what stage 1 wrote, or any directory, new ones too, for which the overrides name
the models. Writes `evaluation.json` and, one line per prompt, `instances.jsonl` into RUN_DIR. One
that was stopped goes on where it was.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from torch import nn

from step3_rlhf.checks import check_models
from step3_rlhf.config import EvaluationConfig
from step3_rlhf.evaluation.held_out import load_held_out
from step3_rlhf.evaluation.measure import evaluate, summary, write_evaluation
from step3_rlhf.evaluation.resume import Blocks, identity
from step3_rlhf.evaluation.scoring import Models
from step3_rlhf.evaluation.settings import missing_models, run_settings
from step3_rlhf.rewards.sources import load_reward
from training.cli import add_common_options, errors_end_cleanly, start
from training.config import apply_overrides, check_config
from training.data import read_records, tokenize
from training.fitting import require_evaluation
from training.models.loading import load_policy
from training.models.tokenizers import load_tokenizer
from training.runtime import engine, ranks
from training.runtime.tracking import say


def run(config: EvaluationConfig) -> None:
    for warning in config.sampling.warnings():
        say(f"Warning: {warning}")
    records = read_records(config.data, "ppo")
    require_evaluation(records)
    tokenizer = load_tokenizer(config.model_name_or_path, config.trust_remote_code)
    check_models(config, tokenizer)
    with ranks.rank_zero_first():
        data = tokenize(replace(records, train=[]), tokenizer, config.data, "ppo")
    say("\n".join([*records.report.lines(), *data.report.lines()]))
    held_out = load_held_out(config, data.eval, tokenizer)
    dtype = engine.precision(config)

    def load(path: str) -> nn.Module:
        policy = load_policy(
            path,
            tokenizer,
            dtype,
            trust_remote_code=config.trust_remote_code,
            packing=config.packing,
        )
        return engine.frozen(policy, config.frozen_deepspeed, dtype)

    policy = load(config.model_name_or_path)
    reference_path = config.reference_model_name_or_path or config.model_name_or_path
    same = reference_path == config.model_name_or_path
    reference = policy if same else load(reference_path)
    models = Models(policy, reference, load_reward(config.reward, tokenizer, config), tokenizer)
    output = Path(config.output_dir)
    blocks = Blocks(output, identity(config, held_out))
    report, instances = evaluate(models, held_out, config.regularizer, config, blocks)
    write_evaluation(report, instances, output)
    blocks.remove()
    say(f"{summary(report)}\n  written to: {Path(config.output_dir) / 'evaluation.json'}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", help="what a stage wrote, and where the results go")
    parser.add_argument("overrides", nargs="*", help="key.path=value, over the run's own settings")
    add_common_options(parser)
    options = parser.parse_intermixed_args(arguments)
    with errors_end_cleanly(options.debug):
        settings = run_settings(options.run_dir)
        faults = apply_overrides(settings, options.overrides)
        heading = f"{options.run_dir} cannot be evaluated:"
        faults += missing_models(settings)
        config = check_config(EvaluationConfig, settings, heading, faults)
        start(lambda: run(config), config)


if __name__ == "__main__":
    main()
