"""The cells of a sweep: which there are, their settings, and how far each one is.

A sweep's directory:

    sweep.json                    the grid
    reference/                    the reference itself, only measured: Figure 3 or 4
    beta-1.0/conditional_pm-0.3/  a stage-3 run; also beta-1.0/kl and, for Figure 1, beta-1.0/pm
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from step3_rlhf.config import EvaluationConfig, PPOConfig
from step3_rlhf.paper.grid.paper_models import DEFAULT, PAPER_MODELS
from training.errors import UserError

RECORD = "sweep.json"


SETTINGS = "settings.json"
"""What the reference was measured with, in its directory; a trained cell has a config.json."""


@dataclass(frozen=True)
class Cell:
    """One policy of the sweep."""

    kind: str
    """`conditional_pm`, `kl`, `pm`, or `reference`, which is not trained."""
    beta: float
    """The regularizer's weight; of the reference, the temperature that it is measured at."""
    alpha: float | None = None
    """Conditional PM's threshold: a probability or, below 0, its logarithm in nats."""

    @property
    def name(self) -> str:
        """Its directory within the sweep's."""
        if self.kind == "reference":
            return self.kind
        return f"beta-{self.beta}/{self.kind}" + ("" if self.alpha is None else f"-{self.alpha}")


@dataclass(frozen=True)
class Grid:
    """α × β, KL beside every α."""

    model: str
    """The policy that every cell starts from: a path or a Hub name."""
    alphas: tuple[float, ...]
    betas: tuple[float, ...]
    without_pm: bool = False
    """Leave out unconditional PM, a cell that only Figure 1 needs."""
    name: str = ""
    """The model's name in captions; empty where it is to be found from `model`."""
    paper_model: str = DEFAULT
    """The model of the paper whose numbers tables and figures have."""

    @property
    def main_beta(self) -> float:
        """β of Figures 1, 3 and 4: 1, which the theory is about, or the largest there is."""
        return 1.0 if 1.0 in self.betas else max(self.betas)

    @property
    def reference(self) -> Cell:
        return Cell("reference", self.main_beta)

    @property
    def pm(self) -> Cell:
        return Cell("pm", self.main_beta)

    def row(self, beta: float) -> list[Cell]:
        """The table's rows of one β: rising α, then KL."""
        return [*(Cell("conditional_pm", beta, alpha) for alpha in self.alphas), Cell("kl", beta)]

    def cells(self) -> list[Cell]:
        """All cells in the order in which they run: the quickest to fail comes first."""
        rows = [cell for beta in self.betas for cell in self.row(beta)]
        return [self.reference, *rows, *([] if self.without_pm else [self.pm])]

    def write(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / RECORD).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, directory: Path) -> "Grid":
        try:
            data = json.loads((directory / RECORD).read_text())
            grid = cls(**data)
            if grid.paper_model not in PAPER_MODELS:
                raise ValueError(f"paper_model: {grid.paper_model!r} is not a model of the paper")
            return replace(grid, alphas=tuple(grid.alphas), betas=tuple(grid.betas))
        except OSError:
            raise UserError(f"{directory} holds no {RECORD}, so it is no sweep") from None
        except (ValueError, TypeError) as error:
            raise UserError(f"{directory / RECORD}: {error}") from None


def regularizer_of(cell: Cell, given: Mapping[str, Any]) -> dict[str, Any]:
    """The cell's regularizer; conditional PM keeps the level, the ε and the classes of the config.

    Args:
        given: the config's own regularizer, of any kind.

    Raises:
        UserError: the config's threshold is a logarithm, and the cell's a probability.
    """
    if cell.kind != "conditional_pm":
        return {"name": "kl" if cell.kind == "reference" else cell.kind, "beta": cell.beta}
    assert cell.alpha is not None
    threshold = "log_alpha" if cell.alpha < 0 else "alpha"
    kept: dict[str, Any] = {}
    if given.get("name") == "conditional_pm":
        parameters = ("level", "epsilon", "log_epsilon", "classes")
        kept = {name: given[name] for name in parameters if name in given}
        if given.get("alpha_per_token") is not None:
            threshold = "alpha_per_token"
        if given.get("log_alpha") is not None and threshold != "log_alpha":
            raise UserError(
                "--alphas: the config's threshold is log_alpha, so the sweep's are logarithms in "
                "nats, below 0, as in --alphas=-60,-30"
            )
    return {"name": "conditional_pm", **kept, threshold: cell.alpha, "beta": cell.beta}


class State(Enum):
    """How far a cell is."""

    FINISHED = "finished earlier"
    TRAINED = "trained earlier; its evaluation goes on"
    STOPPED = "goes on from its latest checkpoint"
    NEW = "starts"


def state_of(directory: Path) -> State:
    """What the cell's directory says."""
    from training.runtime.resume import complete_checkpoints

    if is_finished(directory):
        return State.FINISHED
    if all((directory / name).is_dir() for name in ("actor", "critic")):
        return State.TRAINED
    return State.STOPPED if complete_checkpoints(directory / "checkpoints") else State.NEW


def is_finished(directory: Path) -> bool:
    """Whether the evaluation, a cell's last step, has been written to the end."""
    try:
        report = json.loads((directory / "evaluation.json").read_text())
        # Not splitlines: a response may hold characters at which that would break a line.
        *lines, rest = (directory / "instances.jsonl").read_text(encoding="utf-8").split("\n")
        whole = len(lines) == report["prompts"] and not rest
        return whole and isinstance(json.loads(lines[-1]), dict)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def changed_settings(settings: PPOConfig | EvaluationConfig, record: Path) -> list[str]:
    """Names of the settings that differ from those that the cell was made with."""
    from training.config import absolute_paths
    from training.runtime.resume import NO_EFFECT

    try:
        then = type(settings).model_validate_json(record.read_text()).model_dump(mode="json")
    except OSError:
        return [f"{record.name}, which is missing"]
    except ValidationError as error:
        return [".".join(map(str, detail["loc"])) for detail in error.errors()]
    then, now = absolute_paths(then), absolute_paths(settings.model_dump(mode="json"))
    return [name for name in now if name not in NO_EFFECT and now[name] != then[name]]
