"""Models whose parameters ZeRO-3 partitions among the ranks."""

import contextlib
from collections.abc import Iterator
from typing import Any

import deepspeed
from torch import nn

from training.models.lora import WithoutAdapter, adapter_off


@contextlib.contextmanager
def whole_parameters(module: nn.Module | WithoutAdapter) -> Iterator[nn.Module]:
    """The bare module in evaluation mode, with all of its parameters on this rank, for generation.

    Args:
        module: a plain module, the DeepSpeed engine of one, or an engine without its adapter.
    """
    if isinstance(module, WithoutAdapter):
        with adapter_off(module.engine.module), whole_parameters(module.engine) as bare:
            yield bare
        return
    own: nn.Module = module.module if isinstance(module, deepspeed.DeepSpeedEngine) else module
    was_training = own.training
    own.eval()
    if not is_partitioned(own):
        yield own
    else:
        with _gathered(module, own):
            yield own
    own.train(was_training)


@contextlib.contextmanager
def _gathered(engine: Any, module: nn.Module) -> Iterator[None]:
    """Gather all parameters and remove ZeRO-3's hooks, which would release them layer by layer."""
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    parameters: list[Any] = list(module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        for parameter in parameters:
            parameter.ds_active_sub_modules.clear()
        for hook in [*offload.forward_hooks, *offload.backward_hooks]:
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            offload._register_deepspeed_module(offload.module)


def is_partitioned(module: nn.Module) -> bool:
    """Whether this rank holds only a part of each parameter (ZeRO-3)."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())
