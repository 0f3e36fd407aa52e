"""Exports of trained models as Hugging Face directories, at the end of a run and on its way."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import deepspeed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training.errors import RunError
from training.models.lora import merged_state
from training.models.partitioned import is_partitioned
from training.runtime.disk import draft_of, is_disk_full, publish, remove_draft
from training.runtime.model_card import Card, write_card
from training.runtime.ranks import barrier, rank
from training.runtime.tracking import say
from training.stage_config import StageConfig


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write `model` and `tokenizer` as safetensors that `from_pretrained` loads.

    An adapter is merged into the written weights; `model` itself keeps it. Every rank must call
    this; rank 0 writes. The directory appears complete or not at all.

    Raises:
        RunError: the disk is full; the message says where the model was written instead.
    """
    parameters = list(model.parameters()) if is_partitioned(model) else []
    with deepspeed.zero.GatheredParameters(parameters, enabled=bool(parameters)):
        if rank() == 0:
            state = merged_state(model)

            def write(place: Path) -> None:
                draft = draft_of(place)
                model.save_pretrained(draft, state_dict=state, safe_serialization=True)
                tokenizer.save_pretrained(draft)
                publish(draft, place)

            write_where_there_is_room(write, directory)
    barrier()


class InterimExports:
    """`output_dir/exports/step-N/NAME`, a Hugging Face directory for each of the trained models.

    They are complete or absent. A resumed run writes those again whose steps it takes again. The
    weights after the last step are the run's own export.
    """

    def __init__(
        self, config: StageConfig, write: Mapping[str, Callable[[Path], None]], card: Card
    ) -> None:
        """
        Args:
            write: how to export each model into a directory; every rank calls it.
            card: what the card of the run's own export says.
        """
        self.every = config.export_steps
        self.directory = Path(config.output_dir) / "exports"
        self.write = write
        self.card = card

    def after(self, step: int, steps: int) -> None:
        """Export if it is time to, after `step` of `steps`."""
        if not self.every or step % self.every or step == steps:
            return
        card = replace(
            self.card,
            title=f"{self.card.title}, step {step}",
            evaluated_on=f"None: these are the weights after {step} of {steps} steps.",
            figures=(),
        )
        place = self.directory / f"step-{step:08d}"
        for name, write in self.write.items():
            write(place / name)
            write_card(place / name, card)
        say(f"Exported after step {step}: {place}")


def write_where_there_is_room(write: Callable[[Path], None], directory: Path) -> None:
    """Call `write(directory)` or, if the disk is full, `write` a place on another disk.

    Weights may be all that is left of days of training, and a run need not have checkpoints.

    Raises:
        RunError: the disk is full; the message says where the model is now, if it is anywhere.
    """
    try:
        write(directory)
        return
    except Exception as error:  # of safetensors' own class, too
        if not is_disk_full(error):
            raise
        remove_draft(directory)
        full = error
    tried = []
    for spare in spare_places(directory):
        place = spare / f"saved-{directory.parent.name}-{directory.name}-{os.getpid()}"
        try:
            write(place)
        except Exception as error:
            tried.append(f"{spare} ({error})")
            remove_draft(place)
            continue
        raise RunError(
            f"The disk of {directory} is full. The model was written to {place} instead: make room "
            f"and move it to {directory}. What the run would have done after that is missing.",
            everywhere=False,
        ) from full
    raise RunError(
        f"The disk of {directory} is full, and so are {', '.join(tried) or 'all others'}: the "
        "model could not be written. Make room and, if the run has a checkpoint, resume with "
        "resume_from_checkpoint=latest",
        everywhere=False,
    ) from full


def spare_places(directory: Path) -> list[Path]:
    """Directories on other disks than `directory`, the one with most room first."""
    usual = (os.getcwd(), Path.home(), tempfile.gettempdir(), "/var/tmp", "/dev/shm")
    parent = next(place for place in directory.absolute().parents if place.exists())
    by_disk = {parent.stat().st_dev: parent}
    for place in (Path(name) for name in usual):
        if place.is_dir() and os.access(place, os.W_OK):
            by_disk.setdefault(place.stat().st_dev, place)
    others = list(by_disk.values())[1:]
    return sorted(others, key=lambda place: shutil.disk_usage(place).free, reverse=True)
