"""Models whose parameters ZeRO-3 divides among the ranks."""

import contextlib
from collections.abc import Iterator
from typing import Any

import deepspeed
from torch import nn

from training.models.lora import WithoutAdapter, adapter_off


@contextlib.contextmanager
def whole_parameters(module: nn.Module | WithoutAdapter) -> Iterator[nn.Module]:
    """The bare module in evaluation mode with all of its parameters on this rank, to generate with.

    Args:
        module: a plain module, the DeepSpeed engine around one, or one without its adapter.
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
    """All parameters whole, without ZeRO-3's hooks, which would release each after its layer."""
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
    """Whether ZeRO-3 keeps only a part of each parameter on this rank."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())
