"""The check of a GPU machine, on a CPU: what can run there, and why the rest cannot."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from step3_rlhf.benchmark.shapes import SHAPES, stage_config, write_inputs
from step3_rlhf.config import PPOConfig
from step3_rlhf.gpu_check.decoding import FAMILIES, drawn, random_policy, same_tokens
from step3_rlhf.gpu_check.iteration import Iteration, estimated_gib, peak_flops
from step3_rlhf.gpu_check.plan import all_rows, chosen
from step3_rlhf.gpu_check.rows import Found, Result, Row, as_text, result_of
from step3_rlhf.gpu_check.stages import check_numbers
from step3_rlhf.gpu_check.waiting import WARNING, counted, waits
from training.config import check_config
from training.errors import RunError, UserError

ROOT = Path(__file__).resolve().parents[3]


def tiny_inputs(directory: Path) -> dict[str, Any]:
    """Write the benchmark's smallest models and prompts; the config of two iterations on them."""
    write_inputs(SHAPES["tiny"], directory)
    return stage_config(SHAPES["tiny"], directory, iterations=2)


def failing(log: Path) -> Found:
    log.write_text("what it did\n")
    raise RunError("it broke\nin two lines")


def test_a_row_that_fails_names_its_log_and_the_others_run(tmp_path: Path) -> None:
    rows = [
        Row("broken", failing),
        Row("sound", lambda log: Found("3 of 3", {"share": 1.0})),
        Row("elsewhere", failing, "there is no GPU"),
    ]
    broken, sound, elsewhere = (result_of(row, tmp_path) for row in rows)
    log = tmp_path / "broken.txt"
    assert (broken.outcome, broken.log) == ("failed", str(log))
    assert broken.text == f"it broke; {log} says more"
    assert log.read_text().startswith("what it did\nTraceback")
    assert (sound.outcome, sound.text, sound.figures) == ("ok", "3 of 3", {"share": 1.0})
    assert elsewhere == Result("elsewhere", "not possible", "there is no GPU")


def test_the_table() -> None:
    results = [
        Result("zero-0", "ok", "losses 3 and 1", 31.4),
        Result("memory", "failed", "too much", 2.0),
        Result("fp16", "not possible", "no"),
    ]
    assert as_text("a GPU", results).splitlines() == [
        "Check of a GPU",
        "row     outcome          s  found",
        "zero-0  ok              31  losses 3 and 1",
        "memory  failed           2  too much",
        "fp16    not possible     0  no",
        "1 ok, 1 failed, 1 not possible here",
    ]


def test_a_row_that_there_is_not(tmp_path: Path) -> None:
    rows = all_rows(tmp_path, ["tiny"])
    assert [row.name for row in chosen(rows, ["speed", "zero-3"])] == ["zero-3", "speed"]
    assert chosen(rows, None) == rows
    with pytest.raises(UserError, match="there is no row 'zero3'; did you mean 'zero-3'"):
        chosen(rows, ["zero3"])


@pytest.mark.parametrize(
    ("losses", "kl", "unchanged", "message"),
    [
        ([3.0, 0.7], 0.009, [3.002, 0.7], None),
        ([3.0, 0.7], 0.0, [3.004, 0.7], "a test loss is 3.00000, and 3.00400 without"),
        ([3.0, 0.7], -0.045, [3.0, 0.7], "is -0.0450 nats per token from itself"),
        ([3.0, float("nan")], 0.0, [3.0, 0.7], "not finite"),
    ],
)
def test_numbers_that_cannot_be_right(
    losses: list[float], kl: float, unchanged: list[float], message: str | None
) -> None:
    if message is None:
        check_numbers(losses, kl, unchanged)
    else:
        with pytest.raises(RunError, match=message):
            check_numbers(losses, kl, unchanged)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_compared(family: str) -> None:
    assert same_tokens(FAMILIES[family])  # without a GPU both decode in the same way
    policy = random_policy(FAMILIES[family], torch.float32)
    ids = torch.arange(10, 18).view(2, 4)
    first = drawn(policy, ids, torch.ones_like(ids), 24, captures=False)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    second = drawn(policy, ids, torch.ones_like(ids), 24, captures=False)
    assert not torch.equal(first, second)


def test_waits_are_told_from_other_warnings() -> None:
    with counted() as places:
        warnings.warn(f"item {WARNING} (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        warnings.warn(f"item {WARNING} (Triggered internally)", stacklevel=1)
    assert [place.split(":")[0] for place in places] == ["test_gpu_check.py"] * 2


@pytest.mark.usefixtures("process_group")
def test_an_iteration_never_waits_for_a_cpu(tmp_path: Path) -> None:
    config = check_config(PPOConfig, tiny_inputs(tmp_path), "config:")
    assert waits(config) == []


def test_data_sheets() -> None:
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("NVIDIA L4") == 121e12
    assert peak_flops("AMD EPYC") is None


def test_memory_is_compared_with_the_dry_run(tmp_path: Path) -> None:
    shape = SHAPES["tiny"]
    iteration = Iteration(tmp_path, shape, bf16=False)
    iteration.write_config()
    estimate = estimated_gib(iteration.config)
    layer = 16 * shape.hidden**2 + 2 * shape.hidden
    body = shape.layers * layer + shape.hidden * (shape.vocabulary + 1)
    policy, scalar = body + shape.hidden * shape.vocabulary, body + shape.hidden
    # Weights, gradients and moments of actor and critic; weights of reference and reward model.
    states = 16 * (policy + scalar) + 4 * (policy + scalar)
    assert states < estimate * 2**30 < 1.6 * states
    for peak in (0.9 * estimate, 1.1 * estimate):
        iteration._benchmark = {"runs": {"ours": [{"peak_gib": peak}]}}
        if peak < estimate:
            assert iteration.memory(tmp_path / "log").figures["estimated_gib"] == estimate
        else:
            with pytest.raises(RunError, match="estimated by --dry-run"):
                iteration.memory(tmp_path / "log")


@pytest.mark.launcher
@pytest.mark.long
def test_through_the_real_script(tmp_path: Path) -> None:
    """One setting of the stages, a decode step, a row that fails, and those that need a GPU."""
    (tmp_path / "iteration").write_text("in the way of the benchmark's folder")
    rows = "packing offload fp16 graph decode-tiny waiting speed memory".split()
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "gpu_check.sh", "--only", *rows, "--output", tmp_path],
        env=os.environ | {"VIRTUAL_ENV": sys.prefix, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    results = {row["name"]: row for row in found["rows"]}
    outcomes = {name: row["outcome"] for name, row in results.items()}
    impossible = dict.fromkeys(("offload", "fp16", "graph", "waiting", "memory"), "not possible")
    assert outcomes == impossible | {"packing": "ok", "decode-tiny": "ok", "speed": "failed"}
    assert all(results[name]["text"] for name in impossible)
    assert 0 < results["packing"]["figures"]["losses"][0] < 10
    assert list(results["decode-tiny"]["figures"]["ms_per_step"]["eager"]) == ["4", "24", "64"]
    log = Path(results["speed"]["log"])
    assert str(log) in results["speed"]["text"]
    assert "in the way" not in log.read_text()
    assert str(tmp_path / "iteration") in log.read_text()
    assert "1/8 packing ok" in done.stdout
    assert "2 ok, 1 failed, 5 not possible here" in done.stdout
