"""Whether a model's weights are still those that something was measured on."""

import hashlib
from pathlib import Path

CHUNK = 2**20
"""Bytes that are read at the beginning and at the end of each file; training changes both."""


def weights_digest(model: Path) -> str | None:
    """A hash of the sizes, beginnings and ends of a model's files; None if it is not here.

    These are the safetensors in a directory, or one GGUF file. The hash does not depend on where
    the model lies, nor on when its files were written.
    """
    files = sorted(model.glob("*.safetensors")) if model.is_dir() else []
    files += [model] if model.is_file() else []
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(CHUNK))
            file.seek(max(0, size - CHUNK))
            digest.update(file.read(CHUNK))
    return digest.hexdigest()
