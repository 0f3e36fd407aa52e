"""Collects what a run would do and need, for `--dry-run`, without loading weights."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from training.data import DataSettings, Stage, StageRecords, read_records, tokenize
from training.errors import UnreachableError
from training.fitting import (
    global_batch_size,
    held_out_splits,
    require_evaluation,
    total_steps,
)
from training.memory import (
    FLOAT32,
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


@dataclass
class DryRun:
    """What a run would do and need; all bytes are those of one GPU."""

    config: StageConfig
    processes: int
    stand_in: str | None = None
    """The model that stands in for those that earlier stages have yet to write."""
    facts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What would happen to the data, and warnings."""
    models: dict[str, tuple[Shape, ModelStates]] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)
    phases: dict[str, dict[str, int]] = field(default_factory=dict)
    """Memory that is needed for a while: phase -> what takes it -> bytes."""

    def pretrained(self, name_or_path: str) -> Pretrained:
        """The model that the config names, with its `trust_remote_code` and chat template."""
        return Pretrained(
            name_or_path, self.config.trust_remote_code, template=self.config.template
        )

    def policy_shape(self, model: Pretrained, lora: bool = False) -> Shape:
        """The shape of a language model, with an embedding for a pad token if it lacks one.

        Args:
            lora: add the config's adapter, if it has one.

        Raises:
            UserError: the model cannot be found or is of the wrong kind.
        """
        if self.config.packing:
            refuse_unpackable(model.config, str(model))
        check_policy(model)
        built = self._built(model, AutoModelForCausalLM)
        return self._trained_shape(built, lora)

    def scalar_shape(self, model: Pretrained, lora: bool = False) -> Shape:
        """The shape of a reward model or critic that is trained; see `policy_shape`."""
        if self.config.packing:
            refuse_unpackable(model.config, str(model))
        check_scalar(model, new_head=True)
        built = self._built(model, AutoModelForSequenceClassification)
        check_head(built, str(model))
        return self._trained_shape(built, lora)

    def reward_shape(self, model: Pretrained) -> Shape:
        """The shape of a frozen reward model, which may have any kind of head.

        Raises:
            UserError: the model cannot be found or is of the wrong kind.
        """
        if self.config.packing and model.has_linear_score:
            refuse_unpackable(model.config, str(model))
        check_scalar(model, new_head=True)
        built = self._built(model, model.classifier)
        try:
            return Shape.of(built)
        except AttributeError:  # the config names its layers and heads differently
            self.notes.append(f"{model}: only its weights are counted, no activations")
            return Shape.of_weights(built)

    def _built(self, model: Pretrained, build: type) -> PreTrainedModel:
        """Build the model on the meta device, with one label and its tokenizer's pad token."""
        config = copy.deepcopy(model.config)
        if build is AutoModelForSequenceClassification and not model.brings_classifier:
            config.num_labels = 1
        text = config.get_text_config()
        text.vocab_size = max(text.vocab_size, len(model.tokenizer))
        return model.on_meta(build, config)

    def _trained_shape(self, model: PreTrainedModel, lora: bool) -> Shape:
        if lora and self.config.lora is not None:
            add_adapter(model, self.config.lora)
        return Shape.of(model)

    def add_trained(self, name: str, shape: Shape) -> None:
        """Count the states of a model that the run trains."""
        sharding = sharding_of(self.config.deepspeed, self.processes)
        states = trained_states(shape, precision(self.config), sharding)
        self.models[name] = shape, states

    def add_average(self, name: str, shape: Shape) -> None:
        """Count the float32 moving average of a model's trained weights."""
        sharding = sharding_of(self.config.deepspeed, self.processes)
        divided = sharding.processes if sharding.zero_stage == 3 else 1
        self.models[name] = shape, ModelStates(FLOAT32 * shape.trained // divided, 0, 0)
        self.frozen.add(name)

    def add_frozen(self, name: str, shape: Shape, section: dict[str, Any]) -> None:
        """Count the weights of a model that is frozen under the DeepSpeed section `section`."""
        dtype, sharding = precision(self.config), sharding_of(section, self.processes)
        weights = frozen_weights(shape, dtype, sharding)
        host = offloaded_weights(shape, dtype, sharding)
        self.models[name] = shape, ModelStates(weights, 0, 0, host=host)
        self.frozen.add(name)

    def examples(
        self,
        data: DataSettings,
        stage: Stage,
        tokenizer: PreTrainedTokenizerBase,
        usable: Callable[[StageRecords], StageRecords] = lambda records: records,
    ) -> int | None:
        """The number of training examples, or None if some are on the Hub and it is unreachable.

        All records are read and encoded as the run would do, which then finds them in the cache.

        Args:
            usable: checks the records, or leaves out those that the stage cannot use.

        Raises:
            UserError: the data that can be reached is at fault.
        """
        try:
            records = read_records(data, stage)
        except UnreachableError as error:
            self.facts["data"] = f"not checked: {error.faults[0]}"
            return None
        require_evaluation(records)
        records = usable(records)
        tokenized = tokenize(records, tokenizer, data, stage)
        held_out = held_out_splits(tokenized.eval, data)
        self.facts["data"] = (
            f"{len(tokenized.train)} examples to train on; held out: "
            f"{len(held_out['validation'])} for validation, {len(held_out['test'])} for the test"
        )
        self.notes += [*records.tally.lines(), *tokenized.tally.lines()]
        return len(tokenized.train)

    @property
    def needed(self) -> int:
        """Bytes of the model states and of the phase that needs most."""
        staying = sum(states.total for _, states in self.models.values())
        return staying + max((sum(parts.values()) for parts in self.phases.values()), default=0)


def supervised_steps(
    config: SupervisedConfig,
    run: DryRun,
    stage: Stage,
    sequences: int,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Add the steps of a supervised stage to `run`; an example has `sequences` sequences."""
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
    """How a DeepSpeed section partitions and offloads a model."""
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


def replace_missing_models(data: dict[str, Any], stand_in: str) -> None:
    """Put `stand_in`, in place, where a config names a model directory that does not exist yet."""
    for name, value in data.items():
        for member in value if isinstance(value, list) else [value]:
            if isinstance(member, dict):
                replace_missing_models(member, stand_in)
        named = name.endswith("model_name_or_path") and isinstance(value, str)
        if named and model_path_faults(name, value):
            data[name] = stand_in
