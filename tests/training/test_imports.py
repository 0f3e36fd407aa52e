"""What importing a module brings with it: no optional package, and no engine for a config."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def test_data_and_config_do_not_need_torch_engines() -> None:
    """A config is checked before DeepSpeed or a model is loaded."""
    for path in [ROOT / "training" / "config.py", ROOT / "training" / "stage_config.py"]:
        eager = {package(name) for name in imports(path, top_level_only=True)}
        assert not eager & {"torch", "deepspeed", "transformers"}
