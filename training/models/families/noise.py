"""Models whose passes in training mode are those of evaluation."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from training.runtime.random_states import random_states, set_random_states


class Quiet(nn.Module):
    """A module that can be told to compute the same in training mode as in evaluation mode."""

    model: PreTrainedModel
    noiseless = False
    """Some families have noise of their own in training, on routers of experts for example. Where
    this is true it is off, whatever it is called. Only what recomputes activations is told of the
    training mode."""

    def train(self, mode: bool = True) -> "Quiet":
        super().train(mode)
        if self.noiseless:
            for module in self.modules():
                if module is not self and not hasattr(module, "gradient_checkpointing"):
                    module.training = False
        return self


def drawn_so_far() -> tuple[bytes, tuple[Any, ...]]:
    """Differs where a random number has been drawn in between."""
    return torch.get_rng_state().numpy().tobytes(), random.getstate()


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Afterwards every part is in the mode in which it was, and so is every random generator."""
    modes = [(part, part.training) for part in module.modules()]
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)
        for part, training in modes:
            part.training = training
