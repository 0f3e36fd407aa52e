"""The `"data"` section of a stage's JSON."""

import re
from glob import glob
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from training.config import Count, Fraction, NonNegative, PathText, StrictModel
from training.data.fields import FIELDS
from training.errors import did_you_mean

Stage = Literal["sft", "reward", "ppo"]
STAGES: tuple[Stage, ...] = ("sft", "reward", "ppo")

Split = Literal["validation", "test"]
"""Held-out data: `validation` chooses, by which weights are kept; `test` reports."""

SourceFormat = Literal[
    "auto",
    "preference",
    "transcript",
    "ranking",
    "completions",
    "scored",
    "completion",
    "kto",
    "instruction",
    "messages",
    "conversations",
    "tldr_comparison",
    "tldr_post",
]
TrainOn = Literal["all", "last"]

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
LOCAL_SUFFIXES = (*TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES), ".parquet")

_SLICE = r"train(\[-?\d*%?:-?\d*%?\])?"
_LOCAL_SPLIT = re.compile(rf"{_SLICE}(\+{_SLICE})*")


class Source(StrictModel):
    """One data set. In JSON, a plain string stands for `{"path": ...}`."""

    path: PathText
    """Hub name; JSON, JSONL, CSV, TSV (also .gz) or Parquet file, or a pattern such as
    data/*.jsonl; or directory of a data set, also of one that was saved with save_to_disk."""
    name: str | None = None
    """Configuration of a Hub data set that has several; null is its only one."""
    data_dir: str | None = None
    """Folder of a Hub data set that has several; null is its only one."""
    split: str = "train"
    """Split of a Hub data set, or a part of it, such as train[:10%]; a local file is one split,
    train."""
    format: SourceFormat = "auto"
    """How a record is read; auto decides record by record, from the names of its fields."""
    weight: NonNegative = 1.0
    """How often a training record is used: 0.5 is a random half, 2 is every record twice."""
    field_map: dict[str, str] = Field(default_factory=dict)
    """The data set's own names of fields, by the names that the formats give them:
    {"prompt": "question"}."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, data: Any) -> Any:
        return {"path": data} if isinstance(data, str) else data

    @property
    def is_local(self) -> bool:
        """Whether the path can only be, or is, one of this machine's."""
        path = Path(self.path)
        return (
            self.path.lower().endswith(LOCAL_SUFFIXES)
            or self.is_pattern
            or path.exists()
            or path.is_absolute()
            or self.path.startswith(".")
            or len(path.parts) > 2
        )

    @property
    def is_pattern(self) -> bool:
        """Whether the path stands for all files that match it."""
        return any(sign in self.path for sign in "*?[") and not Path(self.path).exists()

    @property
    def files(self) -> list[str]:
        """The local files that the path names, in the order of their names."""
        if self.is_pattern:
            found = sorted(glob(self.path, recursive=True))
            return [name for name in found if name.lower().endswith(LOCAL_SUFFIXES)]
        return [self.path] if Path(self.path).is_file() else []

    @property
    def label(self) -> str:
        """What reports call it: a file's path, or a data set with its name, folder and split."""
        if self.is_local and (self.is_pattern or self.path.lower().endswith(LOCAL_SUFFIXES)):
            return self.path if self.split == "train" else f"{self.path}[{self.split}]"
        parts = [part for part in (self.name, self.data_dir) if part]
        return f"{self.path}[{':'.join([*parts, self.split])}]"

    def faults(self) -> list[str]:
        found = [
            f"field_map: no format has a field {name!r}{did_you_mean(name, FIELDS)}"
            for name in self.field_map
            if name not in FIELDS
        ]
        return found + (self._file_faults() if self.is_local else [])

    def _file_faults(self) -> list[str]:
        path = Path(self.path)
        if self.is_pattern:
            if not self.files:
                return [f"path: {self.path} matches no file of {', '.join(LOCAL_SUFFIXES)}"]
        elif not path.exists():
            return [f"path: {self.path} does not exist"]
        elif path.is_dir():
            return []
        found = []
        if not self.is_pattern and not self.path.lower().endswith(LOCAL_SUFFIXES):
            found.append(f"path: {self.path} is none of {', '.join(LOCAL_SUFFIXES)}")
        for field in ("name", "data_dir"):
            if getattr(self, field) is not None:
                found.append(f"{field}: {self.path} is a local file and has none")
        if not _LOCAL_SPLIT.fullmatch(self.split):
            found.append(
                f"split: {self.path} is a local file and has no split {self.split!r}; write train, "
                "or a part of it such as train[:10%]"
            )
        return found


class DataSettings(StrictModel):
    """Which records a stage sees, and how long they may be."""

    # A JSON array reaches the validator as a list: tuple fields take either.
    sources: Annotated[tuple[Source, ...], Field(strict=False, examples=[["owner/dataset"]])]
    """Training data. A plain text stands for {"path": …}."""
    eval_sources: Annotated[tuple[Source, ...], Field(strict=False)] = ()
    """Evaluation data, whose prompts are left out of training; with none, eval_fraction of the
    stage's prompts is held out."""
    stage_proportions: Annotated[tuple[Fraction, Fraction, Fraction], Field(strict=False)] = (
        0.2,
        0.4,
        0.4,
    )
    """Shares of the prompts for sft, reward and ppo; disjoint, and the same in every stage."""
    split_seed: int = 42
    """Seed of the partition; the same in all stages, or their data overlap."""
    eval_fraction: Fraction = 0.05
    """Share of the stage's prompts that is held out where there are no eval_sources."""
    validation_share: Fraction = 0.5
    """Share of the held-out prompts that is for validation, which chooses the weights that are
    kept; the others are the test, whose figures are reported. 0 is none, in stage 3 only."""
    max_prompt_length: Count = 256
    """Tokens of a prompt, the template's included."""
    max_response_length: Count = 256
    """Tokens of a response, its EOS included; what is longer is cut off and then has no EOS."""
    max_length: Count | None = None
    """Tokens of prompt and response together, to which responses are cut too; null is no limit."""
    overlong_prompts: Literal["truncate", "drop"] = "truncate"
    """Whether longer prompts lose their oldest turns, and then the beginning of what is left, or
    are left out."""
    train_on: TrainOn = "all"
    """Which of the assistant's turns SFT learns in the formats messages and conversations: "all",
    or the "last" one."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """Whether a record with a fault ends the run, or is left out and reported."""
    max_train_samples: Count | None = None
    """Records to train on, chosen at random; null uses all."""
    max_eval_samples: Count | None = None
    """Records to evaluate on, chosen at random; null uses all."""
    cache_dir: PathText | None = None
    """Where token ids are cached; null is a folder of the Hugging Face data sets cache."""

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its longest response."""
        both = self.max_prompt_length + self.max_response_length
        return both if self.max_length is None else min(both, self.max_length)

    def lengths(self) -> dict[str, int]:
        """The longest sequence in tokens, under the names of what allows it."""
        both = self.max_prompt_length + self.max_response_length
        name = "data.max_prompt_length + data.max_response_length"
        return {name if self.longest == both else "data.max_length": self.longest}

    def faults(self) -> list[str]:
        found = super().faults()
        total = sum(self.stage_proportions)
        if abs(total - 1) > 1e-6:
            found.append(f"stage_proportions: they sum to {total:g}, not to 1")
        if not self.sources:
            found.append("sources: name at least one")
        elif all(source.weight == 0 for source in self.sources):
            found.append("sources: every weight is 0")
        if self.max_length is not None and self.max_length <= self.max_prompt_length:
            found.append(
                f"max_length: {self.max_length} leaves no room for a response after a prompt of "
                f"max_prompt_length, {self.max_prompt_length}"
            )
        if not self.eval_sources and self.eval_fraction == 1:
            found.append("eval_fraction: 1 leaves nothing to train on")
        if self.validation_share == 1:
            found.append("validation_share: 1 leaves nothing to report on")
        return found
