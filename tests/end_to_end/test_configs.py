"""Every shipped config loads, and every launch line of scripts and README fits the real parser."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from deepspeed.launcher.runner import parse_args

from step1_sft.config import SFTConfig
from step2_reward.calibrate.settings import CalibrationConfig
from step2_reward.config import RewardConfig
from step3_rlhf.config import EvaluationConfig, PPOConfig
from step3_rlhf.direct.config import DirectConfig
from step3_rlhf.evaluation import __main__ as evaluate
from step3_rlhf.evaluation.settings import run_settings
from training.cli import stage_parser
from training.config import (
    StrictModel,
    apply_overrides,
    check_config,
    load_config,
    shipped_configs,
)

ROOT = Path(__file__).resolve().parents[2]
CLASSES: dict[str, type[StrictModel]] = {
    "step1_sft": SFTConfig,
    "step2_reward": RewardConfig,
    "step3_rlhf": PPOConfig,
    "step3_direct": DirectConfig,
}
"""By the name of the script."""
SCRIPTS = {"step1_sft.sh": "step1_sft", "step2_reward.sh": "step2_reward",
           "step3_rlhf.sh": "step3_rlhf", "step3_direct.sh": "step3_direct"}  # fmt: skip
MODULES = {"step3_direct": "step3_rlhf.direct"}
"""Packages of the scripts that are no stage by themselves."""
SCRIPT_OF = {path: script for script, paths in shipped_configs().items() for path in paths}
SHIPPED = sorted(SCRIPT_OF)


def strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a config with the key that it stands under."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from strings(entry, name)
    elif isinstance(value, list):
        for entry in value:
            yield from strings(entry, key)


def create_what_is_named(data: dict[str, Any]) -> None:
    """The files and model directories that earlier stages would have written."""
    for key, text in strings(data):
        path = Path(text)
        if path.is_absolute() or not text.startswith("runs/"):
            continue
        if text.endswith(".gguf"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        elif key.endswith("model_name_or_path"):
            path.mkdir(parents=True, exist_ok=True)
            (path / "config.json").write_text("{}")
        elif text.endswith((".jsonl", ".json", ".parquet")):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


OUR_MODELS = ("quickstart", "smollm2", "people")
"""Beginnings of the names of configs that run on a CPU."""
OUR_METHODS = ("-rloo", "-direct")
"""Ends of the names of configs whose method is not the paper's."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs name paths relative to the root; nothing may be found or left there."""
    monkeypatch.chdir(tmp_path)


def test_every_stage_ships_a_config() -> None:
    assert shipped_configs().keys() == CLASSES.keys()
    assert set(SHIPPED) == set(ROOT.glob("step*/**/configs/**/*.json"))


@pytest.mark.parametrize(
    "path",
    [path for path in SHIPPED if not path.stem.startswith(OUR_MODELS)],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_what_a_run_on_gpus_needs(path: Path) -> None:
    """Checkpoints to resume from, little padding, and batches that make a decode step worth it."""
    config: Any = loaded(path, [])
    assert config.save_steps > 0
    assert config.save_total_limit == 2
    if not isinstance(config, PPOConfig):
        assert config.packing
        return
    assert 12 <= config.per_device_eval_batch_size <= 24
    if not path.stem.endswith("-paper"):
        assert config.local_rollout_size() == config.rollout_batch_size >= 48


def loaded(path: Path, overrides: list[str]) -> StrictModel:
    config_class = CLASSES[SCRIPT_OF[path]]
    create_what_is_named(json.loads(path.read_text()))
    for override in overrides:
        key, _, value = override.partition("=")
        if value:
            create_what_is_named({key.split(".")[-1]: value})
    return load_config(config_class, str(path), overrides)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_config_loads(path: Path) -> None:
    config = loaded(path, [])
    again = check_config(type(config), config.model_dump(mode="json"), "config:")
    assert again == config
    if isinstance(config, (PPOConfig, DirectConfig)):
        assert EvaluationConfig.of(config).model_name_or_path == config.model_name_or_path


# Launch lines


OTHERS = {"evaluation": "evaluate.sh", "calibrate": "calibrate.sh"}
"""Scripts that launch a module beside a stage's `main`."""


def documents() -> list[Path]:
    """READMEs are looked at by tests/test_readmes.py."""
    programs = [*ROOT.glob("step*/*.py"), *ROOT.glob("step*/*/main.py")]
    return sorted([*(ROOT / "scripts").glob("*.sh"), *programs])


def launch_lines() -> Iterator[tuple[str, str, list[str]]]:
    """(where, script, arguments) of every `bash scripts/NAME.sh ...` and `launch MODULE ...`."""
    scripts = "|".join([*SCRIPTS, *OTHERS.values()])
    call = re.compile(rf"(?:scripts/|/)({scripts})\"?((?:[ \t]+[^\s;|&#`)]+)*)")
    names = "|".join(["main", *OTHERS])
    direct = re.compile(rf"^\s*launch (step\w+)\.({names})((?:[ \t]+[^\s;|&#]+)*)", re.M)
    modules = {stage: script for script, stage in SCRIPTS.items()}
    for path in documents():
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        found = [(m[1], m[2]) for m in call.finditer(text)]
        found += [(OTHERS.get(m[2]) or modules[m[1]], m[3]) for m in direct.finditer(text)]
        for script, line in found:
            arguments = shlex.split(line)
            if arguments:
                yield str(path.relative_to(ROOT)), script, arguments


LINES = list(launch_lines())


def is_placeholder(argument: str) -> bool:
    return bool(re.search(r"[$\[\]…<>*]|\.\.\.|^CONFIG|^RUN_DIR", argument))


@pytest.mark.parametrize(
    ("where", "script", "arguments"), LINES, ids=[f"{w} {s} {' '.join(a)}" for w, s, a in LINES]
)
def test_every_launch_line_fits_the_real_parser(
    where: str, script: str, arguments: list[str]
) -> None:
    if script in OTHERS.values():
        fields = (EvaluationConfig if script == "evaluate.sh" else CalibrationConfig).model_fields
        overrides = [a for a in arguments[1:] if not is_placeholder(a)]
        assert not [o for o in overrides if not o.startswith("-") and "=" not in o]
        keys = {o.split("=")[0].split(".")[0] for o in overrides if not o.startswith("-")}
        assert keys <= fields.keys()
        return
    config_class = CLASSES[SCRIPTS[script]]
    options = stage_parser(config_class).parse_args(arguments)
    overrides = [o for o in options.overrides if not is_placeholder(o)]
    assert all("=" in override for override in overrides)
    assert {o.split("=")[0].split(".")[0] for o in overrides} <= config_class.model_fields.keys()
    if is_placeholder(options.config):
        return
    path = ROOT / options.config
    assert path.is_file(), f"{where} names {options.config}, which is not there"
    loaded(path, overrides)


def test_launch_lines_were_found() -> None:
    assert {script for _, script, _ in LINES} == {*SCRIPTS, *OTHERS.values()}


RECORDER = """#!/usr/bin/env bash
case "$*" in
    "-m step"*.config* | "-m step3_rlhf.evaluation.settings"* | "-m step2_reward.calibrate"*)
        mapfile -t arguments <<<"$LAUNCH_ARGUMENTS"
        module="${2/.config/.main}"
        printf '%s\\0' "${arguments[@]}" --module "${module%.settings}" "${@:3}" >"$RECORD"
        exit "${RECORDER_EXITS:-0}" ;;
    *) exec "$PYTHON" "$@" ;;
esac
"""
"""Takes the place of the process that checks the config and then becomes the launcher."""


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[..., Any]:
    """Runs a script with a recorder for the launcher; what DeepSpeed's own parser made of it."""
    recorder, record = tmp_path / "bin" / "python", tmp_path / "record"
    recorder.parent.mkdir()
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    environment = os.environ | {
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{recorder.parent}:{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "RECORD": str(record),
        "NUM_PROCESSES": "2",
        "DEEPSPEED_ARGS": "--no_ssh --node_rank=0",
    }
    environment.pop("MASTER_PORT", None)

    def run(script: str, *arguments: str, fails: bool = False) -> Any:
        command = ["bash", str(ROOT / "scripts" / script), *arguments]
        own = {"RECORDER_EXITS": "3"} if fails else {}
        ended = subprocess.run(command, env=environment | own, timeout=120)
        assert bool(ended.returncode) == fails
        launcher = parse_args(record.read_text().split("\0")[:-1])
        assert launcher.module
        assert (launcher.num_gpus, launcher.no_ssh) == (2, True)
        assert 1024 <= launcher.master_port < 65536
        return launcher

    return run


@pytest.mark.parametrize("script", [*SCRIPTS, *OTHERS.values()])
def test_a_script_starts_its_stage_with_arguments_that_every_parser_knows(
    script: str, recorded: Callable[..., Any]
) -> None:
    given = ["some config.json", "seed=7", "output_dir=a b"]
    launcher = recorded(script, *given)
    assert launcher.user_args == given
    stage = SCRIPTS.get(script)
    others = {"evaluate.sh": "step3_rlhf.evaluation", "calibrate.sh": "step2_reward.calibrate"}
    package = MODULES.get(str(stage), stage)
    assert launcher.user_script == (f"{package}.main" if stage else others[script])
    if stage:
        options = stage_parser(CLASSES[stage]).parse_args(["--local_rank=0", *launcher.user_args])
        assert (options.config, options.overrides) == (given[0], given[1:])


PHASES = "sft reward kl pm conditional_pm maximum_entropy js_divergence forward_kl chi_squared "
PHASES += "rloo classes dpo direct reward_luce luce ptx ema reward_group1 reward_group2 "
PHASES += "reward_pooled weighted_sum pooled mixture"


@pytest.mark.parametrize("phase", [*PHASES.split(), "sft_evaluation"])
def test_every_phase_of_the_quickstart_starts_with_a_config_that_loads(
    phase: str, recorded: Callable[..., Any], tmp_path: Path
) -> None:
    directory = tmp_path / "quickstart"
    rewards = [f"reward{kind}" for kind in ("", "_luce", "_group1", "_group2", "_pooled")]
    for name in ("world/base", "sft/model", *(f"{reward}/model" for reward in rewards)):
        (directory / name).mkdir(parents=True)
        (directory / name / "config.json").write_text("{}")
    files = "texts texts_eval comparisons comparisons_eval response_sets answer_key"
    of_groups = [f"comparisons_group{group}" for group in ("1", "1_eval", "2", "2_eval")]
    (directory / "two_groups").mkdir()
    for name in (*files.split(), *of_groups):
        for world in ("world", "two_groups"):
            (directory / world / f"{name}.jsonl").touch()
    if phase == "sft" or phase in rewards:  # --only removes the phase's own results first
        (directory / phase / "model").rename(tmp_path / "model")
    launcher = recorded("quickstart.sh", "--only", phase, "--output", str(directory), "--seed", "7")
    if phase == "sft_evaluation":
        run_dir, *overrides = (word for word in launcher.user_args if word != "--overwrite")
        settings = run_settings(run_dir)
        faults = apply_overrides(settings, overrides)
        config: Any = check_config(EvaluationConfig, settings, "config:", faults)
        assert config.model_name_or_path == str(directory / "sft" / "model")
    else:
        options = stage_parser(StrictModel).parse_args(launcher.user_args)
        package = launcher.user_script.removesuffix(".main")
        config_class = CLASSES[package.replace("rlhf.direct", "direct")]
        config = load_config(config_class, str(ROOT / options.config), options.overrides)
        assert Path(config.output_dir) == directory / phase
        if config_class in (PPOConfig, DirectConfig):
            of_method = {"dpo": "kl", "luce": "generalized_pl"}
            names = {"f_divergence", phase, of_method.get(phase), "conditional_pm"}
            assert config.regularizer.name in names
            of_phase: dict[str, tuple[str, ...]] = {"luce": ("_luce",), "pooled": ("_pooled",)}
            of_phase |= dict.fromkeys(("weighted_sum", "mixture"), ("_group1", "_group2"))
            wanted = [str(directory / f"reward{kind}/model") for kind in of_phase.get(phase, ("",))]
            models = config.reward.weighted_models
            assert [model.model_name_or_path for model in models] == wanted
    assert config.seed == 7


# training_scripts/ of github.com/JiancongXiao/PM_RLHF: examples per GPU, weight decay.
PUBLISHED = {
    "step1_sft/configs/opt-1.3b.json": (30, 0.0),
    "step1_sft/configs/llama-2-7b.json": (30, 0.0),
    "step1_sft/configs/llama-3.2-1b.json": (30, 0.0),
    "step1_sft/configs/llama-3.2-3b.json": (30, 0.0),
    "step2_reward/configs/opt-1.3b.json": (24, 0.1),
    "step2_reward/configs/opt-1.3b-paper.json": (24, 0.1),
    "step2_reward/configs/llama-2-7b.json": (36, 0.1),
    "step2_reward/configs/llama-2-7b-paper.json": (36, 0.1),
    "step2_reward/configs/llama-3.2-1b.json": (36, 0.1),
    "step2_reward/configs/llama-3.2-3b.json": (36, 0.1),
    "step3_rlhf/configs/opt-1.3b.json": (16, 0.1),  # 4 there, which trains slowly
    "step3_rlhf/configs/opt-1.3b-paper.json": (4, 0.1),
    "step3_rlhf/configs/llama-2-7b.json": (24, 0.1),
    "step3_rlhf/configs/llama-2-7b-paper.json": (24, 0.1),
    "step3_rlhf/configs/llama-3.2-1b.json": (24, 0.1),
    "step3_rlhf/configs/llama-3.2-3b.json": (24, 0.1),
}


def test_all_but_our_own_models_have_published_settings() -> None:
    names = {str(path.relative_to(ROOT)) for path in SHIPPED}
    own = {name for name in names if Path(name).stem.startswith(OUR_MODELS)}
    own |= {name for name in names if Path(name).stem.endswith(OUR_METHODS)}
    assert names - own == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_are_the_published_ones(name: str) -> None:
    data = json.loads((ROOT / name).read_text())
    ppo = name.startswith("step3")
    for optimizer in (data["actor"], data["critic"]) if ppo else (data,):
        assert optimizer["learning_rate"] == (1e-6 if ppo else 1e-5)
        assert optimizer.get("lr_scheduler_type", "cosine") == "cosine"
        assert "warmup_ratio" not in optimizer  # 0
        decay = optimizer.get("weight_decay", 0.0)
        assert (data["per_device_train_batch_size"], decay) == PUBLISHED[name]
    assert data["num_train_epochs"] == (1 if ppo else 2)
    assert (data["bf16"], data["gradient_checkpointing"]) == (True, True)
    assert data["deepspeed"]["zero_optimization"]["stage"] == 2
    assert data["data"]["stage_proportions"] == [0.2, 0.4, 0.4]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_text_has_512_tokens_as_the_published_ones_have(name: str) -> None:
    data = json.loads((ROOT / name).read_text())
    lengths, tldr = data["data"], "llama-3.2" in name
    prompt, response = lengths["max_prompt_length"], lengths["max_response_length"]
    if name.startswith("step3"):
        assert (prompt, response) == ((448, 64) if tldr else (256, 256))
        assert data["response_length"] == response
        assert "max_length" not in lengths
    else:
        assert (prompt, response) == ((448, 128) if tldr else (384, 384))
        assert lengths["max_length"] == 512


@pytest.mark.parametrize(
    ("model", "base"),
    [("opt-1.3b", "facebook/opt-1.3b"), ("llama-2-7b", "meta-llama/Llama-2-7b-hf")],
)
def test_the_papers_variants_differ_in_what_they_say(model: str, base: str) -> None:
    def pair(stage: str) -> tuple[dict[str, Any], dict[str, Any]]:
        both = (ROOT / stage / "configs" / f"{model}{kind}.json" for kind in ("", "-paper"))
        default, paper = (json.loads(path.read_text()) for path in both)
        return default, paper

    default, paper = pair("step2_reward")
    assert default["model_name_or_path"] == f"runs/{model}/sft/model"
    expected = {"model_name_or_path": base, "output_dir": f"runs/{model}-paper/reward"}
    assert f"{model}.json" in paper.pop("description")
    assert paper == default | expected

    default, paper = pair("step3_rlhf")
    assert default.pop("reward_centering") == "reference_mean"
    assert f"{model}.json" in paper.pop("description")
    assert paper["evaluation"].get("sampling", {}).pop("top_p", 0.9) == 0.9
    assert default.pop("num_mini_batches") > 1  # it draws for several steps at once
    batches = {"opt-1.3b": 4, "llama-2-7b": 24}
    published = {
        "per_device_train_batch_size": batches[model],
        "rollout_batch_size": 24,
        "save_steps": paper["save_steps"],  # its iterations are shorter
    }
    assert paper == default | published | {
        "output_dir": f"runs/{model}-paper/conditional_pm",
        "reward": {"model_name_or_path": f"runs/{model}-paper/reward/model"},
        "data": default["data"] | {"overlong_prompts": "drop"},
        "top_p": 0.9,
        "reward_clip": 5.0,
    }


def test_the_smollm2_run_with_another_seed_starts_at_its_beginning(
    recorded: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "SmolLM2-135M-Instruct.gguf").touch()
    data = tmp_path / "data.jsonl.gz"
    data.touch()
    settings = f'seed=7 data.cache_dir={tmp_path}/token_ids data.sources=["{data}"]'
    (tmp_path / "1_sft.finished").write_text(f"{settings}\n")
    script = ["smollm2.sh", "--data", str(data), "--output", str(tmp_path), "--seed", "8"]
    assert recorded(*script, fails=True).user_script == "step1_sft.main"


@pytest.mark.parametrize(("stage", "done"), [("step1_sft", 0), ("step2_reward", 1), ("sweep", 2)])
def test_every_phase_of_the_smollm2_run_starts_with_a_config_that_loads(
    stage: str, done: int, recorded: Callable[..., Any], tmp_path: Path
) -> None:
    directory = tmp_path / "smollm2"
    directory.mkdir()
    (directory / "SmolLM2-135M-Instruct.gguf").touch()
    data = tmp_path / "data.jsonl.gz"
    data.touch()
    settings = f'seed=7 data.cache_dir={directory}/token_ids data.sources=["{data}"]'
    for name in ("1_sft", "2_reward")[:done]:
        (directory / f"{name}.finished").write_text(f"{settings}\n")
    for name in ("sft", "reward")[:done]:
        (directory / name / "model").mkdir(parents=True)
        (directory / name / "model" / "config.json").write_text("{}")
    script = ["smollm2.sh", "--data", str(data), "--output", str(directory), "--seed", "7"]
    launcher = recorded(*script, fails=True)  # or the next phase would start
    module = launcher.user_script.removesuffix(".main")
    assert module == ("step3_rlhf" if stage == "sweep" else stage)
    options = stage_parser(CLASSES[module]).parse_args(launcher.user_args)
    config: Any = load_config(CLASSES[module], str(ROOT / options.config), options.overrides)
    assert (config.seed, config.data.sources[0].path) == (7, str(data))
    assert config.output_dir.startswith(str(directory))
    if stage == "sweep":  # the other cells of which have failed before
        assert config.regularizer.name == "kl"


def test_the_evaluations_parser(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        evaluate.main(["--local_rank=0", str(tmp_path), "sede=7", "nonsense"])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "override 'nonsense': write it as key.path=value" in message
    assert "sede: unknown key; did you mean 'seed'?" in message
    assert "model_name_or_path: Field required" in message
