"""DeepSpeed's section of a stage's config, checked before DeepSpeed sees it.

The section holds DeepSpeed's own keys. What the stage's fields set (batch sizes, optimizer,
clipping, precision) may not be repeated there.
"""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from pydantic import ValidationError

from training.errors import did_you_mean

# DeepSpeed's top-level keys (deepspeed.ai/docs/config-json) that a stage's JSON may use.
DEEPSPEED_KEYS = frozenset(
    "activation_checkpointing aio checkpoint comet comms_logger communication_data_type "
    "compile compression_training csv_monitor curriculum_learning data_efficiency data_types "
    "disable_allgather dump_state flops_profiler gradient_predivide_factor memory_breakdown "
    "prescale_gradients seq_parallel_communication_data_type sparse_attention sparse_gradients "
    "steps_per_print tensorboard timers use_data_before_expert_parallelism wall_clock_breakdown "
    "wandb zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization".split()
)
# ... and those that the stage's own fields own.
STAGE_OWNED_KEYS = {
    "train_batch_size": "per_device_train_batch_size and gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer": "learning_rate, weight_decay, adam_beta1, adam_beta2 and adam_epsilon",
    "scheduler": "lr_scheduler_type and warmup_ratio",
    "bf16": "bf16",
    "fp16": "fp16",
    "amp": "bf16 or fp16",
    "torch_autocast": "bf16 or fp16",
}


def deepspeed_faults(section: dict[str, Any]) -> list[str]:
    """Faults of a `"deepspeed"` section. DeepSpeed itself accepts unknown top-level keys."""
    found = []
    for key in section:
        if key in STAGE_OWNED_KEYS:
            found.append(f"{key}: set by the stage's own {STAGE_OWNED_KEYS[key]}; remove it here")
        elif key not in DEEPSPEED_KEYS:
            found.append(f"{key}: unknown key{did_you_mean(key, DEEPSPEED_KEYS)}")
    if "zero_optimization" in section:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        try:
            DeepSpeedZeroConfig(**section["zero_optimization"])
        except ValidationError as error:
            known = DeepSpeedZeroConfig.model_fields
            found += [f"zero_optimization.{fault}" for fault in _details(error, known)]
        except TypeError:
            found.append("zero_optimization: an object was expected")
    found += monitor_faults(section)
    return found or [fault for key in section for fault in _refused(key, section[key])]


def _refused(key: str, value: Any) -> list[str]:
    """DeepSpeed's own objection to an entry that looks sound."""
    from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum

    try:
        config = DeepSpeedConfig({key: value, "train_micro_batch_size_per_gpu": 1})
        # It reads these later.
        _ = config.communication_data_type, config.seq_parallel_communication_data_type
        _ = DtypeEnum(config.grad_accum_dtype or "fp32"), int(config.steps_per_print or 1)
    except Exception as error:  # of many kinds
        return [f"{key}: DeepSpeed refuses it: {' '.join(str(error).split())}"]
    return []


def monitor_faults(section: dict[str, Any]) -> list[str]:
    """Faults of the monitors in a `"deepspeed"` section, and packages that are missing for them."""
    monitors = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
    found = []
    for name in [*monitors, "csv_monitor"]:
        if name not in section:
            continue
        # Here and above, since an empty section is checked without DeepSpeed, which imports torch.
        from deepspeed.monitor.config import get_monitor_config

        try:
            enabled = getattr(get_monitor_config({name: section[name]}), name).enabled
        except ValidationError as error:
            found += _details(error, ())
            continue
        if enabled and name in monitors and find_spec(monitors[name]) is None:
            found.append(f"{name}: the package {monitors[name]} is not installed; pip install it")
    return found


def _details(error: ValidationError, known: Iterable[str]) -> list[str]:
    """`place: message` for each fault that one of DeepSpeed's models found."""
    found = []
    for detail in error.errors():
        place = ".".join(str(part) for part in detail["loc"])
        unknown = detail["type"] == "extra_forbidden" and known
        hint = did_you_mean(place, known) if unknown else ""
        found.append(f"{place}: {detail['msg']}{hint}")
    return found
