"""Whether a model's weights are still those that something was measured on."""

import hashlib
from pathlib import Path

PARTS, CHUNK = 256, 2**16
"""Parts of each file that are read, from its beginning to its end, and the bytes of each: also an
adapter that changes one matrix of every layer, some per cent of all, changes several of them."""


def weights_digest(model: Path) -> str | None:
    """A hash of a model's files, of their sizes and of parts all over them; None if it is not here.

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
            for number in range(PARTS):
                file.seek(max(0, size - CHUNK) * number // (PARTS - 1))
                digest.update(file.read(CHUNK))
    return digest.hexdigest()
