"""How a stage starts and how a mistake ends: exit code 2, one message, rank 0 speaks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from step1_sft.config import SFTConfig
from training import cli
from training.cli import prepare_output, run_stage, stage_parser
from training.config import check_config
from training.errors import RunError, UserError
from training.launch.lock import contents
from training.runtime import ranks, signals

Settings = Callable[[str], dict[str, Any]]


@pytest.fixture(autouse=True)
def without_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "connect", lambda: None)
    monkeypatch.setattr(ranks, "disconnect", lambda: None)
    monkeypatch.setattr(signals.stop_requests, "install", lambda: None)  # pytest keeps its own
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def config_file(stage_settings: Settings, tmp_path: Path) -> str:
    path = tmp_path / "sft.json"
    path.write_text(json.dumps(stage_settings("sft")))
    return str(path)


def test_a_stage_gets_its_config_with_the_overrides(config_file: str) -> None:
    given: list[SFTConfig] = []
    run_stage(SFTConfig, given.append, [config_file, "seed=7", "data.max_prompt_length=9"])
    assert (given[0].seed, given[0].data.max_prompt_length) == (7, 9)


def test_the_launchers_own_option_is_understood(config_file: str) -> None:
    options = stage_parser(SFTConfig).parse_args(["--local_rank=1", config_file, "a=1", "b=2"])
    assert (options.local_rank, options.config, options.overrides) == (
        1,
        config_file,
        ["a=1", "b=2"],
    )


def test_a_mistake_in_the_config_ends_with_its_message(
    config_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_stage(SFTConfig, lambda config: pytest.fail("started"), [config_file, "sede=7"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("sede: unknown key; did you mean 'seed'?") == 1


def test_a_mistake_found_by_the_stage_ends_with_its_message(
    config_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def stage(config: SFTConfig) -> None:
        raise UserError(["one", "two"], "The data cannot be used:")

    with pytest.raises(SystemExit) as caught:
        run_stage(SFTConfig, stage, [config_file])
    assert caught.value.code == 2
    assert capsys.readouterr().err.strip() == "The data cannot be used:\n  - one\n  - two"


def test_memory_that_does_not_suffice_ends_with_what_to_change(
    config_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_stage(SFTConfig, lambda config: torch.empty(1 << 60), [config_file])
    assert caught.value.code == 1
    assert "gradient_checkpointing=true" in capsys.readouterr().err


def test_a_run_that_cannot_go_on_ends_with_its_message(
    config_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def stage(config: SFTConfig) -> None:
        raise RunError("no room")

    with pytest.raises(SystemExit) as caught:
        run_stage(SFTConfig, stage, [config_file])
    assert caught.value.code == 1
    assert capsys.readouterr().err.strip() == "no room"


def test_debug_keeps_the_traceback(config_file: str) -> None:
    with pytest.raises(UserError):
        run_stage(SFTConfig, lambda config: None, ["--debug", config_file, "sede=7"])


def test_a_mistake_of_ours_is_not_dressed_up(config_file: str) -> None:
    def stage(config: SFTConfig) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        run_stage(SFTConfig, stage, [config_file])


def test_rank_0_speaks_first(
    config_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launcher ends all processes with the first one: the others wait for rank 0's message."""
    waited: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    for rank, seconds in (("0", []), ("1", [cli.SECONDS_FOR_RANK_0])):
        monkeypatch.setenv("RANK", rank)
        waited.clear()
        with pytest.raises(SystemExit) as caught:
            run_stage(SFTConfig, lambda config: None, [config_file, "sede=7"])
        assert caught.value.code == 2
        assert waited == seconds
        assert "sede" in capsys.readouterr().err


def test_prepare_output_writes_the_resolved_config_into_an_empty_directory(
    stage_settings: Settings,
) -> None:
    data = stage_settings("sft") | {"overwrite_output_dir": True}
    output = Path(data["output_dir"])
    (output / "checkpoints").mkdir(parents=True)
    (output / "config.json").write_text("{}")
    config = check_config(SFTConfig, data, "config:")
    assert prepare_output(config) == output
    assert [path.name for path in contents(output)] == ["config.json"]
    resolved = json.loads((output / "config.json").read_text())
    assert resolved["per_device_eval_batch_size"] == 8  # a default
    assert check_config(SFTConfig, resolved, "config:") == config
