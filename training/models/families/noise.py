"""Switches off the noise that some families add in training mode."""

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
    """True switches off whatever noise a family adds in training mode, such as that of routers of
    experts. Only the modules that recompute activations then learn of the training mode."""

    def train(self, mode: bool = True) -> "Quiet":
        super().train(mode)
        if self.noiseless:
            for module in self.modules():
                if module is not self and not hasattr(module, "gradient_checkpointing"):
                    module.training = False
        return self


def drawn_so_far() -> tuple[bytes, tuple[Any, ...]]:
    """A state that changes whenever a random number is drawn."""
    return torch.get_rng_state().numpy().tobytes(), random.getstate()


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Restore every part's mode and every random generator afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)
        for part, training in modes:
            part.training = training
