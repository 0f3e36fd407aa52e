"""No file that a user is given can run code here, but for what the config names as code."""

import ast
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from step1_sft.config import SFTConfig
from training.cli import run_stage
from training.config import check_config
from training.errors import UserError
from training.models.loading import load_policy
from training.models.options import precision
from training.models.policy import Policy
from training.models.pretrained import Pretrained
from training.runtime import engine, ranks, signals
from training.runtime.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("training", "step1_sft", "step2_reward", "step3_rlhf")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


class Trap:
    """Pickled, it creates a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


def test_the_trap_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


def test_pickled_weights_are_refused(
    tiny_llama: PreTrainedModel, world_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tiny_llama.config.save_pretrained(tmp_path)
    world_tokenizer.save_pretrained(tmp_path)
    torch.save({"w": Trap(tmp_path / "sprung")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_policy(Pretrained(str(tmp_path)), Pretrained(str(tmp_path)).tokenizer)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("bf16", [False, True])
def test_checkpoints_are_loaded_as_plain_data(
    stage_settings: Callable[[str], dict[str, Any]],
    tiny_llama: PreTrainedModel,
    tmp_path: Path,
    zero: int,
    bf16: bool,
) -> None:
    settings = stage_settings("sft") | {
        "bf16": bf16,
        "deepspeed": {"zero_optimization": {"stage": zero}},
    }
    config = check_config(SFTConfig, settings, "config:")
    trained = engine.TrainedModule(Policy(tiny_llama.to(precision(config))), config, config, 10)
    Checkpoints(config, {"model": trained}).save(1, {})
    output = Path(config.output_dir)
    (output / "config.json").write_text("{}")
    resumed = check_config(SFTConfig, settings | {"resume_from_checkpoint": "latest"}, "config:")
    assert Checkpoints(resumed, {"model": trained}).restore()[0] == 1

    # The same file with something else in it: refused, not run.
    for file in (output / "checkpoints").rglob("*states.pt"):
        content = torch.load(file, weights_only=False)
        torch.save({**content, "more": Trap(tmp_path / "sprung")}, file)
    with pytest.raises(Exception, match=r"[Ww]eights.only|Unsupported|WeightsUnpickler"):
        Checkpoints(resumed, {"model": trained}).restore()
    assert not (tmp_path / "sprung").exists()


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
        )
    }
    assert not imported & {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    for call in calls(tree):
        name = ast.unparse(call.func)
        assert name not in ("eval", "exec", "compile", "__import__", "yaml.load", "os.system")
        if name == "torch.load":
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert given.get("weights_only") == "True"


def test_one_module_imports_what_settings_name() -> None:
    importing = [
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if any(
            ast.unparse(call.func) in ("importlib.import_module", "import_module")
            for call in calls(ast.parse(path.read_text(encoding="utf-8")))
        )
    ]
    # The other two import the project's own modules, when they are first used.
    own = ["training/data/__init__.py", "training/deferred.py"]
    assert importing == [*own, "training/plugins.py"]


def test_foreign_code_is_announced(
    stage_settings: Callable[[str], dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("connect", "disconnect"):
        monkeypatch.setattr(ranks, name, lambda: None)
    monkeypatch.setattr(signals.stop_requests, "install", lambda: None)
    monkeypatch.delenv("RANK", raising=False)
    file = tmp_path / "sft.json"
    file.write_text(json.dumps(stage_settings("sft")))
    run_stage(SFTConfig, lambda config: None, [str(file)])
    assert "trust_remote_code" not in capsys.readouterr().err
    run_stage(SFTConfig, lambda config: None, [str(file), "trust_remote_code=true"])
    printed = capsys.readouterr().err
    assert "WARNING: trust_remote_code=true" in printed
    assert "may run on this machine" in printed
