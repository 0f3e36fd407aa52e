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
from typing import Any

from torch import nn

from step3_rlhf.blocks import Blocks, identity_of
from step3_rlhf.checks import check_models
from step3_rlhf.config import EvaluationConfig
from step3_rlhf.evaluation import Models, evaluate, summary, write_evaluation
from step3_rlhf.held_out import HeldOut, load_held_out
from step3_rlhf.rewards import load_reward, source_file
from training import engine, ranks
from training.cli import add_common_options, errors_end_cleanly, start
from training.config import apply_overrides, check_config, read_mapping
from training.data import read_records, tokenize
from training.fitting import require_evaluation
from training.loading import load_policy, load_tokenizer
from training.tracking import say


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


def identity(config: EvaluationConfig, held_out: HeldOut) -> dict[str, Any]:
    """All that the figures depend on, however its paths are spelt."""
    paths = [config.model_name_or_path, config.reference_model_name_or_path]
    paths += [member.model_name_or_path for member in config.reward.weighted_models]
    if config.reward.function:
        paths.append(source_file(config.reward.function))
    settings = config.model_dump(mode="json", exclude={"output_dir": True, "data": {"cache_dir"}})
    return {
        "config": resolved(settings),
        "models": [identity_of(resolved(path)) for path in paths if path],
        "held_out": held_out.digest,
        "processes": ranks.world_size(),
    }


def resolved(value: Any) -> Any:
    """JSON with every text that is a path of this machine spelt in one way."""
    if isinstance(value, dict):
        return {name: resolved(part) for name, part in value.items()}
    if isinstance(value, list):
        return [resolved(part) for part in value]
    if isinstance(value, str) and "/" in value and Path(value).exists():
        return str(Path(value).resolve())
    return value


def run_settings(run_dir: str) -> dict[str, Any]:
    """The evaluation's settings as far as RUN_DIR knows them."""
    directory = Path(run_dir)
    known: dict[str, Any] = {}
    saved: dict[str, Any] = {}
    if (directory / "config.json").is_file():
        saved = read_mapping(str(directory / "config.json"))
    if (directory / "actor").is_dir() and saved:
        known |= {name: saved[name] for name in EvaluationConfig.model_fields if name in saved}
        known |= (saved.get("evaluation") or {}).get("sampling") or {}
        known["reference_model_name_or_path"] = (
            saved.get("reference_model_name_or_path") or saved["model_name_or_path"]
        )
        known["model_name_or_path"] = str(directory / "actor")
    elif (directory / "model").is_dir():
        known["model_name_or_path"] = str(directory / "model")
    return known | {"output_dir": run_dir}


def settings_of_run(run_dir: str) -> EvaluationConfig:
    """What `scripts/evaluate.sh RUN_DIR` uses where it is told nothing else."""
    return check_config(EvaluationConfig, run_settings(run_dir), f"{run_dir} cannot be evaluated:")


def missing_models(settings: dict[str, Any]) -> list[str]:
    """What to pass where RUN_DIR is not a run of stage 3."""
    needed = {
        "model_name_or_path": "model_name_or_path=POLICY, a directory or a Hub name",
        "reward": "reward.model_name_or_path=REWARD_MODEL",
        "data": 'data.sources=["PATH_OR_NAME"]',
    }
    missing = [f"pass {remedy}" for name, remedy in needed.items() if name not in settings]
    if not missing:
        return []
    reason = "it is not what stage 3 wrote, so the command has to name the models"
    reference = "pass reference_model_name_or_path=REFERENCE, unless it is the policy"
    return [reason, *missing, reference]


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
