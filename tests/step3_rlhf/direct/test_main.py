"""Whole runs of direct optimization on the tiny world, in this process."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from step3_rlhf.direct import main as direct
from step3_rlhf.direct import reference
from step3_rlhf.direct.config import DirectConfig
from training.config import check_config
from training.errors import UserError

pytestmark = pytest.mark.usefixtures("process_group")

README = Path(direct.__file__).with_name("README.md")
Run = Callable[..., Path]


@pytest.fixture
def run(stage_settings: Callable[[str], dict[str, Any]]) -> Run:
    def once(**changes: Any) -> Path:
        settings = stage_settings("direct") | {"regularizer": {"name": "kl"}} | changes
        config = check_config(DirectConfig, settings, "test:")
        torch.manual_seed(0)
        direct.main(config)
        return Path(config.output_dir)

    return once


@pytest.fixture(autouse=True)
def lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward function in a module of its own."""
    code = "def of(prompts, responses):\n    return [len(r) / 10 for r in responses]\n"
    (tmp_path / "step3_lengths.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)


def metrics_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("changes", [{}, {"lora": {"r": 4}, "packing": True}], ids=str)
def test_dpo_starts_at_log_2_and_leaves_it(
    run: Run, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The policy is its reference: every margin is 0. With LoRA, it is without its adapter."""
    output = run(**changes, max_steps=3)
    first, *_, last = metrics_of(output)
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert last["train/loss"] != pytest.approx(math.log(2), abs=1e-4)
    actor = AutoModelForCausalLM.from_pretrained(output / "actor").state_dict()
    assert not any("lora" in name for name in actor)
    printed = capsys.readouterr().out
    assert "determine the ratios of π(y|x) among the compared responses" in printed
    assert "The mass on all other responses is free" in printed


def test_preference_matching_with_an_anchor_and_every_metric(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = metrics_of(run(regularizer={"name": "pm"}, anchor={"weight": 0.1}))
    assert lines[0]["train/loss"] != pytest.approx(math.log(2), abs=1e-3)
    assert "The anchor (weight 0.1) draws mass" in capsys.readouterr().out
    written = {key for line in lines for key in line}
    text = README.read_text(encoding="utf-8")
    rows = re.findall(r"^\|(.*)\|$", text.split("## Metrics")[1], re.M)[2:]
    defined = set()
    for row in rows:
        for split, key in re.findall(r"(SPLIT)?`([^`]+)`", row.split("|")[0]):
            kinds = ("", "validation/", "test/") if split else ("",)
            defined |= {f"{kind}{key}" for kind in kinds}
    shared = ("step", "seconds", "time/", "memory/")
    own = {"train/epoch", "train/learning_rate", "train/grad_norm"}
    assert {key for key in written if not key.startswith(shared)} - own == defined


def test_a_resumed_run_reads_the_reference_and_refuses_another(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = run(save_steps=1)
    assert "Scoring the compared responses" in capsys.readouterr().out
    kept = load_file(output / reference.FILE)
    assert kept.keys() == {"train", "validation", "test"}

    def again() -> None:
        run(save_steps=1, max_steps=3, resume_from_checkpoint="latest")

    monkeypatch.setattr(reference, "weights_digest", lambda place: "other weights")
    with pytest.raises(UserError, match="is of another reference, precision or data"):
        again()
    monkeypatch.undo()
    capsys.readouterr()
    again()
    assert "Scoring the compared responses" not in capsys.readouterr().out
    assert len(metrics_of(output)) == 3


def test_a_reward_adds_its_figures(run: Run) -> None:
    output = run()
    figures = json.loads((output / "evaluation.json").read_text())
    assert figures["pm_divergence"] is figures["reward"] is figures["exact"]["tv_to_reward"] is None
    assert figures["kl"]["mean"] is not None
    assert "rewards" not in figures["exact"]["per_prompt"][0]
    lines = (output / "instances.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["responses"][0]["reward"] is None
    with_one = run(overwrite_output_dir=True, reward={"function": "step3_lengths:of"})
    figures = json.loads((with_one / "evaluation.json").read_text())
    assert figures["left_out"] == []
    assert figures["reward"]["mean"] > 0
    assert 0 <= figures["exact"]["tv_to_optimum"]["mean"] <= 1
