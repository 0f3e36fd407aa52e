"""What is kept of a step that was not taken, and how a lack of memory or disk is recognized."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed
from safetensors import SafetensorError

from training.errors import NotFiniteError, RunError
from training.runtime.faults import DISK_FULL, OUT_OF_MEMORY, dumped, remedy, require_finite
from training.runtime.resume import FREE_TO_CHANGE, MICRO_BATCH


def test_batch_is_kept_and_can_be_read_without_pickle(tmp_path: Path) -> None:
    batch = {"prompts": ("What?", "Why?"), "ids": torch.tensor([[1, 2], [3, 4]])}
    with (
        pytest.raises(RunError, match=r"Step 7 was not taken: the loss is nan(.|\n)*step-7\.pt"),
        dumped(str(tmp_path), 7, lambda: batch),
    ):
        raise NotFiniteError("the loss is nan")
    kept = torch.load(tmp_path / "debug" / "step-7.pt", weights_only=True)
    assert (kept["step"], kept["message"]) == (7, "the loss is nan")
    (own,) = kept["ranks"]
    assert own["prompts"] == ["What?", "Why?"]
    assert torch.equal(own["ids"], batch["ids"])


def test_nothing_is_kept_of_a_sound_step_or_of_other_errors(tmp_path: Path) -> None:
    with dumped(str(tmp_path), 1, dict):
        pass
    with pytest.raises(ZeroDivisionError), dumped(str(tmp_path), 2, dict):
        _ = 1 / 0
    assert not (tmp_path / "debug").exists()


@pytest.mark.usefixtures("process_group")
def test_finite_values_pass_and_others_are_counted() -> None:
    require_finite("rewards", torch.tensor([0.0, -1e30]))
    with pytest.raises(NotFiniteError, match="rewards: 2 not finite"):
        require_finite("rewards", torch.tensor([0.0, torch.nan, torch.inf]))


def test_memory_and_disk_that_do_not_suffice_are_told_from_other_faults() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)  # the CPU's own allocator refuses
    assert remedy(caught.value) == OUT_OF_MEMORY
    assert remedy(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"))
    assert remedy(MemoryError()) == OUT_OF_MEMORY
    assert remedy(RuntimeError("shape mismatch")) is None
    assert remedy(ValueError("not enough memory of the past")) is None
    with pytest.raises(OSError, match="No space left") as caught_full:
        Path("/dev/full").write_text("x")
    assert remedy(caught_full.value) == DISK_FULL
    in_rust = SafetensorError("I/O error: No space left on device (os error 28)")
    assert remedy(in_rust) == DISK_FULL


def test_a_process_that_waited_too_long_names_the_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "60")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=1))
    with pytest.raises(RuntimeError) as caught:
        store.get("what nobody sets")
    advice = remedy(caught.value)
    assert advice is not None
    assert "longer than DEEPSPEED_TIMEOUT (60 minutes)" in advice
    gloo = "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1000ms for recv operation"
    assert remedy(RuntimeError(gloo)) == advice


def test_what_the_message_says_may_change_on_resuming_may(tmp_path: Path) -> None:
    """The first list of OUT_OF_MEMORY holds settings that a resumed run accepts."""
    resumed, anew = OUT_OF_MEMORY.split("These need less too, but a new run:")
    for name in FREE_TO_CHANGE | {*MICRO_BATCH}:
        assert name not in anew.replace("deepspeed.zero", "")
    for name in ("gradient_checkpointing", "packing", "rollout_batch_size", "frozen_deepspeed"):
        assert name in resumed
        assert name in FREE_TO_CHANGE
    assert set(MICRO_BATCH) <= set(resumed.replace("=", " ").replace(",", " ").split())
