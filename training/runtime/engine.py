"""DeepSpeed engines, which do all training, on GPUs and on the CPU."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import deepspeed
import torch.distributed
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from transformers import get_scheduler

from training.errors import NotFiniteError, UserError
from training.runtime.extensions import load_extension
from training.runtime.ranks import device, sum_over_ranks, world_size
from training.runtime.tracking import Clock
from training.stage_config import OptimizerSettings, StageConfig

Batch = TypeVar("Batch")

SMALLEST_LOSS_SCALE = 1.0
"""fp16: overflow at this scale has other causes; a smaller scale would lose small gradients."""


def require_fp16(wanted: bool) -> None:
    """Refuse fp16 on an accelerator that does not support it, before DeepSpeed does.

    Raises:
        UserError: fp16 is wanted but not supported.
    """
    if wanted and not get_accelerator().is_fp16_supported():
        raise UserError(
            f"fp16: this machine's {get_accelerator().device_name()} does not train in it; "
            "bf16=true, or neither"
        )


def deepspeed_config(
    config: StageConfig, settings: OptimizerSettings | None = None
) -> dict[str, Any]:
    """DeepSpeed's config: the stage's `deepspeed` section completed from the stage's own fields."""
    micro_batch = config.per_device_train_batch_size
    return {
        "steps_per_print": 10**9,
        "zero_force_ds_cpu_optimizer": False,
        **config.deepspeed,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "train_batch_size": micro_batch * config.gradient_accumulation_steps * world_size(),
        "gradient_clipping": settings.max_grad_norm if settings else 0.0,
        "bf16": {"enabled": config.bf16},
        "fp16": {"enabled": config.fp16},
    }


class TrainedModule:
    """A module in a DeepSpeed engine, with its optimizer and schedule."""

    def __init__(
        self, module: nn.Module, config: StageConfig, settings: OptimizerSettings, total_steps: int
    ) -> None:
        self.engine, _, _, _ = deepspeed.initialize(
            model=module,
            model_parameters=[p for p in module.parameters() if p.requires_grad],
            optimizer=lambda parameters: adamw(parameters, config, settings),
            lr_scheduler=lambda optimizer: get_scheduler(
                settings.lr_scheduler_type,
                optimizer,
                num_warmup_steps=math.ceil(settings.warmup_ratio * total_steps),
                num_training_steps=total_steps,
            ),
            config=deepspeed_config(config, settings),
        )
        self.module = module
        self.learning_rate = math.nan
        """Learning rate of the step just taken; DeepSpeed itself reports that of the next step."""
        self._gradient_sums: list[Tensor] = []
        if not config.fp16:
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(self._watch)

    def _watch(self, gradient: Tensor) -> None:
        # Summed before ZeRO takes the gradient; one entry that is not finite shows in the sum.
        self._gradient_sums.append(gradient.sum(dtype=torch.float32))

    def bad_gradients(self) -> Tensor:
        """Count this rank's gradient tensors since the last call that were not finite, []."""
        sums, self._gradient_sums = self._gradient_sums, []
        if not sums:
            return torch.zeros((), device=device())
        return (~torch.stack(sums).isfinite()).sum().float()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.engine(*arguments, **named)

    def step(self) -> None:
        """Take DeepSpeed's step, which steps the optimizer at the end of a global batch.

        Raises:
            NotFiniteError: fp16 gradients overflow at the smallest loss scale; on every rank.
        """
        fp16 = self.engine.fp16_enabled()
        skipped, scale = self.engine.skipped_steps, self.engine.optimizer.loss_scale if fp16 else 0
        try:
            self.engine.step()
        except Exception as error:  # ZeRO raises a plain Exception
            if "loss scale already at minimum" not in str(error):
                raise
            self.engine.skipped_steps = skipped + 1
        if fp16 and self.engine.skipped_steps > skipped and scale <= SMALLEST_LOSS_SCALE:
            raise NotFiniteError(f"gradients are not finite, at a loss scale of {scale:g}")

    @property
    def grad_norm(self) -> float:
        """Global gradient norm of the last step before clipping; NaN if DeepSpeed keeps none.

        DeepSpeed keeps none in float32 without ZeRO.
        """
        norm = self.engine.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    def loss_scaling(self, prefix: str) -> dict[str, float]:
        """In fp16, `prefix`/loss_scale and `prefix`/skipped_steps so far; otherwise {}."""
        if not self.engine.fp16_enabled():
            return {}
        return {
            f"{prefix}/loss_scale": float(self.engine.optimizer.loss_scale),
            f"{prefix}/skipped_steps": float(self.engine.skipped_steps),
        }


def optimizer_step(
    trained: Sequence[TrainedModule],
    micro_batches: Sequence[Batch],
    loss_sums: Callable[[Batch], Sequence[Tensor]],
    items: Callable[[Batch], int],
    clock: Clock | None = None,
) -> list[float]:
    """Take one optimizer step of each module over the global batch, of which this rank has a part.

    Losses are sums over items (tokens, pairs) and are divided by the number of items in the whole
    global batch, across all ranks and micro-batches. A mean of means would depend on how the batch
    happens to be divided.

    Args:
        micro_batches: exactly `gradient_accumulation_steps` of them, on every rank.
        loss_sums: returns, for each module, the sum of its loss over the items of a micro-batch.
        items: returns the number of items in a micro-batch, which may be 0.
        clock: adds up the phases "forward", "backward" and "step".

    Returns:
        Each module's mean loss per item over the global batch.

    Raises:
        NotFiniteError: a loss or a gradient is not finite; raised on every rank before the
            optimizer step. In fp16 gradients may overflow: DeepSpeed then skips the step and
            lowers the loss scale.
    """
    clock = clock or Clock()
    own = torch.tensor(sum(items(batch) for batch in micro_batches))
    count = max(float(sum_over_ranks(own)), 1.0)
    scale = world_size() / count  # DeepSpeed averages gradients over ranks
    totals = torch.zeros(len(trained), dtype=torch.float64, device=device())
    for module in trained:
        module.engine.train()
        module.learning_rate = float(module.engine.get_lr()[0])
    for index, batch in enumerate(micro_batches):
        with clock.phase("forward"):
            losses = loss_sums(batch)
        totals += torch.stack([loss.detach().double() for loss in losses])
        last = index == len(micro_batches) - 1
        if last:
            totals = sum_over_ranks(totals)
            if not totals.isfinite().all():
                raise NotFiniteError(f"the loss is {(totals / count).tolist()}")
        with clock.phase("backward"):
            for module, loss in zip(trained, losses, strict=True):
                module.engine.backward(loss * scale, scale_wrt_gas=False)
        if last:
            _require_finite_gradients(trained)
        with clock.phase("step"):
            for module in trained:
                module.step()
    return [total / count for total in totals.tolist()]


def _require_finite_gradients(trained: Sequence[TrainedModule]) -> None:
    counts = sum_over_ranks(torch.stack([module.bad_gradients() for module in trained]))
    if counts.any():
        raise NotFiniteError(
            f"the loss is finite, but gradients are not ({int(counts.sum())} parameter tensors)"
        )


def adamw(
    parameters: list[nn.Parameter], config: StageConfig, settings: OptimizerSettings
) -> torch.optim.Optimizer:
    """AdamW without weight decay on biases and norms; DeepSpeed's CPU version if offloaded."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
    }
    zero = config.deepspeed.get("zero_optimization") or {}
    if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        load_extension("CPUAdamBuilder")
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    # Fused: one kernel for many tensors, and a step count that stays on the GPU.
    fused = True if any(parameter.is_cuda for parameter in parameters) else None
    return torch.optim.AdamW(groups, fused=fused, **options)


def frozen(module: nn.Module, section: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """Prepare a module that is never trained: a replica, or partitioned if `section` is ZeRO-3.

    Args:
        dtype: that of the module's parameters. Buffers keep their own type, as they do in training:
            rotary frequencies that are rounded to bfloat16 give other log-probabilities.
    """
    module.eval().requires_grad_(False)
    if section.get("zero_optimization", {}).get("stage") != 3:
        return module.to(device=device())
    engine, _, _, _ = deepspeed.initialize(
        model=module,
        config={
            "steps_per_print": 10**9,
            **section,
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": dtype == torch.float16},
        },
    )
    engine.eval()  # returns nothing
    return engine
