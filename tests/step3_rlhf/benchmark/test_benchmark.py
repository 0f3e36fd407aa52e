"""The benchmark: its arithmetic by hand, its inputs, and a run through the real script."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from step3_rlhf.benchmark.floor import Work
from step3_rlhf.benchmark.shapes import SHAPES, write_inputs

ROOT = Path(__file__).resolve().parents[3]


def test_the_arithmetic_by_hand() -> None:
    work = Work(body=10, head=7, prompt=3, response=2, attended=25, width=4)
    decoder = 2 * 10 * 5 + 2 * 25 * 4
    assert work.flops() == 9 * decoder + 5 * 2 * 7 * 2
    assert work.decoding_bytes(steps=2, bytes_per_parameter=4) == 2 * 17 * 4


def test_prompts_are_longer_than_they_are_cut_to(tmp_path: Path) -> None:
    shape = SHAPES["tiny"]
    write_inputs(shape, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines()
    assert len(lines) == 4 * shape.batch
    assert all(len(tokenizer(json.loads(x)["prompt"]).input_ids) >= shape.prompt for x in lines)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert model.config.vocab_size == len(tokenizer) == shape.vocabulary


@pytest.mark.launcher
def test_through_the_real_script(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "scripts" / "benchmark.sh"), "--shape", "tiny", "--pairs", "1"]
    done = subprocess.run(
        [*command, "--iterations", "1", "--output", str(tmp_path)],
        env=os.environ | {"VIRTUAL_ENV": sys.prefix, "NUM_PROCESSES": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "times the floor" in done.stdout
    found = json.loads((tmp_path / "benchmark.json").read_text())
    (run,) = found["runs"]["ours"]
    parts = [run["phases"][name] for name in ("rollout", "reward", "reference", "forward")]
    assert 0 < sum(parts) < run["phases"]["iteration"] == run["seconds"]
    assert found["floor"]["ours"]["ratio"] > 1
