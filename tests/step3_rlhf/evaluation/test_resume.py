"""An evaluation that was stopped resumes and ends with the figures of an uninterrupted one."""

import json
from pathlib import Path
from typing import Any

import pytest

from step3_rlhf.evaluation.resume import BLOCKS, DIRECTORY, FinishedBlocks, model_fingerprint
from step3_rlhf.evaluation.shared_work import over_ranks

pytestmark = pytest.mark.usefixtures("process_group")
FINGERPRINT = {"config": {"seed": 1}, "processes": 1}


class Killed(Exception):
    pass


def measured(
    finished: FinishedBlocks, calls: list[list[int]], dies_at: int | None = None
) -> list[Any]:
    """Thirds of 7 rows in batches of 3; numbers that need all their digits."""

    def measure(rows: list[int]) -> list[Any]:
        if dies_at in rows:
            raise Killed
        calls.append(rows)
        return [[row / 3, "text"] for row in rows]

    return over_ranks(7, 3, measure, "rows", finished)


def test_finished_blocks_are_not_measured_again(tmp_path: Path) -> None:
    whole = measured(FinishedBlocks(tmp_path / "whole", FINGERPRINT), [])
    calls: list[list[int]] = []
    with pytest.raises(Killed):
        measured(FinishedBlocks(tmp_path / "run", FINGERPRINT), calls, dies_at=6)
    assert calls == [[0, 1, 2], [3, 4, 5]]
    calls.clear()
    resumed = FinishedBlocks(tmp_path / "run", FINGERPRINT)
    assert measured(resumed, calls) == whole
    assert calls == [[6]]
    resumed.remove()
    assert not (tmp_path / "run" / DIRECTORY).exists()


def test_half_a_line_is_measured_again(tmp_path: Path) -> None:
    whole = measured(FinishedBlocks(tmp_path, FINGERPRINT), [])
    file = tmp_path / DIRECTORY / BLOCKS
    file.write_bytes(file.read_bytes()[:-9])
    calls: list[list[int]] = []
    assert measured(FinishedBlocks(tmp_path, FINGERPRINT), calls) == whole
    assert calls == [[6]]
    assert len(file.read_text().splitlines()) == 3


def test_other_settings_start_from_scratch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(FinishedBlocks(tmp_path, FINGERPRINT), [])
    calls: list[list[int]] = []
    measured(FinishedBlocks(tmp_path, FINGERPRINT | {"processes": 2}), calls)
    assert len(calls) == 3
    assert "of another evaluation; it is started anew" in capsys.readouterr().out


def test_weights_that_were_written_again_are_others(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1234")
    before = model_fingerprint(str(tmp_path))
    assert model_fingerprint(str(tmp_path)) == before
    weights.write_bytes(b"12345")
    assert model_fingerprint(str(tmp_path)) != before
    assert json.loads(json.dumps(before)) == before
    assert model_fingerprint("owner/model") == ["owner/model"]


def test_a_gguf_file_and_a_tokenizer_that_were_written_again_are_others(tmp_path: Path) -> None:
    for name in ("model.gguf", "tokenizer.json"):
        file = tmp_path / name
        file.write_bytes(b"1234")
        path = str(file if name.endswith(".gguf") else tmp_path)
        before = model_fingerprint(path)
        file.write_bytes(b"12345")
        assert model_fingerprint(path) != before
