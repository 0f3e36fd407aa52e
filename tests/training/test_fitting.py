"""The supervised loop: when it evaluates, what it keeps, when it stops, what it writes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from step1_sft.config import SFTConfig
from training import fitting
from training.config import check_config
from training.data import FILLER, Split, StageRecords
from training.data.tally import Tally
from training.errors import RunError, UserError
from training.fitting import EarlyStopping, fit
from training.runtime.engine import TrainedModule
from training.runtime.tracking import Tracker

pytestmark = pytest.mark.usefixtures("process_group")


class Numbers:
    """Learns w from ten rows that are their own targets; its evaluation losses are given."""

    def __init__(self, trained: TrainedModule, losses: list[float]) -> None:
        self.trained = trained
        self.losses = iter(losses)
        self.seen: list[int] = []
        self.train = Dataset.from_dict({"target": list(range(10))})

    def collate(self, rows: list[int]) -> torch.Tensor:
        self.seen += rows
        return torch.tensor([float(row) for row in rows if row != FILLER])

    def items(self, batch: torch.Tensor) -> int:
        return len(batch)

    def loss_sum(self, batch: torch.Tensor) -> torch.Tensor:
        return 0.5 * ((self.trained(torch.ones(1, 1)).squeeze() - batch) ** 2).sum()

    def evaluate(self, split: Split) -> dict[str, float]:
        """The test's loss is that of the validation that came before it, plus ten."""
        if split == "validation":
            self.last = next(self.losses)
            return {"validation/loss": self.last}
        return {"test/loss": self.last + 10}


@pytest.fixture
def fitted(stage_settings):
    """Runs `fit` on 10 rows in batches of 4, three steps an epoch."""

    def run(losses: list[float], patience: int | None = None, **changes: Any):
        settings = stage_settings("sft")
        del settings["max_steps"]
        config = check_config(SFTConfig, settings | changes, "config:")
        Path(config.output_dir).mkdir()
        steps = fitting.total_steps(config, examples=10)
        trained = TrainedModule(nn.Linear(1, 1, bias=False), config, config, steps)
        task, stopping = Numbers(trained, losses), EarlyStopping(patience)
        saved: list[float] = []
        final = fit(config, trained, task, stopping, lambda: saved.append(task.last))
        lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
        return task, stopping, saved, final, [json.loads(line) for line in lines]

    return run


def test_every_epoch_sees_every_row_once_and_ends_with_an_evaluation(fitted) -> None:
    task, _, saved, final, lines = fitted([2.0, 1.0], num_train_epochs=2.0)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for epoch in (task.seen[:12], task.seen[12:]):
        assert sorted(epoch) == [FILLER, FILLER, *range(10)]
    assert [line.get("validation/loss") for line in lines] == [None, None, 2.0, None, None, 1.0]
    assert lines[2]["train/epoch"] == 1.0
    assert saved == [2.0, 1.0]
    assert final == {"test/loss": 11.0}


def test_evaluation_every_so_many_steps_and_at_the_end(fitted) -> None:
    _, _, _, _, lines = fitted([5.0, 4.0, 3.0, 2.0], max_steps=5, eval_steps=2, logging_steps=100)
    assert [(line["step"], line["validation/loss"]) for line in lines] == [
        (2, 5.0),
        (3, 4.0),  # the epoch's end
        (4, 3.0),
        (5, 2.0),
    ]


def test_only_the_best_weights_are_saved_and_patience_ends_the_run(fitted) -> None:
    _, stopping, saved, final, lines = fitted(
        [3.0, 1.0, 2.0, 1.5, 0.0], patience=2, num_train_epochs=9.0
    )
    assert saved == [3.0, 1.0]
    assert stopping.best == {"validation/loss": 1.0}
    assert lines[-1]["step"] == 12  # 5 evaluations were there; the fifth was never asked for
    # The test is measured on the weights that are kept, and on no others.
    assert [line["test/loss"] for line in lines if "test/loss" in line] == [13.0, 11.0]
    assert final == {"test/loss": 11.0}


def test_an_evaluation_that_is_no_number_ends_the_run(fitted) -> None:
    with pytest.raises(RunError, match="validation loss after step 6 is not finite"):
        fitted([3.0, math.nan], patience=2, num_train_epochs=9.0)


def test_an_evaluation_that_is_better_resets_the_patience() -> None:
    stopping = EarlyStopping(patience=2)
    assert [stopping.improved({"validation/loss": x}) for x in (3.0, 4.0, 2.0, 2.0)] == [
        True, False, True, False,
    ]  # fmt: skip
    assert not stopping.exhausted
    stopping.improved({"validation/loss": 2.5})
    assert stopping.exhausted


def test_the_training_loss_is_a_mean_over_rows(fitted) -> None:
    task, _, _, _, lines = fitted([1.0], max_steps=1, learning_rate=1e-9)
    rows = torch.tensor(task.seen[:4], dtype=torch.float64)
    w = task.trained.module.weight.item()
    assert lines[0]["train/loss"] == pytest.approx(0.5 * ((w - rows) ** 2).mean().item(), rel=1e-5)
    assert {"seconds", "train/learning_rate", "train/grad_norm"} <= lines[0].keys()


def test_steps_of_a_run(stage_settings) -> None:
    def steps(**changes: Any) -> int:
        settings = stage_settings("sft")
        del settings["max_steps"]
        return fitting.total_steps(check_config(SFTConfig, settings | changes, "c:"), examples=10)

    assert steps(num_train_epochs=1.0) == 3  # batches of 4, 4 and 2
    assert steps(num_train_epochs=1.5) == 5
    assert steps(num_train_epochs=1.0, gradient_accumulation_steps=2) == 2
    assert steps(max_steps=7, num_train_epochs=1.0) == 7


def test_nothing_held_out_is_refused() -> None:
    tally = Tally()
    tally.add("texts.jsonl", "read", 3)
    with pytest.raises(UserError, match=r"texts.jsonl: 3 read"):
        fitting.require_evaluation(StageRecords([], [], tally))


def test_evaluation_batches_cover_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fitting.evaluation_batches(5, 2) == [[0, 1], [2, 3], [4, FILLER]]
    monkeypatch.setattr(fitting, "world_size", lambda: 2)
    both = []
    for rank in range(2):
        monkeypatch.setattr(fitting, "rank", lambda rank=rank: rank)
        both.append(fitting.evaluation_batches(5, 2))
    assert len(both[0]) == len(both[1])
    rows = [row for part in both for batch in part for row in batch if row != FILLER]
    assert sorted(rows) == [0, 1, 2, 3, 4]


def test_metrics_are_one_json_object_a_line(tmp_path: Path) -> None:
    tracker = Tracker(str(tmp_path), 2, "test", {})
    tracker.log(1, {"objective/kl": 0.5, "bad": math.inf})
    tracker.log(2, {"objective/kl": 0.25})
    tracker.close()
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (first["step"], first["objective/kl"], first["bad"]) == (1, 0.5, None)
    assert second["seconds"] >= first["seconds"] >= 0


def test_metrics_reach_deepspeeds_monitor(tmp_path: Path) -> None:
    section = {"csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}}
    tracker = Tracker(str(tmp_path), 1, "test", section)
    tracker.log(3, {"objective/kl": 0.5})
    tracker.close()
    (file,) = (tmp_path / "job").glob("*kl*.csv")
    assert file.read_text().splitlines()[-1] == "3,0.5"
