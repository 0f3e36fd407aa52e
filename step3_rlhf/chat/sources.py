"""The models that a command line names: what is loaded for each, and what to call it.

Nothing here imports torch, so that a wrong path is reported at once.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.stage_config import model_path_faults

FOLDERS = {"actor": "the actor of a run of stage 3", "model": "the model of a run of stage 1"}
"""Where a run's policy lies, and what it is; a run with both is one of stage 3."""

SAY_NOTHING = {*FOLDERS, "actor_ema"}
"""Names of folders that every run has: a short name needs one part more."""


@dataclass(frozen=True)
class Source:
    """A model to talk to."""

    path: str
    """The directory, GGUF file or Hub name that is loaded."""
    name: str
    """Short, and different from the other models' names."""
    origin: str
    """What was found at the place that the user named."""

    def __str__(self) -> str:
        name = "" if self.name == self.path else f"{self.name}: "
        return name + self.path + (f" ({self.origin})" if self.origin else "")


def sources_of(named: Sequence[str]) -> list[Source]:
    """Find the model at each of the given places.

    Args:
        named: directories of models or of runs, GGUF files, or Hub names.

    Raises:
        UserError: with every place that has no policy.
    """
    try:
        found = [_policy_at(place) for place in named]
    except OSError as error:
        raise UserError(f"MODEL: {error.filename}: {error.strerror}") from None
    faults = [fault for place, (path, _) in zip(named, found, strict=True)
              for fault in _faults(place, path)]  # fmt: skip
    absolute = [str(Path(path).resolve()) for path, _ in found]
    twice = {p for p, whole in zip(named, absolute, strict=True) if absolute.count(whole) > 1}
    if twice:
        faults.append(f"MODEL: {' and '.join(sorted(twice))}: one model, named twice")
    if faults:
        raise UserError(faults)
    names = short_names([_parts(place) for place in named])
    return [Source(path, name, origin) for (path, origin), name in zip(found, names, strict=True)]


def _policy_at(place: str) -> tuple[str, str]:
    """The model's path and what it is; of a run's directory the policy that it wrote."""
    if "model_type" not in _config(Path(place)):
        for folder, origin in FOLDERS.items():
            if (Path(place) / folder / "config.json").is_file():
                return str(Path(place) / folder), origin
    return place, ""


def _faults(place: str, path: str) -> list[str]:
    """Why the model at `path`, which was found at `place`, cannot answer."""
    directory = Path(path)
    if directory.is_dir():
        config = _config(directory)
        if any("SequenceClassification" in str(name) for name in config.get("architectures") or []):
            return [f"MODEL: {path} is a reward model: it scores answers and writes none"]
        if "model_type" not in config:
            known = ", ".join(f"{folder}/" for folder in FOLDERS)
            return [
                f"MODEL: {place} is neither a model's directory (its config.json would name a "
                f"model_type) nor a finished run (it has none of {known})"
            ]
    elif not directory.exists() and len(directory.parts) == 2 and directory.parent.is_dir():
        return [f"MODEL: {place} does not exist"]  # a path, though it could be a Hub name
    return model_path_faults("MODEL", path)


def _config(directory: Path) -> dict[str, Any]:
    """The directory's config.json; {} if there is none, or none that can be read."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _parts(place: str) -> tuple[str, ...]:
    """Parts of an absolute path; of a Hub name, its own."""
    path = Path(place)
    return path.resolve().parts if path.exists() else path.parts


def short_names(places: Sequence[tuple[str, ...]]) -> list[str]:
    """The last parts of each place, as few as tell it from the others.

    Before a name that says nothing stands at least one other part.

    Args:
        places: the parts of each path, no two of them equal.
    """
    names = []
    for place in places:
        count = 2 if place[-1] in SAY_NOTHING else 1
        others = [other for other in places if other != place]
        while count < len(place) and place[-count:] in [other[-count:] for other in others]:
            count += 1
        names.append("/".join(place[-count:]))
    return names
