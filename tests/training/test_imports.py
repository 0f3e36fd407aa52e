"""What importing a module brings with it: no optional package, and no engine for a config."""

import ast
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("step1_sft", "step2_reward", "step3_rlhf")
FILES = sorted(path for package in ("training", *STAGES) for path in (ROOT / package).rglob("*.py"))
OPTIONAL = ("matplotlib", "gguf", "wandb", "tensorboard")


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    """Dotted names of the modules that a file imports, `from a import b` as a and a.b."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _is_type_checking(node)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if top_level_only and node in inside:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def package(name: str) -> str:
    return name.split(".")[0]


ENTRY_POINTS = (
    "step1_sft.main",
    "step2_reward.main",
    "step3_rlhf.main",
    "step3_rlhf.evaluation.__main__",
)


def module_file(name: str) -> Path | None:
    path = ROOT.joinpath(*name.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in candidates if file in FILES), None)


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_a_stage_starts_without_the_optional_packages(entry: str) -> None:
    waiting, seen = [entry], set()
    while waiting:
        name = waiting.pop()
        file = module_file(name)
        if file is None or file in seen:
            continue
        seen.add(file)
        eager = set(imports(file, top_level_only=True))
        assert not {other for other in eager if package(other) in OPTIONAL}, file
        waiting += eager
    assert len(seen) > 10


HEAVY = ("torch", "transformers", "datasets", "deepspeed", "peft", "numpy")


@pytest.mark.parametrize(
    "module",
    [
        *(f"{stage}.config" for stage in STAGES),
        "step3_rlhf.evaluation.settings",
        "step3_rlhf.chat.__main__",
        "training.cli",
    ],
)
def test_a_config_is_checked_without_torch(module: str) -> None:
    """What scripts/launch.sh starts first: it must answer at once."""
    program = f"import sys, {module}\nprint([n for n in {HEAVY} if n in sys.modules])"
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ended.stdout == "[]\n"


def test_the_shipped_quickstart_is_checked_without_torch() -> None:
    """Also in full; only a `deepspeed` section that says something is checked by DeepSpeed."""
    program = (
        "import sys\n"
        "from step3_rlhf.config import PPOConfig\n"
        "from training.config import load_config\n"
        "from training.errors import UserError\n"
        "try:\n    load_config(PPOConfig, 'step3_rlhf/configs/quickstart.json', sys.argv[1:])\n"
        "except UserError as error:\n    print(len(error.faults))\n"
        f"print([n for n in {HEAVY} if n in sys.modules])"
    )
    command = [sys.executable, "-c", program, "output_dir=runs/nowhere", "data.sources=[README.md]"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]", ended.stdout


def test_the_mathematics_finds_torch_when_it_computes() -> None:
    from step3_rlhf.regularizers.base import log1p_exp
    from training import deferred

    assert deferred.torch.Tensor is torch.Tensor
    assert log1p_exp(torch.tensor(0.0)).item() == pytest.approx(math.log(2.0))
