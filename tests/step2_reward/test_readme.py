"""step2_reward/README.md defines every metric that the stage writes."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from step2_reward import main as reward
from step2_reward.config import RewardConfig
from training.config import check_config

README = Path(__file__).resolve().parents[2] / "step2_reward" / "README.md"


def first_column(table: str) -> set[str]:
    return set(re.findall(r"^\| `([^`]+)` \|", table, re.M))


@pytest.mark.usefixtures("process_group")
def test_every_metric_is_defined(stage_settings: Callable[[str], dict[str, Any]]) -> None:
    config = check_config(RewardConfig, stage_settings("reward") | {"max_steps": 1}, "config:")
    reward.main(config)
    output = Path(config.output_dir)
    (line,) = (output / "metrics.jsonl").read_text().splitlines()
    report = json.loads((output / "evaluation.json").read_text())

    text = README.read_text(encoding="utf-8")
    evaluation, rest = text.split("and in addition:")
    training = rest.split("## Can one")[0]
    assert first_column(evaluation) == report.keys()
    test = rest.split("## Can one")[1].split("## Calibration")[0]
    assert set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]+)\|", test, re.M)))) >= (
        report["btl_fit"].keys()
    )
    assert all(f"`{name}`" in evaluation for name in report["reliability"][0])
    splits = re.findall(r"\| `SPLIT/([^`]+)` \|", evaluation)
    names = {f"{split}/{name}" for split in ("validation", "test") for name in splits}
    defined = first_column(training) | names
    assert defined - json.loads(line).keys() == {"train/loss_scale", "train/skipped_steps"}  # fp16
    assert json.loads(line).keys() <= defined
