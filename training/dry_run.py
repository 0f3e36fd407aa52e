"""`--dry-run`: a config checked as far as it can be without weights, and what it would need."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from training.data import Stage, read_records, tokenize
from training.errors import UnreachableError
from training.fitting import global_batch_size, require_evaluation, total_steps
from training.memory import (
    ModelStates,
    Shape,
    Sharding,
    frozen_weights,
    offloaded_weights,
    trained_states,
)
from training.models.lora import add_adapter
from training.models.packing import refuse_unpackable
from training.models.pretrained import (
    check_head,
    check_policy_config,
    check_scalar_config,
    has_linear_score,
    load_model_config,
    on_meta,
)
from training.models.tokenizers import load_tokenizer
from training.runtime.engine import precision
from training.stage_config import StageConfig, SupervisedConfig, model_path_faults

GIB = 1024**3
USUAL_GPU = 80.0
"""GiB that are assumed where there is no GPU to ask (A100)."""
RESERVE = 0.1
"""Share of a GPU that the estimate leaves to CUDA, NCCL and fragmentation."""


@dataclass
class Plan:
    """What a run would do and need; bytes are of one GPU."""

    config: StageConfig
    processes: int
    stand_in: str | None = None
    """A model of the size of those that earlier stages have yet to write."""
    facts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What becomes of the data, and warnings."""
    models: dict[str, tuple[Shape, ModelStates]] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)
    phases: dict[str, dict[str, int]] = field(default_factory=dict)
    """Memory that comes and goes, by phase and by what takes it."""

    def shape(
        self, name_or_path: str, scalar: bool, lora: bool = False, frozen: bool = False
    ) -> Shape:
        """The shape of a model that the config names, grown by a pad token where it lacks one.

        Args:
            scalar: a reward model or critic; a frozen one may have a head of any kind.

        Raises:
            UserError: it cannot be found, or is of the wrong kind.
        """
        trusted = self.config.trust_remote_code
        config = load_model_config(name_or_path, trusted)
        if self.config.packing and not (
            scalar and frozen and not has_linear_score(config, trusted)
        ):
            refuse_unpackable(config, name_or_path)
        if scalar:
            check_scalar_config(config, name_or_path, new_head=True)
            config.num_labels = 1
        else:
            check_policy_config(config, name_or_path)
        tokens = len(load_tokenizer(name_or_path, trusted, of_pairs=scalar and frozen))
        text = config.get_text_config()
        text.vocab_size = max(text.vocab_size, tokens)
        build = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
        model = on_meta(build, config, trusted)
        if scalar and not frozen:
            check_head(model, name_or_path)
        if lora and self.config.lora is not None:
            add_adapter(model, self.config.lora)
        try:
            return Shape.of(model)
        except AttributeError:  # other names for its layers and heads
            if not frozen:
                raise
            self.notes.append(f"{name_or_path}: only its weights are counted, no activations")
            return Shape.of_weights(model)

    def add_trained(self, name: str, shape: Shape) -> None:
        sharding = sharding_of(self.config.deepspeed, self.processes)
        states = trained_states(shape, precision(self.config), sharding)
        self.models[name] = shape, states

    def add_frozen(self, name: str, shape: Shape, section: dict[str, Any]) -> None:
        dtype, sharding = precision(self.config), sharding_of(section, self.processes)
        weights = frozen_weights(shape, dtype, sharding)
        host = offloaded_weights(shape, dtype, sharding)
        self.models[name] = shape, ModelStates(weights, 0, 0, host=host)
        self.frozen.add(name)

    def examples(self, stage: Stage) -> int | None:
        """How many there are to train on, or None where the Hub that has some cannot be reached.

        All records are read and turned into tokens, as the run would, which then need not do it.

        Raises:
            UserError: the data is at fault, as far as it is here.
        """
        try:
            records = read_records(self.config.data, stage)
        except UnreachableError as error:
            self.facts["data"] = f"not checked: {error.faults[0]}"
            return None
        require_evaluation(records)
        tokenizer = load_tokenizer(self.config.model_name_or_path, self.config.trust_remote_code)
        data = tokenize(records, tokenizer, self.config.data, stage)
        self.facts["data"] = f"{len(data.train)} examples to train on, {len(data.eval)} held out"
        self.notes += [*records.report.lines(), *data.report.lines()]
        return len(data.train)

    @property
    def needed(self) -> int:
        """Bytes of what stays and of the largest phase."""
        staying = sum(states.total for _, states in self.models.values())
        return staying + max((sum(parts.values()) for parts in self.phases.values()), default=0)

    def report(self, gpu_memory: float) -> str:
        """Everything, for the terminal; `gpu_memory` in GiB."""
        lines = ["Dry run: the config is sound; no weights were loaded.", ""]
        if self.config.description:
            lines += [self.config.description, ""]
        facts = {"processes": str(self.processes), **self.facts}
        lines += [f"  {name + ':':<22}{value}" for name, value in facts.items()]
        lines += ["", *(f"  {note}" for note in self.notes)] if self.notes else []
        kinds = f"{'weights':>9}{'grads':>7}{'optimizer':>11}{'buckets':>9}"
        heading = f"{'parameters':>16}{'trained':>16}{kinds}"
        lines += ["", f"  {'GiB on each GPU':<20}{heading}"]
        for name, (shape, states) in self.models.items():
            trained = "frozen" if name in self.frozen else f"{shape.trained:,}"
            lines.append(
                f"  {name:<20}{shape.parameters:>16,}{trained:>16}"
                f"{states.weights / GIB:>9.2f}{states.gradients / GIB:>7.2f}"
                f"{states.optimizer / GIB:>11.2f}{states.buckets / GIB:>9.2f}"
            )
        for phase, parts in self.phases.items():
            inside = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
            lines.append(f"  {phase + ':':<20}{sum(parts.values()) / GIB:>9.2f}  ({inside})")
        usable = gpu_memory * (1 - RESERVE)
        needed = self.needed / GIB
        verdict = "fits" if needed <= usable else "does NOT fit"
        lines += ["", f"  Estimate: {needed:.1f} GiB; it {verdict} a GPU of {gpu_memory:.0f} GiB, "
                      f"{RESERVE:.0%} of which are left to CUDA."]  # fmt: skip
        if needed > usable:
            lines.append(f"  What takes less: {self.remedy()}")
        if host := sum(states.host for _, states in self.models.values()):
            lines.append(
                f"  Offloaded to the host: {host / GIB:.0f} GiB over all processes, and half as "
                "much again for buffers, divided by the number of nodes."
            )
        return "\n".join(lines)

    def remedy(self) -> str:
        """Settings that would lower the estimate, for this config."""
        zero = self.config.deepspeed.get("zero_optimization", {})
        options = [
            ("gradient_checkpointing=true", not self.config.gradient_checkpointing),
            ("bf16=true", not self.config.bf16 and not self.config.fp16),
            ("a smaller per_device_train_batch_size", self.config.per_device_train_batch_size > 1),
            ("deepspeed.zero_optimization.stage=3", zero.get("stage", 0) < 3),
            (
                "deepspeed.zero_optimization.offload_optimizer.device=cpu",
                "offload_optimizer" not in zero,
            ),
            ('lora={"r": 16}', self.config.lora is None),
            ("more GPUs", zero.get("stage", 0) > 0),
        ]
        return ", ".join(name for name, helps in options if helps)


def plan_steps(config: SupervisedConfig, planned: Plan, stage: Stage, sequences: int) -> None:
    """The steps of a supervised stage, whose examples have so many sequences each."""
    batch = global_batch_size(config, planned.processes)
    length = config.data.longest
    examples = planned.examples(stage)
    steps = config.max_steps
    if examples is not None:
        steps = total_steps(config, examples, planned.processes)
    planned.facts |= {
        "examples per step": f"{batch:,}",
        "tokens per step": f"{batch * sequences * length:,} at most",
        "optimizer steps": f"{steps:,}" if steps else f"records / {batch:,} x num_train_epochs",
    }


def sharding_of(section: dict[str, Any], processes: int) -> Sharding:
    """What a DeepSpeed section says about dividing a model."""
    zero = DeepSpeedZeroConfig(**section.get("zero_optimization") or {})

    def offloaded(target: Any) -> bool:
        return target is not None and target.device != "none"

    stage = int(zero.stage)
    buffers = 2 if zero.overlap_comm and stage < 3 else 1
    gathers = stage > 0 and zero.contiguous_gradients
    return Sharding(
        stage,
        processes,
        offloaded(zero.offload_optimizer),
        offloaded(zero.offload_param),
        buffers * zero.reduce_bucket_size if gathers else 0,
    )


def gpu_memory() -> float:
    """GiB of this machine's GPU, or those of a usual one."""
    if get_accelerator().device_name() == "cpu":
        return USUAL_GPU
    return float(torch.cuda.get_device_properties(0).total_memory / GIB)


def replace_missing_models(data: dict[str, Any], stand_in: str) -> None:
    """Put `stand_in`, in place, where a config names a model directory that is not there yet."""
    for name, value in data.items():
        for member in value if isinstance(value, list) else [value]:
            if isinstance(member, dict):
                replace_missing_models(member, stand_in)
        named = name.endswith("model_name_or_path") and isinstance(value, str)
        if named and model_path_faults(name, value):
            data[name] = stand_in


def dry_run(
    config: StageConfig,
    plan: Callable[[Any, Plan], None],
    processes: int,
    memory: float | None,
    stand_in: str | None = None,
) -> None:
    """Print what `config` would do and need on `processes` GPUs of `memory` GiB."""
    prepared = Plan(config, processes, stand_in)
    plan(config, prepared)
    print(prepared.report(memory or gpu_memory()))
