"""The steps of the experiment, one after the other; what is finished is not run again."""

import json
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from step3_rlhf.paper.grid.run import duration
from step3_rlhf.paper.people.alpha import choose
from step3_rlhf.paper.people.boards import boards_of
from step3_rlhf.paper.people.data.convert import Sizes, convert, write_files
from step3_rlhf.paper.people.data.questions import read_questions
from step3_rlhf.paper.people.data.records import Prior
from training.config import read_mapping
from training.errors import RunError, UserError
from training.runtime.json_text import json_text

ROOT = Path(__file__).resolve().parents[3]

STAGES_SEED = 42
"""Seed of the data, of SFT and of the reward model, which the runs of all seeds share."""

POLICIES = ("kl", "conditional_pm")

BETA = 1.0

SHARED_WITH_EVALUATIONS = (
    "chat_template response_length rollout_batch_size per_device_eval_batch_size bf16 packing"
).split()
"""Settings of stage 3 that the evaluations of SFT have too."""


@dataclass(frozen=True)
class Experiment:
    """What the user asked for."""

    directory: Path
    model: str
    """What SFT starts from."""
    data: str | None = None
    """A file of questions; None is the Hub's data set."""
    prior: Prior = "people"
    seed: int = 42
    """Of the two aligned policies."""
    sizes: Sizes = field(default_factory=Sizes)
    configs: dict[str, str] = field(
        default_factory=lambda: {
            stage: os.path.relpath(ROOT / stage / "configs" / "people.json")
            for stage in ("step1_sft", "step2_reward", "step3_rlhf")
        }
    )
    """The config of each stage."""

    def of_seed(self, policy: str) -> Path:
        return self.directory / f"seed-{self.seed}" / policy


@dataclass(frozen=True)
class Step:
    """One step: a command, or something that is done here."""

    name: str
    minutes: float
    """What it takes on two cores, about; only the proportions matter, for the estimate."""
    command: Callable[[], list[str]] | None
    """Made when the step's turn comes, since it may depend on what earlier steps found."""
    here: Callable[[], None] | None = None


def steps_of(experiment: Experiment) -> list[Step]:
    """Every step in its order; those of the seed come last."""
    directory = experiment.directory
    return [
        Step("data", 0.2, None, lambda: write_data(experiment)),
        Step("sft", 7, lambda: stage(experiment, "step1_sft", experiment.model, "texts", "sft")),
        Step("reward", 17, lambda: stage(
            experiment, "step2_reward", str(directory / "sft" / "model"), "rewards", "reward"
        )),
        Step("validation", 2, lambda: evaluation_of_sft(experiment, "validation")),
        Step("alpha", 0.1, None, lambda: write_alpha(directory)),
        Step("sft_test", 4, lambda: evaluation_of_sft(experiment, "test")),
        *(
            Step(f"seed-{experiment.seed}/{policy}", 25, _aligning(experiment, policy))
            for policy in POLICIES
        ),
    ]  # fmt: skip


def run(experiment: Experiment, launch: Callable[[list[str]], int]) -> None:
    """Do what is not done yet.

    Raises:
        UserError: the directory holds an experiment with other options.
        RunError: a step failed.
    """
    remember_options(experiment)
    record = Record(experiment.directory / "steps.json")
    steps = steps_of(experiment)
    left = [step for step in steps if step.name not in record.steps]
    done_minutes = seconds = 0.0
    for number, step in enumerate(steps, start=1):
        if step not in left:
            print(f"=== step {number} of {len(steps)}: {step.name}: finished earlier ===")
            continue
        print(f"=== step {number} of {len(steps)}: {step.name} ===", flush=True)
        started = time.monotonic()
        command = step.command() if step.command else []
        if step.here:
            step.here()
        elif code := launch(command):
            raise RunError(
                f"The experiment stopped: {step.name} ended with exit code {code}; the same "
                "command goes on with it"
            )
        took = time.monotonic() - started
        record.add(step.name, took, shlex.join(command))
        done_minutes, seconds = done_minutes + step.minutes, seconds + took
        rest = sum(other.minutes for other in left[left.index(step) + 1 :])
        print(
            f"=== {step.name}: done, {duration(took)}; what remains takes about "
            f"{duration(rest * seconds / done_minutes)} ===\n",
            flush=True,
        )


@dataclass
class Record:
    """steps.json: how long each finished step took, and its command."""

    path: Path

    @property
    def steps(self) -> dict[str, dict[str, Any]]:
        return dict(read_mapping(str(self.path))) if self.path.is_file() else {}

    def add(self, name: str, seconds: float, command: str) -> None:
        steps = self.steps | {name: {"seconds": round(seconds, 1), "command": command}}
        part = self.path.with_suffix(".part")
        part.write_text(json_text(steps))
        part.rename(self.path)


def remember_options(experiment: Experiment) -> None:
    """Write options.json, or check that it says the same.

    Raises:
        UserError: an earlier call had other options, so that its results are those of another
            experiment.
    """
    options = {
        "model": experiment.model,
        "data": experiment.data,
        "prior": experiment.prior,
        "sizes": asdict(experiment.sizes),
    }
    path = experiment.directory / "options.json"
    if path.is_file():
        before = read_mapping(str(path))
        changed = [name for name, value in options.items() if before.get(name) != value]
        if changed:
            raise UserError(
                [f"{name}: {before.get(name)!r} there, {options[name]!r} now" for name in changed]
                + ["choose another --output, remove this one, or give the options of before"],
                f"{experiment.directory} holds an experiment with other options:",
            )
    experiment.directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json_text(options))


def write_data(experiment: Experiment) -> None:
    kept = read_questions(experiment.data)
    print("\n".join(kept.lines()))
    files = convert(kept, experiment.prior, experiment.sizes, STAGES_SEED)
    write_files(files, experiment.directory / "data", experiment.sizes)


def write_alpha(directory: Path) -> None:
    """alpha.json: the threshold that the evaluation of SFT on validation questions speaks for."""
    evaluation = read_mapping(str(directory / "validation" / "evaluation.json"))
    text = (directory / "validation" / "instances.jsonl").read_text(encoding="utf-8")
    instances = [json.loads(line) for line in text.split("\n") if line]
    choice = choose(evaluation, boards_of(evaluation), instances)
    (directory / "alpha.json").write_text(json_text(asdict(choice)))
    print(f"alpha: {choice.alpha:g}")


# Commands


def stage(experiment: Experiment, name: str, model: str, records: str, output: str) -> list[str]:
    """Stage 1 or 2."""
    directory = experiment.directory
    settings = {
        **_going_on(directory / output),
        "seed": STAGES_SEED,
        "model_name_or_path": model,
        "output_dir": str(directory / output),
        **_data(directory, records, f"{records}_eval"),
    }
    return ["bash", _script(f"{name}.sh"), experiment.configs[name], *_overrides(settings)]


def _aligning(experiment: Experiment, policy: str) -> Callable[[], list[str]]:
    """Stage 3 under one regularizer."""

    def command() -> list[str]:
        directory, output = experiment.directory, experiment.of_seed(policy)
        settings = {
            **_going_on(output),
            "seed": experiment.seed,
            "output_dir": str(output),
            "regularizer": regularizer(directory, policy),
            **_models_and_sets(directory, "sets"),
            **_data(directory, "prompts", "prompts_eval"),
        }
        config = experiment.configs["step3_rlhf"]
        return ["bash", _script("step3_rlhf.sh"), config, *_overrides(settings)]

    return command


def evaluation_of_sft(experiment: Experiment, split: str) -> list[str]:
    """SFT on the questions that choose α or on those that are reported, under KL."""
    directory = experiment.directory
    config = read_mapping(experiment.configs["step3_rlhf"])
    ending = "_validation" if split == "validation" else ""
    prompts = "prompts_validation" if split == "validation" else "prompts_eval"
    settings = {
        **{name: config[name] for name in SHARED_WITH_EVALUATIONS if name in config},
        **_models_and_sets(directory, f"sets{ending}"),
        "seed": STAGES_SEED,
        "data": config["data"]
        | {
            "sources": [str(directory / "data" / f"{prompts}.jsonl")],
            "eval_sources": [str(directory / "data" / f"{prompts}.jsonl")],
            "cache_dir": str(directory / "token_ids"),
        },
    }
    if split == "validation":
        settings["evaluation.pairs_per_prompt"] = 8
    folder = directory / ("validation" if split == "validation" else "sft_test")
    return [
        "bash", _script("evaluate.sh"), str(folder), "--overwrite", *_overrides(settings)
    ]  # fmt: skip


def regularizer(directory: Path, policy: str) -> dict[str, Any]:
    if policy == "kl":
        return {"name": "kl", "beta": BETA}
    alpha = read_mapping(str(directory / "alpha.json"))["alpha"]
    return {"name": "conditional_pm", "level": "sequence", "alpha": alpha, "beta": BETA}


def _models_and_sets(directory: Path, sets: str) -> dict[str, Any]:
    return {
        "model_name_or_path": str(directory / "sft" / "model"),
        "reward.model_name_or_path": str(directory / "reward" / "model"),
        "evaluation.response_sets": str(directory / "data" / f"{sets}.jsonl"),
    }


def _data(directory: Path, train: str, held_out: str) -> dict[str, Any]:
    return {
        "data.sources": [str(directory / "data" / f"{train}.jsonl")],
        "data.eval_sources": [str(directory / "data" / f"{held_out}.jsonl")],
        "data.cache_dir": str(directory / "token_ids"),
    }


def _going_on(output: Path) -> dict[str, Any]:
    """A run that was stopped resumes from its checkpoint, if it has one."""
    from training.runtime.resume import complete_checkpoints

    if complete_checkpoints(output / "checkpoints"):
        return {"resume_from_checkpoint": "latest"}
    return {"overwrite_output_dir": True}


def _script(name: str) -> str:
    return os.path.relpath(ROOT / "scripts" / name)


def _overrides(settings: dict[str, Any]) -> list[str]:
    return [
        f"{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in settings.items()
    ]
