"""When a signal is deferred, and what becomes of one that came late."""

import os
import signal
from collections.abc import Iterator

import pytest

from training.errors import Stopped
from training.runtime.signals import STOPPING, StopRequests

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture
def requests() -> Iterator[StopRequests]:
    """Installed in this process, whose own handlers come back."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    installed = StopRequests()
    installed.install()
    yield installed
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPPING)
def test_the_next_step_boundary_learns_of_a_signal(
    requests: StopRequests, number: signal.Signals
) -> None:
    def steps() -> None:
        assert requests.agreed() == 0
        os.kill(os.getpid(), number)
        if stop := requests.agreed():
            raise Stopped(stop, 3)

    with pytest.raises(Stopped, match="step 3, with a checkpoint") as caught, requests.deferred():
        steps()
    assert caught.value.code == 128 + number


def test_a_signal_after_the_last_step_stops_the_run_when_its_models_are_written(
    requests: StopRequests,
) -> None:
    written = []

    def write() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        written.append("model")

    with pytest.raises(Stopped, match="training; its models are written"), requests.deferred():
        write()
    assert written == ["model"]


def test_no_signal_no_stop(requests: StopRequests) -> None:
    with requests.deferred():
        pass
    assert requests.agreed() == 0
