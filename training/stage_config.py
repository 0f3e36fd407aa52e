"""What the configs of all stages have in common."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from training.config import Count, Fraction, NonNegative, PathText, Positive, StrictModel
from training.data.chat_template import ChatTemplate
from training.data.settings import DataSettings
from training.deepspeed_section import deepspeed_faults
from training.launch.lock import contents


class OptimizerSettings(StrictModel):
    """AdamW and its schedule, with the names of Hugging Face's TrainingArguments."""

    learning_rate: Positive = Field(examples=[1e-5])
    """AdamW's largest learning rate."""
    weight_decay: NonNegative = 0.0
    """AdamW's weight decay; biases and norms have none."""
    adam_beta1: Fraction = 0.9
    """Decay of AdamW's mean of the gradients."""
    adam_beta2: Fraction = 0.95
    """Decay of AdamW's mean of the squared gradients."""
    adam_epsilon: Positive = 1e-8
    """AdamW's ε."""
    max_grad_norm: NonNegative = 1.0
    """Global gradient norm above which gradients are scaled down; 0 is off."""
    lr_scheduler_type: Literal["constant", "linear", "cosine", "constant_with_warmup"] = "cosine"
    """Course of the learning rate after the warm-up; "constant" has no warm-up."""
    warmup_ratio: Fraction = 0.0
    """Fraction of all optimizer steps over which the learning rate rises from 0."""


class LoraSettings(StrictModel):
    """A LoRA adapter (Hu et al. 2021), with peft's names."""

    r: Count = 16
    """Rank: A is [r, inputs], B is [outputs, r]."""
    lora_alpha: Positive = 32.0
    """The adapter adds lora_alpha / r · B A x to W x."""
    lora_dropout: Fraction = 0.0
    """Dropout on the adapter's input; stage 3 allows 0 only."""
    target_modules: str | list[str] = "all-linear"
    """Names of the layers that get one, or a regular expression; all-linear is every linear layer
    but the head."""


class RunConfig(StrictModel):
    """What every run needs to know, one that trains or one that only measures."""

    model_name_or_path: PathText = Field(examples=["owner/model"])
    """Hub name, Hugging Face directory or GGUF file of the weights that the run starts from."""
    output_dir: PathText = Field(examples=["runs/example"])
    """Directory that the run writes its results into."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of the order of the data and of every random draw."""
    trust_remote_code: bool = False
    """Whether code that comes with a model may run on this machine."""
    chat_template: str | None = None
    """Path of a Jinja file, or name of a bundled template (alpaca, chatml, llama-3, mistral,
    zephyr); it is saved with the model. Null is the model's own."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Values of the chat template's variables, such as {"enable_thinking": false}; they are saved
    within the template."""
    bf16: bool = False
    """Compute in bfloat16; without it and fp16, in float32."""
    fp16: bool = False
    """Compute in float16 with a dynamic loss scale, on GPUs that have no bfloat16."""
    packing: bool = False
    """Compute several short sequences of a micro-batch in one row, and what they have in common
    (the prompt of several responses) once: less work, the same losses."""
    per_device_eval_batch_size: Count = 8
    """Sequences (stage 2: comparisons or rankings) in one forward pass of one process that takes no
    gradients."""

    @property
    def template(self) -> ChatTemplate:
        """How the model writes dialogues."""
        return ChatTemplate(self.chat_template, self.chat_template_kwargs)

    def faults(self) -> list[str]:
        found = super().faults()
        if self.bf16 and self.fp16:
            found.append("fp16: contradicts bf16=true; choose one")
        found += self.template.faults()
        return found + model_path_faults("model_name_or_path", self.model_name_or_path)


class StageConfig(RunConfig):
    """What the JSON of every stage has in common."""

    description: str = ""
    """What the config is for; printed when it is used."""
    overwrite_output_dir: bool = False
    """Whether output_dir may be deleted and written again, if it holds an earlier run."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: LoraSettings | None = None
    """Train a LoRA adapter in place of all weights; exports have it merged. Null trains all."""
    per_device_train_batch_size: Count = 8
    """Sequences (pairs, rollouts) in one forward pass of one process."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches of each process in one optimizer step."""
    logging_steps: Count = 1
    """Optimizer steps (PPO: iterations) between lines of metrics.jsonl."""
    save_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps (PPO: iterations) between checkpoints; 0 saves one only where a signal stops
    the run."""
    export_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps (PPO: iterations) between exports of the weights so far as Hugging Face
    directories, exports/step-N/; 0 exports at the end only. None is ever deleted."""
    save_total_limit: Count | None = None
    """Number of checkpoints that are kept, the newest ones; null keeps all."""
    resume_from_checkpoint: PathText | None = None
    """Path of a checkpoint, or "latest" for the newest one in output_dir (if there is none, the run
    starts at its beginning); null starts a new run."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """DeepSpeed's own keys. What the stage's fields set may not be repeated here."""

    def faults(self) -> list[str]:
        found = super().faults()
        found += [f"deepspeed.{fault}" for fault in deepspeed_faults(self.deepspeed)]
        output = Path(self.output_dir)
        if output.is_file():
            found.append(f"output_dir: {output} is a file; name a directory")
        elif self.resume_from_checkpoint is not None:
            found += self._resume_faults(Path(self.resume_from_checkpoint))
        elif output.is_dir() and contents(output):
            if not self.overwrite_output_dir:
                found.append(
                    f"output_dir: {output} exists and is not empty; choose another one, or pass "
                    "resume_from_checkpoint=latest to go on or overwrite_output_dir=true to "
                    "start anew"
                )
            elif not (output / "config.json").is_file():
                found.append(
                    f"output_dir: {output} holds no config.json, so it is not an earlier run; "
                    "remove it yourself or choose another one"
                )
        return found

    def _resume_faults(self, source: Path) -> list[str]:
        found = []
        if self.overwrite_output_dir:
            found.append("overwrite_output_dir: contradicts resume_from_checkpoint; choose one")
        output = Path(self.output_dir)
        if output.is_dir() and contents(output) and not (output / "config.json").is_file():
            found.append(f"output_dir: {output} holds no config.json, so it is no run to resume")
        if self.resume_from_checkpoint == "latest":
            return found
        if not (source / "state.json").is_file():
            found.append(
                f"resume_from_checkpoint: {source} is not a complete checkpoint (no state.json); "
                'name output_dir/checkpoints/step-N or "latest"'
            )
        elif source.resolve().parent != (output / "checkpoints").resolve():
            found.append(
                f"resume_from_checkpoint: {source} is another run's; its metrics and best weights "
                f"are where it is, so set output_dir={source.parents[1]}"
            )
        return found


class SupervisedConfig(StageConfig, OptimizerSettings):
    """What the two supervised stages (SFT, reward model) share."""

    num_train_epochs: Positive = 1.0
    """Passes over the training data."""
    max_steps: Count | None = None
    """Optimizer steps in the whole run, in place of num_train_epochs; null uses that."""
    eval_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps between evaluations, in addition to those after each epoch and at the end; 0
    adds none."""
    data: DataSettings = Field(examples=[{"sources": ["owner/dataset"]}])
    """What the stage learns from."""

    def faults(self) -> list[str]:
        found = super().faults()
        if self.data.validation_share == 0:
            found.append("data.validation_share: 0 leaves nothing to choose the weights by")
        return found


def model_path_faults(field: str, name_or_path: str) -> list[str]:
    """Faults of a model's name: a path must exist; `owner/name` may be on the Hub."""
    path = Path(name_or_path)
    if path.suffix == ".gguf":
        return _gguf_faults(field, path)
    if path.is_file():
        return [f"{field}: {name_or_path} is a file; name a model directory or a .gguf file"]
    if path.is_dir():
        if (path / "config.json").is_file():
            return _quantized_faults(field, path)
        return [f"{field}: {name_or_path} has no config.json; it is not a model directory"]
    looks_local = path.is_absolute() or len(path.parts) > 2 or name_or_path.startswith(".")
    return [f"{field}: {name_or_path} does not exist"] if looks_local else []


def _quantized_faults(field: str, path: Path) -> list[str]:
    """A quantized model has no gradients, and no stage dequantizes one."""
    try:
        found = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []  # transformers says what is wrong with it
    quantized = found.get("quantization_config") if isinstance(found, dict) else None
    if not isinstance(quantized, dict):
        return []
    method = quantized.get("quant_method", "an unnamed method")
    return [f"{field}: {path} is quantized ({method}); name the model that it was made from"]


def _gguf_faults(field: str, path: Path) -> list[str]:
    """Faults of a model in one GGUF file, whose weights transformers converts to float32."""
    if not path.is_file():
        return [f"{field}: {path} does not exist"]
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    return [f"{field}: reading {path} needs pip install {' '.join(missing)}"] if missing else []
