"""The README files of stage 3 define every figure that a run writes, and no other; examples run."""

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import torch
from transformers import PreTrainedTokenizerBase

import step3_rlhf
from step3_rlhf.config import EvaluationConfig, PPOConfig
from step3_rlhf.evaluation.held_out import HeldOut
from step3_rlhf.evaluation.measure import evaluate
from step3_rlhf.main import models_of, train
from step3_rlhf.regularizers import REGULARIZERS, Regularizer, parse_regularizer
from step3_rlhf.regularizers.divergences import DIVERGENCES
from step3_rlhf.regularizers.f_divergence import FDivergence
from step3_rlhf.regularizers.generalized_pl import GeneralizedPL
from step3_rlhf.regularizers.links import LINKS
from step3_rlhf.response_sets import read_response_sets
from step3_rlhf.rollout import encode_prompt_texts
from step3_rlhf.trainer import PPOTrainer
from training.config import check_config
from training.data import encode_responses
from training.statistics import Estimate

STAGE = Path(step3_rlhf.__file__).parent
README = (STAGE / "README.md").read_text(encoding="utf-8")
EVALUATION = (STAGE / "evaluation" / "README.md").read_text(encoding="utf-8")
REGULARIZER = (STAGE / "regularizers" / "README.md").read_text(encoding="utf-8")

Build = Callable[..., PPOTrainer]
NATURAL = {"name": "conditional_pm", "alpha": 0.02}
"""The regularizer that has every figure."""


def section(text: str, heading: str) -> str:
    """The text between a heading and the next one of any level."""
    (found,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text, re.M | re.S)
    return found


def rows(text: str) -> list[list[str]]:
    """The cells of all table rows, headings included."""
    lines = [line for line in re.findall(r"^\|(.*)\|$", text, re.M) if set(line) - set("-|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]


def defined(text: str) -> set[str]:
    """The keys in the first cells of a section's table."""
    found = [key for row in rows(text) for key in re.findall(r"`([^`]+)`", row[0])]
    assert len(found) == len(set(found)), "a key is defined twice"
    return set(found)


def code(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


@pytest.fixture
def held_out(tiny_world: Path, world_tokenizer: PreTrainedTokenizerBase) -> HeldOut:
    """Prompts, texts and response sets, so that an evaluation has every kind of figure."""
    prompts = ["Please suggest a drink.", "What is a good pet?"]
    ids = encode_prompt_texts(prompts, world_tokenizer)
    texts = list(zip(ids, encode_responses(["tea", "a cat"], world_tokenizer), strict=True))
    sets = read_response_sets(str(tiny_world / "two_sets.jsonl"))
    return HeldOut(ids, prompts, texts, sets)


@pytest.mark.usefixtures("process_group")
def test_every_key_of_metrics_jsonl_is_defined_and_no_other(
    build: Build, held_out: HeldOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys of a real run's lines, with an evaluation, and those that fp16 adds."""
    trainer = build(eval_steps=1, regularizer=NATURAL, num_generations=2)
    config = trainer.config
    Path(config.output_dir).mkdir()
    train(trainer, 2, held_out, EvaluationConfig.of(config))
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    written = {key for line in lines for key in json.loads(line)}
    assert {"step", "objective/kl", "validation/tv_to_population"} <= written
    for module in (trainer.actor, trainer.critic):
        monkeypatch.setattr(module.engine, "fp16_enabled", lambda: True)
        monkeypatch.setattr(module.engine.optimizer, "loss_scale", 1.0, raising=False)
    written |= trainer.optimizer_metrics().keys()
    of_other_settings = {
        "sampling/logp_difference",
        "time/old_scores",
        "time/centering",
        "loss/ptx",
    }
    written |= of_other_settings
    assert defined(section(README, "Glossary")) == written


def test_every_metric_has_a_formula() -> None:
    tables = [section(README, "Glossary")]
    headings = ("evaluation.json", "exact", "per_prompt", "instances.jsonl")
    tables += [section(EVALUATION, heading) for heading in headings]
    for table in tables:
        heading, *metrics = rows(table)
        assert heading == ["key", "formula", "unit", "what to look for"]
        assert all(len(row) == 4 and row[1] for row in metrics)


@pytest.mark.usefixtures("process_group")
def test_every_figure_of_an_evaluation_is_defined_and_no_other(
    build: Build, held_out: HeldOut
) -> None:
    trainer = build(regularizer=NATURAL)
    config = EvaluationConfig.of(trainer.config)
    figures, instances = evaluate(models_of(trainer), held_out, trainer.regularizer, config)
    top = figures.keys() - {"held_out_text"}
    top |= {f"held_out_text.{key}" for key in figures["held_out_text"]}
    assert defined(section(EVALUATION, "evaluation.json")) == top
    assert defined(section(EVALUATION, "exact")) == figures["exact"].keys()
    softplus = parse_regularizer({"name": "generalized_pl", "g": "softplus"})  # has a `choice`
    others, _ = evaluate(models_of(trainer), held_out, softplus, config)
    entries = figures["exact"]["per_prompt"] + others["exact"]["per_prompt"]
    of_a_prompt = {key for entry in entries for key in entry}
    assert defined(section(EVALUATION, "per_prompt")) == of_a_prompt
    (instance, *_) = instances
    keys = instance.keys() | {f"responses.{key}" for key in instance["responses"][0]}
    assert defined(section(EVALUATION, "instances.jsonl")) == keys
    estimates = [value for value in figures.values() if isinstance(value, dict) and "mean" in value]
    keys = [field.name for field in dataclasses.fields(Estimate)]
    assert all(list(value) == keys for value in estimates)
    assert str(keys).replace("'", '"').strip("[]") in EVALUATION


def test_the_example_config_is_sound() -> None:
    (example,) = code(README, "json")
    config = check_config(PPOConfig, json.loads(example), "the example:")
    assert config.regularizer.name == "conditional_pm"
    required = {name for name, field in PPOConfig.model_fields.items() if field.is_required()}
    assert json.loads(example).keys() == required | {"critic"}  # "a config needs these settings"


def test_the_example_response_set_is_sound(tmp_path: Path) -> None:
    (example,) = code(EVALUATION, "json")
    file = tmp_path / "sets.jsonl"
    file.write_text(example)
    (found,) = read_response_sets(str(file))
    assert found.population == (0.6, 0.4)


def test_the_steps_are_those_of_the_trainer() -> None:
    steps = [row[0] for row in rows(section(README, "One iteration"))[1:]]
    assert [step.split(".")[0] for step in steps] == [str(number) for number in range(1, 11)]
    source = (STAGE / "trainer.py").read_text()
    assert all(re.search(rf"# {number}\. ", source) for number in range(1, 11))
    for _, files, *_ in rows(section(README, "One iteration"))[1:]:
        assert all((STAGE / name).exists() for name in re.findall(r"`([^`]+)`", files))


# Regularizers


def test_every_regularizer_is_in_the_table() -> None:
    by_heading: dict[str, set[str]] = {}
    for heading, *entries in tables_of(REGULARIZER):
        by_heading[heading[0]] = {name for row in entries for name in re.findall("`(.*?)`", row[0])}
    assert by_heading['`"regularizer": {"name": …}`'] == set(REGULARIZERS)
    divergences = get_args(FDivergence.model_fields["divergence"].annotation)
    assert by_heading["`divergence`"] == set(DIVERGENCES) == set(divergences)
    links = get_args(GeneralizedPL.model_fields["g"].annotation)
    assert by_heading["`g`"] == set(LINKS) == set(links)


def tables_of(text: str) -> list[list[list[str]]]:
    return [rows(table) for table in re.findall(r"(?:^\|.*\n)+", text, re.M)]


def test_every_parameter_is_in_the_table() -> None:
    table = rows(section(REGULARIZER, "Parameters"))
    named = {name for row in table if len(row) == 4 for name in re.findall("`(.*?)`", row[1])}
    known = {name for kind in REGULARIZERS.values() for name in kind.model_fields} - {"name"}
    assert known <= named
    assert named - known == set()


def test_the_example_regularizer_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """w = e^{−0.5} per token: −β Σ (log π_t + 0.5)."""
    (example,) = code(REGULARIZER, "python")
    module = ModuleType("regularizer_of_the_readme")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(example, "README.md", "exec"), module.__dict__)
    settings: dict[str, Any] = {"class": f"{module.__name__}:LengthPenalty", "strength": 0.5}
    regularizer: Regularizer = parse_regularizer(settings)
    logp = torch.tensor([[-1.0, -2.0]])
    marginal = regularizer.marginal(logp, logp, torch.ones(1, 2, dtype=torch.bool))
    assert marginal.per_token.tolist() == [[0.5, 1.5]]


@pytest.mark.parametrize("file", ["README.md", "evaluation/README.md", "regularizers/README.md"])
def test_files_of_this_stage_that_are_named_exist(file: str) -> None:
    text = (STAGE / file).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    named = [((STAGE / file).parent / link).resolve() for link in links]
    own = [path for path in named if path.is_relative_to(STAGE)]
    assert own
    assert [path for path in own if not path.exists()] == []
    for path in re.findall(r"`(tests/[\w/.]+)`", text):
        assert (STAGE.parent / path).exists(), path
