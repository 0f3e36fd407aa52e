"""Models whose parameters ZeRO-3 divides among the ranks."""

import contextlib
from collections.abc import Iterator

import deepspeed
from torch import nn

from training.models.lora import WithoutAdapter, adapter_off


@contextlib.contextmanager
def whole_parameters(module: nn.Module | WithoutAdapter) -> Iterator[nn.Module]:
    """The bare module in evaluation mode with all of its parameters on this rank, to generate with.

    Args:
        module: a plain module, the DeepSpeed engine around one, or one without its adapter.
            ZeRO-3's hooks would give each parameter back after its layer has run; they are taken
            off meanwhile.
    """
    if isinstance(module, WithoutAdapter):
        with adapter_off(module.engine.module), whole_parameters(module.engine) as bare:
            yield bare
        return
    bare = module.module if isinstance(module, deepspeed.DeepSpeedEngine) else module
    was_training = bare.training
    bare.eval()
    if not is_partitioned(bare):
        yield bare
    else:
        offload = getattr(module.optimizer, "parameter_offload", module.optimizer)
        with deepspeed.zero.GatheredParameters(list(bare.parameters())):
            for parameter in bare.parameters():
                parameter.ds_active_sub_modules.clear()
            for hook in [*offload.forward_hooks, *offload.backward_hooks]:
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield bare
            finally:
                offload._register_deepspeed_module(offload.module)
    bare.train(was_training)


def is_partitioned(module: nn.Module) -> bool:
    """Whether ZeRO-3 keeps only a part of each parameter on this rank."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())
