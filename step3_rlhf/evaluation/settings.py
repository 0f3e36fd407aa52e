"""The settings of an evaluation, as far as the run directory determines them."""

import argparse
import sys
from pathlib import Path
from typing import Any

from step3_rlhf.config import EvaluationConfig
from training.cli import SettingsParser, add_common_options, errors_end_cleanly, launch_run
from training.config import apply_overrides, check_config, read_mapping
from training.errors import UserError

EXAMPLES = """examples:
  bash scripts/evaluate.sh runs/quickstart/kl evaluation.max_prompts=64 --overwrite
  bash scripts/evaluate.sh runs/any model_name_or_path=POLICY reward.model_name_or_path=REWARD \\
      'data.sources=["PATH"]'
Every setting below can be overridden as key.path=value."""


def evaluation_parser() -> SettingsParser:
    """The command line of scripts/evaluate.sh."""
    parser = SettingsParser(
        EvaluationConfig,
        usage="bash scripts/evaluate.sh RUN_DIR [key.path=value ...] [options]",
        description="Measure a policy against a reference and a reward model.",
        epilog=EXAMPLES,
    )
    parser.add_argument("run_dir", help="what a stage wrote, and where the results go")
    parser.add_argument("overrides", nargs="*", help="key.path=value, over the run's own settings")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the evaluation.json that is there"
    )
    add_common_options(parser)
    return parser


def evaluation_config(options: argparse.Namespace) -> EvaluationConfig:
    """The settings that a command line asks for.

    Raises:
        UserError: with every fault, or because the results of an earlier evaluation are in the way.
    """
    settings = run_settings(options.run_dir)
    faults = apply_overrides(settings, options.overrides)
    missing = missing_models(settings)
    if missing and not Path(options.run_dir).exists():
        raise UserError(f"{options.run_dir} does not exist")
    faults += missing
    heading = f"{options.run_dir} cannot be evaluated:"
    config = check_config(EvaluationConfig, settings, heading, faults)
    results = Path(config.output_dir, "evaluation.json")
    if results.exists() and not options.overwrite:
        raise UserError(
            f"{results} exists; pass --overwrite to replace it, or output_dir=DIRECTORY to write "
            "elsewhere"
        )
    return config


def run_settings(run_dir: str) -> dict[str, Any]:
    """The settings that RUN_DIR determines, as config data to which overrides are applied.

    In a stage-3 run all of them, with `actor/` as the policy; in a stage-1 run the policy `model/`;
    in any other directory only where the results go.
    """
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
        for name in ("chat_template", "chat_template_kwargs"):  # they are saved with the actor
            known.pop(name, None)
    elif (directory / "model").is_dir():
        known["model_name_or_path"] = str(directory / "model")
    return known | {"output_dir": run_dir}


def settings_of_run(run_dir: str) -> EvaluationConfig:
    """The settings of `scripts/evaluate.sh RUN_DIR` without overrides, checked."""
    return check_config(EvaluationConfig, run_settings(run_dir), f"{run_dir} cannot be evaluated:")


def missing_models(settings: dict[str, Any]) -> list[str]:
    """The overrides that are still needed if RUN_DIR is not a run of stage 3."""
    needed = {
        "model_name_or_path": "model_name_or_path=POLICY, a directory or a Hub name",
        "reward": "reward.model_name_or_path=REWARD_MODEL",
        "data": 'data.sources=["PATH_OR_NAME"]',
    }
    missing = [f"pass {remedy}" for name, remedy in needed.items() if name not in settings]
    if not missing:
        return []
    reason = "it is not the output of stage 3, so the command has to name the models"
    reference = "pass reference_model_name_or_path=REFERENCE, unless it is the policy"
    return [reason, *missing, reference]


def main() -> None:
    """Check the command line and the settings, then launch the evaluation."""
    arguments = sys.argv[1:]
    options = evaluation_parser().parse_intermixed_args(arguments)
    with errors_end_cleanly(options.debug):
        launch_run(evaluation_config(options), "step3_rlhf.evaluation", arguments)


if __name__ == "__main__":  # what scripts/launch.sh starts
    main()
