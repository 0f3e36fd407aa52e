"""Whole or not at all, wherever a kill comes."""

import shutil
from pathlib import Path

import pytest

from training.runtime.disk import draft_of, publish, recover, remove, write_whole


class Killed(Exception):
    pass


def kill_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """The process dies just before the `call`-th rename."""
    usual, calls = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == call:
            raise Killed
        return usual(self, target)

    monkeypatch.setattr(Path, "rename", rename)


def written(directory: Path, text: str) -> Path:
    draft = draft_of(directory)
    (draft / "file").write_text(text)
    return draft


def test_a_draft_replaces_what_was_there(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    for text in ("old", "new"):
        publish(written(directory, text), directory)
        assert (directory / "file").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("call", [1, 2])
def test_a_kill_at_any_rename_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    directory = tmp_path / "model"
    publish(written(directory, "old"), directory)
    with monkeypatch.context() as patch:
        kill_at(patch, call)
        with pytest.raises(Killed):
            publish(written(directory, "new"), directory)
    recover(directory)
    assert (directory / "file").read_text() == "old"
    publish(written(directory, "newer"), directory)
    assert (directory / "file").read_text() == "newer"


def test_what_is_removed_loses_its_name_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "step"
    publish(written(directory, "old"), directory)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *given, **named: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            remove(directory)
    publish(written(directory, "new"), directory)
    remove(directory)
    remove(directory)
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    write_whole(file, "one\n")
    write_whole(file, "one\ntwo\n")
    assert file.read_text() == "one\ntwo\n"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
