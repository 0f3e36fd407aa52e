"""What an iteration would take if the machine did nothing but the arithmetic that it must do."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from training.runtime.ranks import device

BYTES_READ = 2**28
"""Read from memory to measure its bandwidth; more than the caches hold."""
REPETITIONS = 20


@dataclass(frozen=True)
class Work:
    """Of one PPO iteration: one epoch, one mini-batch, no activations computed twice.

    body, head   parameters in matrix products of the decoder, and of the head over the vocabulary
    prompt       tokens of all prompts
    response     tokens of all responses
    attended     Σ over sequences of length², for the products of attention
    width        layers × heads × head size
    """

    body: int
    head: int
    prompt: int
    response: int
    attended: int
    width: int

    def flops(self) -> float:
        """2 per parameter and token, and for attention 2 · 2 · length²/2 · width, forward.

        The decoder runs 9 times over prompt and response: rollout, reward, reference, and three
        each (forward, backward to inputs and to weights) for actor and critic. The head runs 5
        times over the response: rollout, reference, and three for the actor.
        """
        tokens = self.prompt + self.response
        decoder = 2 * self.body * tokens + 2 * self.attended * self.width
        return 9.0 * decoder + 5.0 * 2 * self.head * self.response

    def decoding_bytes(self, steps: int, bytes_per_parameter: int) -> float:
        """Weights that are read in `steps` decode steps, each of all rows together."""
        return float(steps * (self.body + self.head) * bytes_per_parameter)


def matmul_rate(rows: int, inner: int, outer: int, dtype: torch.dtype) -> float:
    """FLOP/s of [rows, inner] times [inner, outer] on this machine, the median of 20."""
    left = torch.randn(rows, inner, device=device()).to(dtype)
    right = torch.randn(outer, inner, device=device()).to(dtype)
    return 2 * rows * inner * outer / _median(lambda: torch.nn.functional.linear(left, right))


def read_rate() -> float:
    """Bytes per second that a sum over a large tensor reads, the median of 20."""
    values = torch.ones(BYTES_READ // 4, device=device())
    return BYTES_READ / _median(lambda: values.sum())


def _median(compute: Callable[[], object]) -> float:
    def synchronize() -> None:
        if device().type == "cuda":
            torch.cuda.synchronize()

    seconds = []
    with torch.no_grad():
        compute()
        for _ in range(REPETITIONS):
            synchronize()
            start = time.perf_counter()
            compute()
            synchronize()
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
