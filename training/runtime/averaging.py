"""The exponential moving average of a trained model's weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn


class AveragedWeights:
    """θ̄ ← d·θ̄ + (1 − d)·θ after each optimizer step, in float32 (Polyak averaging).

    Where ZeRO-3 partitions the weights, each rank averages its own part. Weights that are not
    trained are not averaged: with LoRA, only the adapter is.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        """
        Args:
            module: the trained module, once DeepSpeed has taken it over.
            decay: d, from 0 (the last weights) to 1 (the first ones).
        """
        self.decay = decay
        self._trained: dict[str, Any] = {
            name: value for name, value in module.named_parameters() if value.requires_grad
        }
        with torch.no_grad():
            self.averages = {
                name: _own_part(value).detach().float().clone()
                for name, value in self._trained.items()
            }

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as an optimizer step left them."""
        for name, value in self._trained.items():
            average = self.averages[name]
            average.lerp_(_own_part(value).to(average), 1.0 - self.decay)

    @property
    def is_partitioned(self) -> bool:
        """Whether each rank has a part of the averages and not all of them."""
        return any(hasattr(value, "ds_id") for value in self._trained.values())

    def load(self, averages: dict[str, Tensor]) -> None:
        """Continue from the averages of a checkpoint.

        Raises:
            ValueError: they are those of another model or of another division over ranks.
        """
        shapes = {name: value.shape for name, value in averages.items()}
        if shapes != {name: value.shape for name, value in self.averages.items()}:
            raise ValueError("the averages in the checkpoint are not those of this model")
        for name, value in averages.items():
            self.averages[name].copy_(value)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The module has the averaged weights until the context ends."""
        kept = {}
        with torch.no_grad():
            for name, value in self._trained.items():
                if getattr(value, "ds_status", None) is ZeroParamStatus.AVAILABLE:
                    value.partition()  # small weights stay whole; they are gathered when needed
                own = _own_part(value)
                kept[name] = own.clone()
                own.copy_(self.averages[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in self._trained.items():
                    _own_part(value).copy_(kept[name])


def _own_part(value: Any) -> Tensor:
    """What this rank has of a parameter; a change of it is a change of the parameter."""
    part: Tensor = value.ds_tensor if hasattr(value, "ds_id") else value.data
    return part
