"""Weights that changed are noticed, wherever in the file they lie."""

from pathlib import Path

import pytest

from training.runtime.weights import weights_digest

SIZE = 2**25


@pytest.mark.parametrize("place", [0.0, 0.013, 0.5, 0.77, 1.0])
def test_a_changed_matrix_is_noticed(tmp_path: Path, place: float) -> None:
    """One per cent of the file changes; elsewhere than at its ends that once went unnoticed."""
    content = bytearray(SIZE)
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    before = weights_digest(tmp_path)
    assert weights_digest(tmp_path) == before
    first = int(place * (SIZE - SIZE // 100))
    content[first : first + SIZE // 100] = b"\x01" * (SIZE // 100)
    file.write_bytes(content)
    assert weights_digest(tmp_path) != before


def test_what_is_not_here_has_no_digest(tmp_path: Path) -> None:
    assert weights_digest(tmp_path / "a-model-of-the-hub") is None


def test_a_file_that_is_smaller_than_its_parts(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"one")
    one = weights_digest(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_bytes(b"two")
    assert one is not None
    assert weights_digest(tmp_path / "model.gguf") != one
