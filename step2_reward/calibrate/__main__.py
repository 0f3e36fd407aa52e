"""Finds the β at which a reward model is calibrated.

    bash scripts/calibrate.sh REWARD_DIR [key.path=value ...]

Preference matching reaches softmax(r/β), so the right β is the temperature that calibrates r. It is
estimated on the test prompts, which neither trained nor chose the model. Writes `calibration.json`
into REWARD_DIR, beside `model/`, where stage 3 finds it for `"beta": "calibrated"`; and reliability
diagrams, of the model as it is and with its rewards divided by β.
"""

import importlib.util
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from step2_reward.calibrate.linked import estimand, held_out_log_odds, linked_temperature
from step2_reward.calibrate.settings import (
    CalibrationConfig,
    calibration_config,
    calibration_parser,
)
from step2_reward.calibration import calibration_figures, draw_reliability
from step2_reward.main import PreferenceModelling, log_odds
from step2_reward.ties import require_decided
from training.cli import errors_end_cleanly, start
from training.data import read_records, tokenize
from training.errors import UserError
from training.fitting import held_out_splits, require_evaluation
from training.models.checks import check_positions
from training.models.loading import load_reward_model
from training.models.options import LoadOptions
from training.models.pretrained import Pretrained
from training.preferences.links import LinkName
from training.runtime import engine, ranks
from training.runtime.disk import write_whole
from training.runtime.json_text import json_text
from training.runtime.tracking import say
from training.runtime.weights import weights_digest

FILE = "calibration.json"


def run(config: CalibrationConfig) -> None:
    """Write `calibration.json` and the diagrams.

    Raises:
        UserError: there are no test comparisons, the model has another link, or no temperature
            calibrates it.
    """
    records = read_records(config.data, "reward")
    require_evaluation(records)
    pretrained = Pretrained(config.model_name_or_path, config.trust_remote_code)
    learned = pretrained.learned_link
    if learned not in (None, config.link):
        raise UserError(
            f"link: {pretrained} learned preferences under the link {learned}, and {config.link} "
            f"would give its rewards other probabilities; pass link={learned}"
        )
    check_positions(pretrained, config.data.lengths())
    tokenizer = pretrained.tokenizer
    with ranks.rank_zero_first():
        data = tokenize(replace(records, train=[]), tokenizer, config.data, "reward")
    test = held_out_splits(data.eval, config.data)["test"]
    require_decided({"test": test})
    options = LoadOptions.frozen(config)
    model = engine.frozen(load_reward_model(pretrained, options), {}, options.dtype)
    task = PreferenceModelling(model, data.train, {"test": test}, config, tokenizer.pad_token_id)
    task.evaluate("test")
    found = calibration(task.pairs, task.clusters, config.calibration_bins, config.link) | {
        "model_name_or_path": config.model_name_or_path,
        "weights": weights_digest(Path(config.model_name_or_path)),
        "data": config.data.model_dump(mode="json"),
    }
    output = Path(config.output_dir)
    if ranks.rank() == 0:
        output.mkdir(parents=True, exist_ok=True)
        write_whole(output / FILE, json_text(found))
        if importlib.util.find_spec("matplotlib"):
            for name in ("before", "after"):
                draw_reliability(found[name], output / f"reliability_{name}.png")
    ranks.barrier()
    say(f"{summary(found)}\n  written to: {output / FILE}")


def calibration(
    pairs: torch.Tensor, clusters: torch.Tensor, bins: int, link: LinkName = "exponential"
) -> dict[str, Any]:
    """β with its interval, and the model's calibration as it is and at β.

    "after" has each half of the clusters at the other half's β, so that it flatters nobody.

    Args:
        pairs: [pairs, 2] rewards of the chosen and the rejected response.
    """
    after = held_out_log_odds(pairs, clusters, link)
    return {
        "beta": asdict(linked_temperature(pairs, clusters, link)),
        "estimand": estimand(link),
        "link": link,
        "split": "test",
        "before": calibration_figures(log_odds(pairs, link), clusters, bins),
        "after": calibration_figures(after, clusters, bins),
    }


def summary(found: dict[str, Any]) -> str:
    """β, and what it does to log-loss and calibration error."""
    beta, before, after = found["beta"], found["before"], found["after"]
    interval = "" if beta["low"] is None else f" ({beta['low']:.3f} to {beta['high']:.3f})"
    lines = [
        f"The reward model is calibrated at beta = {beta['mean']:.3f}{interval}, from "
        f"{before['pairs']:,} pairs of {before['clusters']:,} groups of the test prompts"
    ]
    for name, key, unit in (("log-loss", "log_loss", " nats"), ("calibration error", "ece", "")):
        change = f"{before[key]:.4f} as it is, {after[key]:.4f} at beta{unit}"
        lines.append(f"  {name + ':':<20}{change}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    options = calibration_parser().parse_intermixed_args(arguments)
    with errors_end_cleanly(options.debug):
        config = calibration_config(options)
        start(lambda: run(config), config)


if __name__ == "__main__":
    main()
