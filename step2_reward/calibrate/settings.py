"""The settings of a calibration, as far as the reward model's directory determines them."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from pydantic import Field

from training.cli import SettingsParser, add_common_options, errors_end_cleanly, launch_run
from training.config import Count, apply_overrides, check_config, read_mapping
from training.data.settings import DataSettings
from training.preferences.links import LinkName
from training.stage_config import RunConfig

EXAMPLES = """examples:
  bash scripts/calibrate.sh runs/quickstart/reward
  bash scripts/calibrate.sh MODEL model_name_or_path=MODEL 'data.sources=["PATH"]'
Every setting below can be overridden as key.path=value."""


class CalibrationConfig(RunConfig):
    """What `scripts/calibrate.sh` needs to know; the config.json of a stage-2 run has all of it."""

    data: DataSettings = Field(examples=[{"sources": ["owner/dataset"]}])
    """Comparisons, of which the test prompts are used: they neither trained nor chose the model."""
    link: LinkName = "exponential"
    """Link g with which the reward model was trained; a run of stage 2 has its own."""
    calibration_bins: Count = 10
    """Equally wide bins of the reliability diagrams."""


def calibration_parser() -> SettingsParser:
    """The command line of scripts/calibrate.sh."""
    parser = SettingsParser(
        CalibrationConfig,
        usage="bash scripts/calibrate.sh REWARD_DIR [key.path=value ...] [options]",
        description="Find the beta at which a reward model is calibrated.",
        epilog=EXAMPLES,
    )
    parser.add_argument("reward_dir", help="what stage 2 wrote, and where calibration.json goes")
    parser.add_argument("overrides", nargs="*", help="key.path=value, over the run's own settings")
    add_common_options(parser)
    return parser


def reward_settings(reward_dir: str) -> dict[str, Any]:
    """The settings that REWARD_DIR determines.

    Of a stage-2 run all of them, with `model/` as the model; of another directory only where the
    results go.
    """
    directory = Path(reward_dir)
    known: dict[str, Any] = {"output_dir": reward_dir}
    if not (directory / "model").is_dir() or not (directory / "config.json").is_file():
        return known
    saved = read_mapping(str(directory / "config.json"))
    known |= {name: saved[name] for name in CalibrationConfig.model_fields if name in saved}
    known |= {"output_dir": reward_dir, "model_name_or_path": str(directory / "model")}
    return known


def missing_settings(settings: dict[str, Any]) -> list[str]:
    """The overrides that are still needed if REWARD_DIR is not a run of stage 2."""
    needed = {
        "model_name_or_path": "model_name_or_path=MODEL, a directory or a Hub name",
        "data": 'data.sources=["PATH_OR_NAME"]',
    }
    missing = [f"pass {remedy}" for name, remedy in needed.items() if name not in settings]
    return ["it is not the output of stage 2", *missing] if missing else []


def calibration_config(options: Namespace) -> CalibrationConfig:
    """The settings of a command line, checked.

    Args:
        options: of `calibration_parser`.
    """
    settings = reward_settings(options.reward_dir)
    faults = apply_overrides(settings, options.overrides) + missing_settings(settings)
    heading = f"{options.reward_dir} cannot be calibrated:"
    return check_config(CalibrationConfig, settings, heading, faults)


def main() -> None:
    """Check the command line and the settings, then launch the calibration."""
    arguments = sys.argv[1:]
    options = calibration_parser().parse_intermixed_args(arguments)
    with errors_end_cleanly(options.debug):
        launch_run(calibration_config(options), "step2_reward.calibrate", arguments)


if __name__ == "__main__":  # what scripts/launch.sh starts
    main()
