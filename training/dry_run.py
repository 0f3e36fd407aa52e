"""`--dry-run`: a config checked as far as it can be without weights, and what it would need."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from training.data import DataSettings, Stage, read_records, tokenize
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
from training.models.checks import check_head, check_policy, check_scalar
from training.models.lora import add_adapter
from training.models.options import precision
from training.models.packing import refuse_unpackable
from training.models.pretrained import Pretrained
from training.stage_config import StageConfig, SupervisedConfig, model_path_faults

GIB = 1024**3
USUAL_GPU = 80.0
"""GiB that are assumed where there is no GPU to ask (A100)."""
RESERVE = 0.1
"""Share of a GPU that the estimate leaves to CUDA, NCCL and fragmentation."""


@dataclass
class DryRun:
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

    def pretrained(self, name_or_path: str) -> Pretrained:
        """A model that the config names."""
        return Pretrained(name_or_path, self.config.trust_remote_code)

    def policy_shape(self, model: Pretrained, lora: bool = False) -> Shape:
        """The shape of a language model, with room for a pad token where it lacks one.

        Args:
            lora: with the config's adapter, if it has one.

        Raises:
            UserError: the model cannot be found, or is of the wrong kind.
        """
        if self.config.packing:
            refuse_unpackable(model.config, str(model))
        check_policy(model)
        built = self._built(model, AutoModelForCausalLM)
        return self._trained_shape(built, lora)

    def scalar_shape(self, model: Pretrained, lora: bool = False) -> Shape:
        """The shape of a reward model or critic that is trained; otherwise as `policy_shape`."""
        if self.config.packing:
            refuse_unpackable(model.config, str(model))
        check_scalar(model, new_head=True)
        built = self._built(model, AutoModelForSequenceClassification)
        check_head(built, str(model))
        return self._trained_shape(built, lora)

    def reward_shape(self, model: Pretrained) -> Shape:
        """The shape of a frozen reward model, which may have a head of any kind.

        Raises:
            UserError: the model cannot be found, or is of the wrong kind.
        """
        if self.config.packing and model.has_linear_score:
            refuse_unpackable(model.config, str(model))
        check_scalar(model, new_head=True)
        built = self._built(model, AutoModelForSequenceClassification)
        try:
            return Shape.of(built)
        except AttributeError:  # its layers and heads have other names
            self.notes.append(f"{model}: only its weights are counted, no activations")
            return Shape.of_weights(built)

    def _built(self, model: Pretrained, build: type) -> PreTrainedModel:
        """The model on the meta device, with one label and room for its tokenizer's pad token."""
        config = copy.deepcopy(model.config)
        if build is AutoModelForSequenceClassification:
            config.num_labels = 1
        text = config.get_text_config()
        text.vocab_size = max(text.vocab_size, len(model.tokenizer))
        return model.on_meta(build, config)

    def _trained_shape(self, model: PreTrainedModel, lora: bool) -> Shape:
        if lora and self.config.lora is not None:
            add_adapter(model, self.config.lora)
        return Shape.of(model)

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

    def examples(
        self, data: DataSettings, stage: Stage, tokenizer: PreTrainedTokenizerBase
    ) -> int | None:
        """How many there are to train on, or None where the Hub that has some cannot be reached.

        All records are read and turned into tokens, as the run would, which then need not do it.

        Raises:
            UserError: the data is at fault, as far as it is here.
        """
        try:
            records = read_records(data, stage)
        except UnreachableError as error:
            self.facts["data"] = f"not checked: {error.faults[0]}"
            return None
        require_evaluation(records)
        tokenized = tokenize(records, tokenizer, data, stage)
        self.facts["data"] = (
            f"{len(tokenized.train)} examples to train on, {len(tokenized.eval)} held out"
        )
        self.notes += [*records.tally.lines(), *tokenized.tally.lines()]
        return len(tokenized.train)

    @property
    def needed(self) -> int:
        """Bytes of what stays and of the largest phase."""
        staying = sum(states.total for _, states in self.models.values())
        return staying + max((sum(parts.values()) for parts in self.phases.values()), default=0)

    def described(self, gpu_memory: float) -> str:
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


def supervised_steps(
    config: SupervisedConfig,
    run: DryRun,
    stage: Stage,
    sequences: int,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """The steps of a supervised stage, whose examples have so many sequences each."""
    batch = global_batch_size(config, run.processes)
    length = config.data.longest
    examples = run.examples(config.data, stage, tokenizer)
    steps = config.max_steps
    if examples is not None:
        steps = total_steps(config, examples, run.processes)
    run.facts |= {
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


def print_dry_run(
    config: StageConfig,
    fill: Callable[[Any, DryRun], None],
    processes: int,
    memory: float | None,
    stand_in: str | None = None,
) -> None:
    """Print what `config` would do and need on `processes` GPUs of `memory` GiB.

    Args:
        fill: the stage's own part.
    """
    run = DryRun(config, processes, stand_in)
    fill(config, run)
    print(run.described(memory or gpu_memory()))
