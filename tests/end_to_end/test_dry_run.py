"""`--dry-run`: every shipped config, offline, with local copies of the models' configs."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    PreTrainedTokenizerBase,
)

from step1_sft import main as sft
from step1_sft.config import SFTConfig
from step2_reward import main as reward
from step2_reward.config import RewardConfig
from step3_rlhf import main as ppo
from step3_rlhf.config import PPOConfig
from step3_rlhf.direct import main as direct
from step3_rlhf.direct.config import DirectConfig
from training.cli import run_stage
from training.config import shipped_configs

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "model_configs"
STAGES: dict[str, tuple[Any, Any]] = {
    "step1_sft": (SFTConfig, sft),
    "step2_reward": (RewardConfig, reward),
    "step3_rlhf": (PPOConfig, ppo),
    "step3_direct": (DirectConfig, direct),
}
SHIPPED = [
    (script, path)
    for script in STAGES
    for path in shipped_configs()[script]
    # The data of the one is the bundled world's: below. That of the other its experiment writes.
    if not path.stem.startswith(("quickstart", "people"))
]
DryRun = Callable[..., str]


@pytest.fixture
def dry_run(capsys: pytest.CaptureFixture[str]) -> DryRun:
    def run(stage: str, config: Path, *arguments: str) -> str:
        config_class, module = STAGES[stage]
        run_stage(
            config_class,
            module.main,
            [str(config), "--dry-run", *arguments],
            dry_run=module.dry_run,
        )
        return capsys.readouterr().out

    return run


@pytest.fixture
def model_directory(
    tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase
) -> Callable[[str, str], str]:
    """A directory with a model's config and a tokenizer: no weights."""

    def make(family: str, kind: str) -> str:
        directory = tmp_path / kind
        directory.mkdir(exist_ok=True)
        data = json.loads((FIXTURES / f"{family}.json").read_text())
        if kind == "reward":
            data["architectures"] = [
                data["architectures"][0].replace("CausalLM", "SequenceClassification")
            ]
            data |= {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
        (directory / "config.json").write_text(json.dumps(data))
        world_tokenizer.save_pretrained(directory)
        return str(directory)

    return make


@pytest.mark.parametrize(
    ("stage", "path"), SHIPPED, ids=[str(path.relative_to(ROOT)) for _, path in SHIPPED]
)
def test_every_shipped_config_passes_offline(
    stage: str,
    path: Path,
    dry_run: DryRun,
    model_directory: Callable[[str, str], str],
    tmp_path: Path,
) -> None:
    family = re.sub("-(paper|rloo|direct)$", "", path.stem)
    arguments = [
        f"model_name_or_path={model_directory(family, 'policy')}",
        f"output_dir={tmp_path / 'out'}",
        "--processes=4",
        "--gpu-memory=80",
    ]
    if stage == "step3_rlhf":
        arguments.append(f"reward.model_name_or_path={model_directory(family, 'reward')}")
    printed = dry_run(stage, path, *arguments)
    assert "no weights were loaded" in printed
    assert "it fits a GPU of 80 GiB" in printed
    assert "not checked" in printed  # the data is on the Hub
    paper = path.stem.endswith("-paper")
    assert ("The published code's own" in printed) == paper
    assert ("top_p draws from another policy" in printed) == (paper and stage == "step3_rlhf")
    assert not (tmp_path / "out").exists()


def test_every_reward_model_of_a_mixture_takes_memory(
    dry_run: DryRun, model_directory: Callable[[str, str], str], tmp_path: Path
) -> None:
    """Also if all of their directories are named `model`, as stage 2 names them."""
    policy, reward = model_directory("opt-1.3b", "policy"), model_directory("opt-1.3b", "reward")
    groups = [{"model_name_or_path": reward, "share": share} for share in (0.4, 0.6)]
    printed = dry_run(
        "step3_rlhf",
        ROOT / "step3_rlhf" / "configs" / "opt-1.3b-rloo.json",
        f"model_name_or_path={policy}",
        f"output_dir={tmp_path / 'out'}",
        f"reward={json.dumps({'mixture': groups})}",
        "reward_centering=none",
        "--processes=4",
        "--gpu-memory=80",
    )
    assert printed.count("frozen") == 3  # the reference and two reward models
    assert "reward 1" in printed
    assert "reward 2" in printed


def test_later_stages_can_be_checked_before_the_earlier_ones_have_run(
    dry_run: DryRun,
    model_directory: Callable[[str, str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # no runs/opt-1.3b/... here
    base = model_directory("opt-1.3b", "base")
    path = ROOT / "step3_rlhf" / "configs" / "opt-1.3b.json"
    with pytest.raises(SystemExit):
        dry_run("step3_rlhf", path)
    assert "runs/opt-1.3b/sft/model does not exist" in capsys.readouterr().err
    printed = dry_run("step3_rlhf", path, "--processes=4", f"--stand-in={base}")
    for name in ("actor", "critic", "reference", "reward"):
        (line,) = (row for row in printed.splitlines() if row.split()[:1] == [name])
        assert "1,31" in line  # 1.3e9 parameters
    with pytest.raises(SystemExit):
        dry_run("step3_rlhf", path, f"--stand-in={base}", "response_length=2000")
    assert "knows 2048 positions" in capsys.readouterr().err


def test_steps_are_those_of_the_run(
    dry_run: DryRun, stage_settings: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    """24 episodes in iterations of 4 x 2; the tiny world's texts in batches of 4 x 2."""
    settings = stage_settings("ppo") | {"total_episodes": 24, "reward": {"function": "json:dumps"}}
    file = tmp_path / "ppo.json"
    file.write_text(json.dumps(settings))
    printed = dry_run("step3_rlhf", file, "--processes=2")
    assert "responses drawn:      8 in each iteration" in printed
    assert "iterations:           3\n" in printed
    settings = stage_settings("sft")
    del settings["max_steps"]
    file.write_text(json.dumps(settings))
    lines = dry_run("step1_sft", file, "--processes=2").splitlines()
    facts = dict(line.strip().split(":", 1) for line in lines if ":" in line)
    records = int(facts["data"].split()[0])
    assert int(facts["optimizer steps"]) == -(-records // 8)


def test_what_becomes_of_the_data_is_what_the_run_would_say(
    dry_run: DryRun, stage_settings: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    """Steps are those of what is left after tokens have been counted."""
    settings = stage_settings("sft")
    del settings["max_steps"]
    long = tmp_path / "long.jsonl"
    rows = [{"prompt": f"{n} {'long ' * 60}", "response": "Yes."} for n in range(40)]
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings["data"]["sources"].append(str(long))
    settings["data"]["overlong_prompts"] = "drop"
    file = tmp_path / "sft.json"
    file.write_text(json.dumps(settings))
    printed = dry_run("step1_sft", file)
    facts = dict(line.strip().split(":", 1) for line in printed.splitlines() if ":" in line)
    used = int(facts[str(long)].split("; ")[-1].split()[0])
    assert used > 0
    assert f"  training: {used} dropped: a prompt longer than max_prompt_length\n" in printed
    short = int(facts[settings["data"]["sources"][0]].split("; ")[-1].split()[0])
    assert facts["data"].split()[0] == str(short)
    assert int(facts["optimizer steps"]) == -(-short // 4) < -(-(short + used) // 4)


def test_each_phase_of_ppo_is_counted(
    dry_run: DryRun, model_directory: Callable[[str, str], str], tmp_path: Path
) -> None:
    """OPT-1.3B in bf16: 24 layers of 2048, keys and values, 2 bytes; 512 tokens a response."""
    arguments = (
        f"model_name_or_path={model_directory('opt-1.3b', 'policy')}",
        f"reward.model_name_or_path={model_directory('opt-1.3b', 'reward')}",
        f"output_dir={tmp_path / 'out'}",
        'frozen_deepspeed={"zero_optimization": {"stage": 3}}',
        'evaluation.sampling={"response_length": 768, "rollout_batch_size": 48, "top_p": 0.5}',
        "num_mini_batches=1",  # 16 responses in an iteration, fewer than rollout_batch_size
        "--processes=4",
    )
    path = ROOT / "step3_rlhf" / "configs" / "opt-1.3b.json"
    lines = dry_run("step3_rlhf", path, *arguments).splitlines()
    phases = dict(line.strip().split(":", 1) for line in lines if "(" in line and ":" in line)
    a_token = 2 * 24 * 2048 * 2 / 2**30
    weights = 2 * 1_315_758_080 / 2**30
    assert f"key-value cache {a_token * 64 * 512:.2f}" in phases["centering rewards"]
    assert f"gathered weights {weights:.2f}" in phases["centering rewards"]  # ZeRO-3's reference
    assert f"key-value cache {a_token * 16 * 512:.2f}" in phases["drawing responses"]
    assert "gathered" not in phases["drawing responses"]  # ZeRO-2's actor
    assert f"key-value cache {a_token * 48 * 1024:.2f}" in phases["evaluating"]
    assert sum("top_p=0.5" in line for line in lines) == 1


def test_a_reward_model_with_a_head_of_another_kind(
    dry_run: DryRun, stage_settings: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    bert = tmp_path / "bert"
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(names)}, "[UNK]"))
    BertTokenizerFast(tokenizer_object=backend).save_pretrained(bert)
    BertConfig(
        num_labels=1, num_hidden_layers=1, architectures=["BertForSequenceClassification"]
    ).save_pretrained(bert)
    settings = stage_settings("ppo") | {"reward": {"model_name_or_path": str(bert)}}
    file = tmp_path / "ppo.json"
    file.write_text(json.dumps(settings))
    printed = dry_run("step3_rlhf", file)
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line.strip()}
    model = BertForSequenceClassification(BertConfig(num_labels=1, num_hidden_layers=1))
    assert rows["reward"][1] == f"{sum(p.numel() for p in model.parameters()):,}"
    assert "the critic starts from the policy" in printed


def test_what_does_not_fit_is_said_with_what_to_change(
    dry_run: DryRun, model_directory: Callable[[str, str], str], tmp_path: Path
) -> None:
    path = ROOT / "step1_sft" / "configs" / "llama-2-7b.json"
    arguments = (
        f"model_name_or_path={model_directory('llama-2-7b', 'policy')}",
        f"output_dir={tmp_path / 'out'}",
        'deepspeed={"zero_optimization": {"stage": 2}}',
    )
    printed = dry_run("step1_sft", path, *arguments, "--gpu-memory=80")
    assert "it does NOT fit a GPU of 80 GiB" in printed
    assert "deepspeed.zero_optimization.stage=3" in printed
    printed = dry_run("step1_sft", path, *arguments, 'lora={"r": 16}', "--gpu-memory=80")
    assert "it fits a GPU of 80 GiB" in printed


def test_offloaded_models_are_still_trained_and_take_memory_of_the_host(
    dry_run: DryRun, model_directory: Callable[[str, str], str], tmp_path: Path
) -> None:
    printed = dry_run(
        "step3_rlhf",
        ROOT / "step3_rlhf" / "configs" / "llama-2-7b.json",
        f"model_name_or_path={model_directory('llama-2-7b', 'policy')}",
        f"reward.model_name_or_path={model_directory('llama-2-7b', 'reward')}",
        f"output_dir={tmp_path / 'out'}",
        "--processes=4",
    )
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line.strip()}
    assert rows["actor"][1:3] == ["6,738,415,616"] * 2
    assert rows["critic"][2] == rows["critic"][1]
    assert rows["reference"][2] == rows["reward"][2] == "frozen"
    assert "Offloaded to the host: 199 GiB" in printed  # 16 bytes of 2 x 6.7e9


def test_rloo_has_no_critic_and_an_average_takes_four_bytes_a_weight(
    dry_run: DryRun, stage_settings: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    rloo = {"advantage_estimator": "rloo", "critic": None, "num_generations": 2}
    texts = {"ptx_coef": 0.5, "ptx_data": stage_settings("sft")["data"]}
    reward = {"reward": {"function": "json:dumps"}}
    settings = stage_settings("ppo") | rloo | reward | {"ema_decay": 0.9} | texts
    file = tmp_path / "ppo.json"
    file.write_text(json.dumps(settings))
    printed = dry_run("step3_rlhf", file)
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line.strip()}
    assert "critic" not in rows
    assert rows["actor_ema"][1] == rows["actor"][1]
    assert "1 of actor in each iteration" in printed
    assert re.search(r"ptx_data: +\d+ texts, one to each response", printed)
    assert "activations of ptx_data" in printed


def test_what_the_run_would_refuse_the_dry_run_refuses(
    dry_run: DryRun,
    model_directory: Callable[[str, str], str],
    stage_settings: Callable[[str], dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reward_model = model_directory("opt-1.3b", "reward")
    file = tmp_path / "sft.json"
    file.write_text(json.dumps(stage_settings("sft")))
    for override, message in {
        f"model_name_or_path={reward_model}": "is a sequence-classification model",
        'lora={"target_modules": ["nowhere"]}': "lora.target_modules: ",
        'lora={"target_modules": "("}': "lora.target_modules: ",
    }.items():
        with pytest.raises(SystemExit) as caught:
            dry_run("step1_sft", file, override)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


def test_local_data_is_checked_where_the_hub_is_out_of_reach(
    dry_run: DryRun,
    stage_settings: Callable[[str], dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": 7, "response": "x"}\n')
    settings = stage_settings("sft")
    settings["data"]["sources"].append("owner/dataset")
    file = tmp_path / "sft.json"
    file.write_text(json.dumps(settings))
    assert "data:                 not checked: owner/dataset" in dry_run("step1_sft", file)
    settings["data"]["sources"].append(str(broken))
    file.write_text(json.dumps(settings))
    with pytest.raises(SystemExit):
        dry_run("step1_sft", file)
    assert "broken.jsonl:1: 'prompt' is int" in capsys.readouterr().err


def test_a_fault_of_the_config_ends_it(
    dry_run: DryRun, stage_settings: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    settings = stage_settings("sft")
    settings["data"]["max_prompt_length"] = 10_000
    file = tmp_path / "sft.json"
    file.write_text(json.dumps(settings))
    with pytest.raises(SystemExit) as caught:
        dry_run("step1_sft", file)
    assert caught.value.code == 2


@pytest.mark.launcher
def test_through_the_script(
    stage_settings: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    file = tmp_path / "sft.json"
    file.write_text(json.dumps(stage_settings("sft")))
    variables = {
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
        "NUM_PROCESSES": "8",
    }
    ended = subprocess.run(
        ["bash", str(ROOT / "scripts" / "step1_sft.sh"), str(file), "--dry-run", "seed=7"],
        env=os.environ | variables, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "processes:            8" in ended.stdout
