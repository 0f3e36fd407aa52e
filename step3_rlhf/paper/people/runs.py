"""The steps of the experiment, one after the other; what is finished is not run again."""

import json
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from step3_rlhf.paper.grid.run import duration
from step3_rlhf.paper.people.alpha import choose
from step3_rlhf.paper.people.boards import boards_of
from step3_rlhf.paper.people.data.convert import Sizes, convert, write_files
from step3_rlhf.paper.people.data.questions import read_questions
from step3_rlhf.paper.people.data.records import Form, Prior
from training.config import read_mapping
from training.errors import RunError, UserError
from training.runtime.json_text import json_text
from training.runtime.resume import complete_checkpoints

ROOT = Path(__file__).resolve().parents[3]

STAGES_SEED = 42
"""Seed of the data, of SFT and of the reward model, which the runs of all seeds share."""

POLICIES = ("kl", "conditional_pm")

BETA = 1.0

VALIDATION_PAIRS = 4
"""Pairs of draws to each validation question, by which the mass outside is estimated."""

Method = Literal["direct", "rloo"]
"""How policies are aligned: from people's rankings themselves, or from draws and their rewards."""

ALIGNING = {
    "direct": ("step3_direct.sh", "people-direct.json", "rankings", "rankings_eval"),
    "rloo": ("step3_rlhf.sh", "people.json", "prompts", "prompts_validation"),
}
"""For each method its script, its config, and the records that it learns and chooses by."""

MEASURED_WITH = (
    "bf16 packing response_length rollout_batch_size per_device_eval_batch_size"
).split()
"""Settings of the alignment that its measurement has too."""


@dataclass(frozen=True)
class Experiment:
    """What the user asked for."""

    directory: Path
    model: str
    """What SFT starts from."""
    data: str | None = None
    """A file of questions; None is the Hub's data set."""
    prior: Prior = "people"
    form: Form = "listed"
    method: Method = "direct"
    seed: int = 42
    """Of the two aligned policies."""
    sizes: Sizes = field(default_factory=Sizes)
    configs: dict[str, str] = field(default_factory=dict)
    """Configs in place of the shipped ones, by stage: step1_sft, step2_reward, step3_rlhf."""

    def config(self, stage: str) -> str:
        """The stage's config, from where the user stands."""
        name = ALIGNING[self.method][1] if stage == "step3_rlhf" else "people.json"
        return self.configs.get(stage) or os.path.relpath(ROOT / stage / "configs" / name)

    def of_seed(self, policy: str) -> Path:
        return self.directory / f"seed-{self.seed}" / policy


@dataclass(frozen=True)
class Step:
    """One step: a command, or something that is done here."""

    name: str
    minutes: float
    """What it takes on one core, about; only the proportions matter, for the estimate."""
    command: Callable[[], list[str]] | None
    """Made when the step's turn comes, since it may depend on what earlier steps found."""
    here: Callable[[], None] | None = None


def steps_of(experiment: Experiment) -> list[Step]:
    """Every step in its order; those of the seed come last."""
    directory = experiment.directory
    sft = str(directory / "sft" / "model")
    steps = [
        Step("data", 0.1, None, lambda: write_data(experiment)),
        Step("sft", 7, lambda: stage(experiment, "step1_sft", experiment.model, "texts", "sft")),
        Step("reward", 23, lambda: stage(experiment, "step2_reward", sft, "rewards", "reward")),
        Step("validation", 4, lambda: measuring(experiment, directory / "validation", sft)),
        Step("alpha", 0.1, None, lambda: write_alpha(directory, experiment.method)),
        Step("sft test", 2, lambda: measuring(experiment, directory / "sft_test", sft)),
    ]
    for policy in POLICIES:
        run = experiment.of_seed(policy)
        name = f"{policy}, seed {experiment.seed}"
        steps += [
            Step(name, 25, partial(aligning, experiment, policy)),
            Step(f"{name}, test", 2, partial(measuring, experiment, run)),
        ]
    return steps


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
        "form": experiment.form,
        "method": experiment.method,
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
    files = convert(kept, experiment.prior, experiment.form, experiment.sizes, STAGES_SEED)
    write_files(files, experiment.directory / "data", experiment.sizes)


def write_alpha(directory: Path, method: Method) -> None:
    """alpha.json: the threshold that the evaluation of SFT on validation questions speaks for."""
    evaluation = read_mapping(str(directory / "validation" / "evaluation.json"))
    text = (directory / "validation" / "instances.jsonl").read_text(encoding="utf-8")
    instances = [json.loads(line) for line in text.split("\n") if line]
    choice = choose(evaluation, boards_of(evaluation), instances, method == "rloo")
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
    return ["bash", _script(f"{name}.sh"), experiment.config(name), *_overrides(settings)]


def aligning(experiment: Experiment, policy: str) -> list[str]:
    """Stage 3 under one regularizer, or direct optimization of the same."""
    directory, output = experiment.directory, experiment.of_seed(policy)
    script, _, records, held_out = ALIGNING[experiment.method]
    settings = {
        **_going_on(output),
        "seed": experiment.seed,
        "model_name_or_path": str(directory / "sft" / "model"),
        "output_dir": str(output),
        "regularizer": regularizer(directory, policy),
        **_data(directory, records, held_out),
    }
    if experiment.method == "rloo":
        settings["reward"] = _reward(directory)
    else:
        converted = read_mapping(str(directory / "data" / "counts.json"))
        settings["data.stage_proportions"] = converted["direct_proportions"]
    return ["bash", _script(script), experiment.config("step3_rlhf"), *_overrides(settings)]


def measuring(experiment: Experiment, folder: Path, model: str | None = None) -> list[str]:
    """An evaluation on the held-out questions, or on validation questions into `validation`.

    Args:
        folder: a run whose policy is measured, or where the results of another model go.
        model: the other model; it is its own reference.
    """
    directory, data = experiment.directory, experiment.directory / "data"
    config = read_mapping(experiment.config("step3_rlhf"))
    validation = folder.name == "validation"
    split = "validation" if validation else "eval"
    settings: dict[str, Any] = {
        **({} if model is None else {"model_name_or_path": model}),
        **{name: config[name] for name in MEASURED_WITH if name in config},
        "seed": STAGES_SEED,
        "reward": _reward(directory),
        "data": config["data"]
        | {
            "sources": [str(data / "prompts.jsonl")],
            "eval_sources": [str(data / f"prompts_{split}.jsonl")],
            "stage_proportions": [0.0, 0.0, 1.0],
            "validation_share": 0.0,  # the questions were divided by the converter
            "cache_dir": str(directory / "token_ids"),
        },
        "evaluation": {
            "response_sets": str(data / f"sets_{split}.jsonl"),
            "pairs_per_prompt": VALIDATION_PAIRS if validation else 1,
        },
    }
    return ["bash", _script("evaluate.sh"), str(folder), "--overwrite", *_overrides(settings)]


def regularizer(directory: Path, policy: str) -> dict[str, Any]:
    if policy == "kl":
        return {"name": "kl", "beta": BETA}
    alpha = read_mapping(str(directory / "alpha.json"))["alpha"]
    return {"name": "conditional_pm", "level": "sequence", "alpha": alpha, "beta": BETA}


def _reward(directory: Path) -> dict[str, str]:
    return {"model_name_or_path": str(directory / "reward" / "model")}


def _data(directory: Path, train: str, held_out: str) -> dict[str, Any]:
    return {
        "data.sources": [str(directory / "data" / f"{train}.jsonl")],
        "data.eval_sources": [str(directory / "data" / f"{held_out}.jsonl")],
        "data.cache_dir": str(directory / "token_ids"),
    }


def _going_on(output: Path) -> dict[str, Any]:
    """A run that was stopped resumes from its checkpoint, if it has one."""
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
