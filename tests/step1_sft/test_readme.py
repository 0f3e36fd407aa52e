"""step1_sft/README.md defines every metric that the stage writes."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from step1_sft import main as sft
from step1_sft.config import SFTConfig
from training.config import check_config

README = Path(__file__).resolve().parents[2] / "step1_sft" / "README.md"


@pytest.mark.usefixtures("process_group")
def test_every_metric_is_defined(stage_settings: Callable[[str], dict[str, Any]]) -> None:
    config = check_config(SFTConfig, stage_settings("sft") | {"max_steps": 1}, "config:")
    sft.main(config)
    (line,) = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    defined = set(re.findall(r"^\| `([^`]+)` \|", README.read_text(encoding="utf-8"), re.M))
    assert defined - json.loads(line).keys() == {"train/loss_scale", "train/skipped_steps"}  # fp16
    assert json.loads(line).keys() <= defined
