"""The benchmark: its arithmetic by hand, its inputs, and a run through the real script."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from step3_rlhf.benchmark.floor import Work
from step3_rlhf.benchmark.measure import run_logged
from step3_rlhf.benchmark.scaling import draw_scaling, measure_scaling, power_law, scaling_text
from step3_rlhf.benchmark.shapes import SHAPES, Shape, write_inputs
from step3_rlhf.benchmark.table import as_text
from training.errors import UserError

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


def run_of(seconds: float, peak_gib: float, **phases: float) -> dict[str, Any]:
    return {"seconds": seconds, "peak_gib": peak_gib, "phases": phases}


def test_the_table() -> None:
    """Medians of the runs, - for what TRL does not tell, and ratios pair by pair."""
    rates = {"matmul_gflops": 150.0, "decoded_tokens_per_second": 3670.0}
    found = {
        "what": "small",
        "machine": {"device": "a CPU", "cores": 2},
        "runs": {
            "trl": [run_of(3.0, 2.0), run_of(5.0, 2.2), run_of(4.0, 2.4)],
            "ours": [
                run_of(2.0, 1.0, rollout=0.5, step=0.25),
                run_of(2.5, 1.1, rollout=0.6, step=0.35),
                run_of(1.6, 1.2, rollout=0.7, step=0.3),
            ],
        },
        "floor": {"ours": {"ratio": 2.15, "decoding_seconds": 0.1234, **rates}},
        "ratios": {"ours": {"speed": [1.5, 2.0, 2.5], "memory": [0.5, 0.5, 0.5]}},
    }
    assert as_text(found).splitlines() == [
        "",
        "small on a CPU, 2 cores",
        "median of the runs                 trl          ours",
        "seconds per iteration                4             2",
        "  rollout                            -           0.6",
        "  step                               -           0.3",
        "peak memory, GiB                   2.2           1.1",
        "times the floor                      -          2.15",
        "matmul, GFLOP/s                      -           150",
        "decoded tokens/s                     -      3.67e+03",
        "reading weights, s                   -         0.123",
        "ours, speed relative to trl: 2.00 (1.50 to 2.50, 3 pairs)",
        "ours, memory relative to trl: 0.50 (0.50 to 0.50, 3 pairs)",
    ]


def test_the_exponent_of_growth() -> None:
    assert power_law([4, 8, 16, 32], [0.5, 1.0, 2.0, 4.0]) == pytest.approx(1, abs=1e-12)
    assert power_law([4, 8, 16, 32], [1.0, 4.0, 16.0, 64.0]) == pytest.approx(2, abs=1e-12)
    assert power_law([1, 2, 4], [3.0, 3.0, 3.0]) == pytest.approx(0, abs=1e-12)


def test_growth_is_measured_to_8_times_and_drawn(tmp_path: Path) -> None:
    measured = []

    def seconds(shape: Shape) -> float:
        measured.append((shape.batch, shape.prompt, shape.response))
        return shape.batch * (shape.prompt + shape.response) ** 2 / 1e5

    found = measure_scaling(SHAPES["small"], seconds)
    responses = [(batch, 64, 64) for batch in (8, 16, 32, 64)]
    lengths = [(32, tokens, tokens) for tokens in (16, 32, 128)]  # 64 is measured already
    assert measured == responses + lengths
    assert found["responses"]["amounts"] == [8, 16, 32, 64]
    assert found["tokens per response"]["amounts"] == [32, 64, 128, 256]
    assert found["responses"]["exponent"] == pytest.approx(1, abs=1e-12)
    assert found["tokens per response"]["exponent"] == pytest.approx(2, abs=1e-12)
    assert scaling_text(found).splitlines() == [
        "responses 8 / 16 / 32 / 64: 1.31 / 2.62 / 5.24 / 10.5 s per iteration, amount^1.00",
        "tokens per response 32 / 64 / 128 / 256: 0.328 / 1.31 / 5.24 / 21 s per iteration, "
        "amount^2.00",
    ]
    draw_scaling(found, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_a_command_that_fails_or_takes_too_long_names_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert run_logged(["echo", "a b"], log, limit=60) == "a b\n"
    assert log.read_text() == "$ echo 'a b'\na b\n"
    with pytest.raises(UserError, match=r"^bash -c exit 3 failed; .*log\.txt has its output$"):
        run_logged(["bash", "-c", "exit 3"], log, limit=60)
    with pytest.raises(UserError, match=r"^sleep 60 took longer than 1 s; "):
        run_logged(["sleep", "60"], log, limit=1)


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
