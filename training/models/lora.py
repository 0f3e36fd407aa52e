"""LoRA (Hu et al. 2021) with peft: small matrices B·A are trained beside frozen weights."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from training.errors import UserError
from training.stage_config import LoraSettings

INITIALIZATION_SEED = 0
"""Seed of the random initial A, the same on every rank and in every run. B starts at 0."""


def add_adapter(model: PreTrainedModel, settings: LoraSettings) -> None:
    """Add an adapter to `model` in place, and freeze everything else but a classification head.

    Initially the adapter adds 0.

    Raises:
        UserError: `target_modules` matches no layer.
    """
    head = getattr(model, "score", None)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.target_modules,
        task_type="CAUSAL_LM" if head is None else "SEQ_CLS",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(INITIALIZATION_SEED)
        try:
            inject_adapter_in_model(config, model)
        except (ValueError, re.error) as error:
            raise UserError(f"lora.target_modules: {error}") from error
    if head is not None:
        head.requires_grad_(True)


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Turn the adapter off: the model is as it was before `add_adapter` and any training."""
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    # peft's own switch would also change requires_grad of parameters that the optimizer holds.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


class WithoutAdapter:
    """A trained model with its adapter off: the reference policy without a second copy."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        """`engine`: the DeepSpeed engine of the module with the adapter."""
        self.engine = engine

    @torch.no_grad()
    def __call__(self, *arguments: Any, **named: Any) -> Any:
        with adapter_off(self.engine.module):
            return self.engine(*arguments, **named)


def merged_state(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """The weights W + lora_alpha / r · B A, under the names that `model` has without an adapter.

    `model` itself is unchanged. None if it has no adapter.
    """
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)
    }
    if not layers:
        return None
    state = {
        name.replace(".base_layer.", "."): value
        for name, value in model.state_dict().items()
        if ".lora_" not in name
    }
    for name, layer in layers.items():
        weight = f"{name}.weight"
        delta = layer.get_delta_weight(layer.active_adapters[0])
        state[weight] = (state[weight].float() + delta.float()).to(state[weight].dtype)
    return state
