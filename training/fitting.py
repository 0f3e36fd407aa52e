"""The training loop of the supervised stages: steps, evaluations, best weights, metrics."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from datasets import Dataset

from training.data import (
    DataSettings,
    GlobalBatches,
    Split,
    Stage,
    StageRecords,
    read_records,
    shard,
    split_rows,
    tokenize,
)
from training.errors import RunError, Stopped, UserError
from training.models.checks import check_positions
from training.models.export import InterimExports
from training.models.pretrained import Pretrained
from training.runtime.checkpoint import Checkpoints
from training.runtime.engine import TrainedModule, optimizer_step
from training.runtime.faults import dumped
from training.runtime.ranks import rank, rank_zero_first, sum_over_ranks, world_size
from training.runtime.resume import check_resumable
from training.runtime.signals import stop_requests
from training.runtime.tracking import Clock, Tracker, peak_memory, say
from training.stage_config import StageConfig, SupervisedConfig

Batch = TypeVar("Batch")


class Task(Protocol[Batch]):
    """What a stage learns. Its losses are sums over items; `fit` divides by their global number."""

    train: Dataset

    def collate(self, rows: list[int]) -> Batch:
        """Collate these rows of `train` into a micro-batch; row -1 is filler without loss."""
        ...

    def items(self, batch: Batch) -> int:
        """Count the items that carry a loss: tokens, comparisons."""
        ...

    def loss_sum(self, batch: Batch) -> torch.Tensor:
        """Sum the loss over the items of a micro-batch."""
        ...

    def evaluate(self, split: Split) -> dict[str, float]:
        """Compute metrics on all data of a split, `SPLIT/loss` included, the same on every rank."""
        ...


@dataclass
class EarlyStopping:
    """Keeps the best validation loss; `patience` evaluations without improvement end the run."""

    patience: int | None = None
    best_loss: float = math.inf
    best: dict[str, float] = field(default_factory=dict)
    worse_in_a_row: int = 0

    def improved(self, metrics: dict[str, float]) -> bool:
        """Take note of an evaluation; True if its validation loss is the best so far."""
        if metrics["validation/loss"] < self.best_loss:
            self.best_loss, self.best, self.worse_in_a_row = metrics["validation/loss"], metrics, 0
            return True
        self.worse_in_a_row += 1
        return False

    @property
    def state(self) -> dict[str, Any]:
        """The state that a resumed run needs, as JSON."""
        best_loss = self.best_loss if self.best else None
        return {"best_loss": best_loss, "best": self.best, "worse_in_a_row": self.worse_in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the `state` that a checkpoint holds, or {}."""
        if state and state["best"]:
            self.best_loss, self.best = state["best_loss"], state["best"]
            self.worse_in_a_row = state["worse_in_a_row"]

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.worse_in_a_row >= self.patience


def require_evaluation(records: StageRecords) -> None:
    """Refuse data without evaluation records: the stage could not measure its model."""
    if not records.eval:
        raise UserError(
            [*records.tally.lines(), "set data.eval_fraction above 0 or give data.eval_sources"],
            "There is nothing to evaluate on:",
        )


def announce_resume(config: StageConfig) -> None:
    """Say which settings differ from those of the checkpoint that a run resumes from.

    Raises:
        UserError: it is a checkpoint of a different run.
    """
    if changes := check_resumable(config, world_size()):
        say("\n  - ".join(["The run resumes with other settings than before:", *changes]))


def held_out_splits(data: Dataset, settings: DataSettings) -> dict[Split, Dataset]:
    """Divide held-out data into validation, which chooses, and test, which reports.

    Raises:
        UserError: it has too few prompts for both.
    """
    rows = split_rows(data["prompt"][:], settings.validation_share, settings.split_seed)
    if settings.validation_share > 0 and not all(rows.values()):
        raise UserError(
            "Only one prompt is held out, which cannot both choose the weights (validation) and "
            "report on them (test): raise data.eval_fraction or give more data.eval_sources"
        )
    return {split: data.select(part) for split, part in rows.items()}


@dataclass(frozen=True)
class StageData:
    """Token ids to learn from, and held-out ones."""

    train: Dataset
    held_out: dict[Split, Dataset]


def prepare(config: SupervisedConfig, stage: Stage) -> tuple[Pretrained, StageData]:
    """Check the initial model of a supervised stage and read its data; loads no weights.

    Raises:
        UserError: the data, the tokenizer, a length or the checkpoint is at fault.
    """
    announce_resume(config)
    records = read_records(config.data, stage)
    require_evaluation(records)
    say(str(records.tally))
    pretrained = Pretrained(
        config.model_name_or_path, config.trust_remote_code, template=config.template
    )
    check_positions(pretrained, config.data.lengths())
    with rank_zero_first():
        data = tokenize(records, pretrained.tokenizer, config.data, stage)
    say(str(data.tally))
    return pretrained, StageData(data.train, held_out_splits(data.eval, config.data))


def total_steps(config: SupervisedConfig, examples: int, processes: int | None = None) -> int:
    """Optimizer steps of a run on `processes` processes (default: this run's)."""
    batches = GlobalBatches(examples, global_batch_size(config, processes), config.seed)
    return config.max_steps or math.ceil(config.num_train_epochs * batches.steps_per_epoch)


def global_batch_size(config: SupervisedConfig, processes: int | None = None) -> int:
    """Examples in one optimizer step on `processes` processes (default: this run's)."""
    local = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return local * (processes or world_size())


def fit(
    config: SupervisedConfig,
    trained: TrainedModule,
    task: Task[Any],
    stopping: EarlyStopping,
    keep: Callable[[], None] | None = None,
    description: str = "training",
    figures: Callable[[], dict[str, float]] = dict,
    exports: InterimExports | None = None,
) -> dict[str, float]:
    """Train for the configured steps; validate every epoch, every `eval_steps`, and at the end.

    The test figures are measured on the weights that are kept only: nothing is chosen by them.

    Args:
        keep: saves the weights, after their test, whenever their validation loss is the best so
            far; None keeps the last weights.
        figures: what the task measured in the step just taken; called once a step, on every rank.
        exports: writes the weights so far every `export_steps`, whatever their validation loss.

    Returns:
        The test figures of the weights that are kept.

    Raises:
        Stopped: a signal asked the run to stop; raised after the step in which it arrived.
        RunError: a loss or a gradient is not finite.
    """
    order = GlobalBatches(len(task.train), global_batch_size(config), config.seed)
    steps = total_steps(config, len(task.train))
    checkpoints = Checkpoints(config, {"model": trained})
    first, state = checkpoints.restore()
    stopping.restore(state.get("stopping", {}))
    tested: dict[str, float] = state.get("tested", {})
    tracker = Tracker(config.output_dir, steps, description, config.deepspeed, done=first)
    clock, timed = Clock(), 0  # optimizer steps since the last line of metrics
    for step in range(first, steps):
        if stopping.exhausted:
            say(f"Stopped early: no better validation loss than {stopping.best_loss:.4f}")
            break
        rows = shard(
            order.indices(step),
            rank(),
            world_size(),
            config.per_device_train_batch_size,
            config.gradient_accumulation_steps,
        )
        micro_batches = [task.collate(part) for part in rows]
        done = step + 1

        def texts(rows: list[list[int]] = rows) -> list[list[dict[str, Any]]]:
            return texts_of(task.train, rows)

        with dumped(config.output_dir, done, texts):
            (loss,) = optimizer_step(
                [trained], micro_batches, lambda batch: [task.loss_sum(batch)], task.items, clock
            )
        timed += 1
        metrics = {
            "train/loss": loss,
            "train/epoch": done / order.steps_per_epoch,
            "train/learning_rate": trained.learning_rate,
            "train/grad_norm": trained.grad_norm,
        } | trained.loss_scaling("train")
        metrics |= figures()
        evaluated = (
            done == steps or done % order.steps_per_epoch == 0 or _is_due(done, config.eval_steps)
        )
        if evaluated:
            trained.engine.eval()
            validation = task.evaluate("validation")
            if not math.isfinite(validation["validation/loss"]):
                raise RunError(f"The validation loss after step {done} is not finite")
            metrics |= validation
            improved = stopping.improved(validation)
            if improved if keep else done == steps:
                tested = task.evaluate("test")
                metrics |= tested
                if keep:
                    keep()
        if evaluated or _is_due(done, config.logging_steps):
            metrics |= clock.read(timed) | peak_memory()
            tracker.log(done, metrics, shown=("train/loss", "validation/loss"))
            timed = 0
        tracker.advance()
        if exports:
            exports.after(done, steps)
        stop = stop_requests.agreed()
        if stop or checkpoints.is_due(done, steps):
            checkpoints.save(done, {"stopping": stopping.state, "tested": tested})
        if stop:
            tracker.close()
            raise Stopped(stop, done)
    tracker.close()
    return tested


def texts_of(data: Dataset, micro_batches: list[list[int]]) -> list[list[dict[str, Any]]]:
    """The rows of each micro-batch: prompts as text, and all token ids."""
    return [[{"row": row, **data[row]} for row in rows if row >= 0] for rows in micro_batches]


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def mean_over_ranks(total_and_count: torch.Tensor) -> float:
    """total / count of [total, count], each summed over all ranks."""
    total, count = sum_over_ranks(total_and_count).tolist()
    return float(total / max(count, 1.0))


def evaluation_batches(examples: int, batch_size: int) -> list[list[int]]:
    """This rank's micro-batches of all rows in order; every rank gets the same number."""
    order = GlobalBatches(examples, batch_size * world_size(), seed=0, shuffle=False)
    return [
        shard(order.indices(step), rank(), world_size(), batch_size, 1)[0]
        for step in range(order.steps_per_epoch)
    ]
