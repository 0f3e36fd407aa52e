"""Checkpoints are there whole or not at all."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from step1_sft.config import SFTConfig
from training.config import check_config
from training.errors import RunError
from training.models.policy import Policy
from training.runtime import engine
from training.runtime.checkpoint import Checkpoints
from training.runtime.resume import complete_checkpoints

pytestmark = pytest.mark.usefixtures("process_group")


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Real writes fail beyond `size` bytes, as they do on a full disk."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one_usable(
    stage_settings: Callable[[str], dict[str, Any]], tiny_llama: PreTrainedModel
) -> None:
    settings = stage_settings("sft") | {"save_total_limit": 1}
    config = check_config(SFTConfig, settings, "config:")
    trained = engine.TrainedModule(Policy(tiny_llama), config, config, 10)
    checkpoints = Checkpoints(config, {"model": trained})
    checkpoints.save(1, {"of": "step 1"})
    (checkpoints.directory.parent / "config.json").write_text("{}")
    own = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    with torch.no_grad():
        tiny_llama.lm_head.weight.zero_()

    with (
        no_file_larger_than(4096),
        pytest.raises(RunError, match=r"step 2 could not be written(.|\n)*step-00000001"),
    ):
        checkpoints.save(2, {"of": "step 2"})
    assert [path.name for path in checkpoints.directory.iterdir()] == ["step-00000001"]

    resumed = check_config(SFTConfig, settings | {"resume_from_checkpoint": "latest"}, "config:")
    assert Checkpoints(resumed, {"model": trained}).restore() == (1, {"of": "step 1"})
    restored = trained.module.model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in restored.items())


def test_leftovers_of_a_killed_save_are_cleared(
    stage_settings: Callable[[str], dict[str, Any]], tiny_llama: PreTrainedModel
) -> None:
    config = check_config(SFTConfig, stage_settings("sft"), "config:")
    trained = engine.TrainedModule(Policy(tiny_llama), config, config, 10)
    checkpoints = Checkpoints(config, {"model": trained})
    for leftover in ("step-00000001.unfinished", "step-00000002.removed"):
        (checkpoints.directory / leftover / "model").mkdir(parents=True)
    checkpoints.save(3, {})
    assert complete_checkpoints(checkpoints.directory) == [checkpoints.directory / "step-00000003"]
    assert [path.name for path in checkpoints.directory.iterdir()] == ["step-00000003"]
