"""The three stages through the real scripts and the real launcher, on one process and on two.

The global batch is the same on both, so every figure must be the same: ranks, accumulation and
ZeRO stages change nothing.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

pytestmark = pytest.mark.launcher

ROOT = Path(__file__).resolve().parents[2]
ZERO_2 = 'deepspeed={"zero_optimization": {"stage": 2}}'
ZERO_3 = 'deepspeed={"zero_optimization": {"stage": 3}}'


@dataclass(frozen=True)
class Run:
    """What one launch left behind."""

    output: Path
    printed: str

    @property
    def metrics(self) -> list[dict[str, Any]]:
        lines = (self.output / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def json(self, name: str) -> dict[str, Any]:
        return json.loads((self.output / name).read_text())


def launch(script: str, processes: int, output: Path, *arguments: str) -> Run:
    variables = {
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
        "NUM_PROCESSES": str(processes),
        "OMP_NUM_THREADS": "1",
    }
    ended = subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *arguments],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert ended.returncode == 0, ended.stdout[-6000:]
    return Run(output, ended.stdout)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline")


def write_config(workshop: Path, world: Path, stage: str, **settings: Any) -> str:
    kind = "texts" if stage == "sft" else "comparisons"
    data = {
        "sources": [str(world / f"{kind}.jsonl")],
        "eval_sources": [str(world / f"{kind}_eval.jsonl")],
        "max_eval_samples": 9,
        "max_prompt_length": 48,
        "max_response_length": 16,
        "cache_dir": str(workshop / "token_ids"),
    }
    path = workshop / f"{stage}.json"
    path.write_text(json.dumps({"data": data, "per_device_train_batch_size": 4, **settings}))
    return str(path)


ON_ONE, ON_TWO = "gradient_accumulation_steps=2", "gradient_accumulation_steps=1"


def on_one_and_two(script: str, config: str, workshop: Path, zero: str) -> tuple[Run, Run]:
    name = Path(config).stem
    one, two = workshop / f"{name}_1", workshop / f"{name}_2"
    return (
        launch(script, 1, one, config, f"output_dir={one}", ON_ONE),
        launch(script, 2, two, config, f"output_dir={two}", ON_TWO, zero),
    )


@pytest.fixture(scope="module")
def sft(workshop: Path, tiny_world: Path) -> tuple[Run, Run]:
    config = write_config(
        workshop, tiny_world, "sft", model_name_or_path=str(tiny_world / "base"),
        learning_rate=2e-3, max_steps=4, eval_steps=2,
    )  # fmt: skip
    return on_one_and_two("step1_sft.sh", config, workshop, ZERO_2)


@pytest.fixture(scope="module")
def reward(sft: tuple[Run, Run], workshop: Path, tiny_world: Path) -> tuple[Run, Run]:
    config = write_config(
        workshop, tiny_world, "reward", model_name_or_path=str(sft[0].output / "model"),
        learning_rate=1e-3, max_steps=3, eval_steps=1,
    )  # fmt: skip
    return on_one_and_two("step2_reward.sh", config, workshop, ZERO_3)


@pytest.fixture(scope="module")
def ppo_config(
    sft: tuple[Run, Run], reward: tuple[Run, Run], workshop: Path, tiny_world: Path
) -> str:
    optimizer = {"learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    return write_config(
        workshop,
        tiny_world,
        "ppo",
        model_name_or_path=str(sft[0].output / "model"),
        reward={"model_name_or_path": str(reward[0].output / "model")},
        regularizer={"name": "conditional_pm", "alpha": 0.3},
        actor=optimizer,
        critic=optimizer,
        total_episodes=24,
        response_length=6,
        evaluation={"response_sets": str(tiny_world / "two_sets.jsonl"), "max_prompts": 5},
    )


@pytest.fixture(scope="module")
def ppo(ppo_config: str, workshop: Path) -> tuple[Run, Run]:
    return on_one_and_two("step3_rlhf.sh", ppo_config, workshop, ZERO_2)


def means(report: dict[str, Any]) -> dict[str, float]:
    figures = {**report, **report.get("exact", {})}
    return {k: v["mean"] for k, v in figures.items() if isinstance(v, dict) and "mean" in v}


def responses(run: Run) -> list[list[float]]:
    """The figures of every response of the final evaluation."""
    lines = (run.output / "instances.jsonl").read_text(encoding="utf-8").split("\n")
    drawn = [response for line in lines if line for response in json.loads(line)["responses"]]
    names = ("logp", "ref_logp", "reward", "length", "ended")
    return [[float(response[name]) for name in names] for response in drawn]


def assert_same_figures(one: Run, two: Run) -> None:
    """Losses, rewards and lengths of every logged step.

    Without times, memory, the gradient norm (only ZeRO keeps it) and explained variance (of returns
    that hardly vary: ill-conditioned).
    """
    left_out = ("seconds", "time/", "memory/", "train/grad_norm", "actor/grad_norm",
                "critic/grad_norm", "val/explained_variance")  # fmt: skip
    assert len(one.metrics) == len(two.metrics) > 0
    for first, second in zip(one.metrics, two.metrics, strict=True):
        names = [name for name in first if not name.startswith(left_out)]
        assert {k: first[k] for k in names} == pytest.approx(
            {k: second[k] for k in names}, rel=1e-3, abs=1e-4
        )


@pytest.fixture(scope="module")
def direct(sft: tuple[Run, Run], workshop: Path, tiny_world: Path) -> tuple[Run, Run]:
    config = write_config(
        workshop, tiny_world, "direct", model_name_or_path=str(sft[0].output / "model"),
        regularizer={"name": "conditional_pm", "alpha": 0.3}, anchor={"weight": 0.5},
        learning_rate=1e-3, max_steps=3, eval_steps=1, response_length=6,
        evaluation={"response_sets": str(tiny_world / "two_sets.jsonl"), "max_prompts": 5},
    )  # fmt: skip
    return on_one_and_two("step3_direct.sh", config, workshop, ZERO_2)


# Stage 1


def test_sft_writes_its_contract(sft: tuple[Run, Run]) -> None:
    for run in sft:
        assert {"config.json", "metrics.jsonl", "model"} <= {p.name for p in run.output.iterdir()}
        assert [line["step"] for line in run.metrics] == [1, 2, 3, 4]
        assert {"train/loss", "train/learning_rate"} <= run.metrics[0].keys()
        evaluated = [line for line in run.metrics if "validation/loss" in line]
        assert [line["step"] for line in evaluated] == [2, 4]
        last = evaluated[-1]
        assert last["validation/perplexity"] == pytest.approx(math.exp(last["validation/loss"]))
        assert last["validation/loss"] < evaluated[0]["validation/loss"]
        assert str(run.output / "model") in run.printed  # says where the results are
        assert run.printed.count("SFT is done") == 1
        assert run.json("config.json")["warmup_ratio"] == 0.0  # resolved, defaults included


def test_sft_on_two_processes_is_sft_on_one(sft: tuple[Run, Run]) -> None:
    assert_same_figures(*sft)


def test_the_sft_model_loads(sft: tuple[Run, Run]) -> None:
    one, two = (AutoModelForCausalLM.from_pretrained(run.output / "model") for run in sft)
    for (name, value), other in zip(
        one.state_dict().items(), two.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, other, rtol=0, atol=2e-3, msg=name)
    tokenizer = AutoTokenizer.from_pretrained(sft[0].output / "model")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


# Stage 2


def test_the_reward_stage_writes_its_contract(reward: tuple[Run, Run]) -> None:
    for run in reward:
        names = {path.name for path in run.output.iterdir()}
        assert {"config.json", "metrics.jsonl", "evaluation.json", "model"} <= names
        report = run.json("evaluation.json")
        assert {"pairs", "accuracy", "log_loss", "ece", "reliability"} <= report.keys()
        assert report["pairs"] == 6
        evaluated = [line for line in run.metrics if "validation/loss" in line]
        best = min(evaluated, key=lambda line: line["validation/loss"])  # which is saved
        assert report["log_loss"] == pytest.approx(best["test/loss"], abs=1e-6)
        # A new head prefers nothing: the first loss is log 2.
        assert run.metrics[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_the_reward_stage_on_two_processes_with_zero_3_is_that_on_one(
    reward: tuple[Run, Run],
) -> None:
    assert_same_figures(*reward)


def test_the_reward_model_loads(reward: tuple[Run, Run]) -> None:
    ids = torch.tensor([[1, 50, 60, 2]])
    scores = []
    for run in reward:
        model = AutoModelForSequenceClassification.from_pretrained(run.output / "model")
        assert model.config.num_labels == 1
        assert model.score.weight.any()
        scores.append(model(input_ids=ids).logits.item())
        assert AutoTokenizer.from_pretrained(run.output / "model").pad_token_id is not None
    assert scores[0] == pytest.approx(scores[1], abs=2e-3)


# Stage 3


def test_ppo_writes_its_contract(ppo: tuple[Run, Run]) -> None:
    for run in ppo:
        names = {path.name for path in run.output.iterdir()}
        expected = "config.json metrics.jsonl evaluation.json instances.jsonl actor critic"
        assert set(expected.split()) <= names
        assert [line["step"] for line in run.metrics] == [1, 2, 3]
        assert [line["episode"] for line in run.metrics] == [8, 16, 24]
        assert {"objective/kl", "objective/rlhf_reward", "loss/policy"} <= run.metrics[0].keys()
        assert run.metrics[0]["objective/kl"] == pytest.approx(0.0, abs=1e-4)
        assert run.metrics[-1]["objective/kl"] != 0.0  # the actor has moved
        report = run.json("evaluation.json")
        assert report["prompts"] == 5
        assert {"pm_divergence", "length", "perplexity", "entropy", "kl", "reward"} <= report.keys()
        exact = report["exact"]
        assert {"tv_to_reward", "tv_to_population", "tv_to_optimum", "outside_mass"} <= exact.keys()
        lines = (run.output / "instances.jsonl").read_text().splitlines()
        assert len(lines) == 5
        assert len(json.loads(lines[0])["responses"]) == 2


def test_ppo_on_two_processes_is_ppo_on_one(ppo: tuple[Run, Run]) -> None:
    assert_same_figures(*ppo)
    one, two = (means(run.json("evaluation.json")["exact"]) for run in ppo)
    assert one == pytest.approx(two, rel=2e-2, abs=2e-3)
    # The weights differ in their last digits, and a draw may fall between the two policies.
    drawn = [responses(run) for run in ppo]
    others = [
        pair for pair in zip(*drawn, strict=True) if pair[0] != pytest.approx(pair[1], abs=2e-3)
    ]
    assert len(drawn[0]) == 10
    assert len(others) <= 1


def test_actor_and_critic_load(ppo: tuple[Run, Run], sft: tuple[Run, Run]) -> None:
    before = AutoModelForCausalLM.from_pretrained(sft[0].output / "model").state_dict()
    for run in ppo:
        actor = AutoModelForCausalLM.from_pretrained(run.output / "actor").state_dict()
        assert any(not torch.equal(value, before[name]) for name, value in actor.items())
        assert all(value.isfinite().all() for value in actor.values())
        critic = AutoModelForSequenceClassification.from_pretrained(run.output / "critic")
        assert critic.config.num_labels == 1
        for name in ("actor", "critic"):
            assert AutoTokenizer.from_pretrained(run.output / name).eos_token_id == 2
            files = [path.suffix for path in (run.output / name).iterdir()]
            assert ".safetensors" in files
            assert not {".bin", ".pt", ".pth"} & set(files)


def test_everything_divided_with_zero_3(
    ppo_config: str, ppo: tuple[Run, Run], workshop: Path
) -> None:
    """Actor, critic, reference and reward over two processes; several passes; centering."""
    output = workshop / "zero_3"
    run = launch(
        "step3_rlhf.sh",
        2,
        output,
        ppo_config,
        f"output_dir={output}",
        ZERO_3,
        "frozen_" + ZERO_3,
        "num_ppo_epochs=2",
        "num_mini_batches=2",
        "per_device_train_batch_size=2",
        "advantage_normalization=center",
        "reward_centering=reference_mean",
        "reward_centering_samples=8",
        "total_episodes=16",
        "eval_steps=1",
    )
    # The first rollout is drawn from the same weights, at the same seeds.
    first, plain = run.metrics[0], ppo[0].metrics[0]
    for name in ("objective/scores", "response/length", "objective/entropy"):
        assert first[name] == pytest.approx(plain[name], rel=1e-4)
    assert "validation/pm_divergence" in first
    assert first["actor/grad_norm"] > 0
    assert "Rewards are centered at" in run.printed
    actor = AutoModelForCausalLM.from_pretrained(output / "actor").state_dict()
    assert all(value.isfinite().all() for value in actor.values())


def test_a_run_can_be_evaluated_again(ppo: tuple[Run, Run]) -> None:
    """evaluate.sh measures the exported actor: what training itself measured at its end."""
    own = means(ppo[0].json("evaluation.json"))
    run = launch("evaluate.sh", 1, ppo[0].output, str(ppo[0].output), "--overwrite")
    again = means(run.json("evaluation.json"))
    assert again == pytest.approx(own, rel=1e-3, abs=1e-5)
    assert str(run.output / "evaluation.json") in run.printed


# Stage 3, directly


def test_direct_optimization_writes_its_contract(direct: tuple[Run, Run]) -> None:
    for run in direct:
        names = {path.name for path in run.output.iterdir()}
        expected = "config.json metrics.jsonl evaluation.json instances.jsonl actor"
        assert set(expected.split()) <= names
        assert [line["step"] for line in run.metrics] == [1, 2, 3]
        assert {"rewards/accuracies", "compared/mass"} <= run.metrics[0].keys()
        report = run.json("evaluation.json")
        assert report["pm_divergence"] is None  # which needs a reward
        assert "reward" in report["left_out"]
        assert {"kl", "entropy", "natural_mass"} <= means(report).keys()
        assert {"tv_to_population", "outside_mass"} <= means(report).keys()
        assert run.printed.count("determine the ratios") == 1
        assert "left out, for lack of a reward: pm_divergence" in run.printed
        assert AutoModelForCausalLM.from_pretrained(run.output / "actor").config.vocab_size


def test_direct_optimization_on_two_processes_is_that_on_one(direct: tuple[Run, Run]) -> None:
    assert_same_figures(*direct)


def test_a_direct_run_can_be_evaluated_again(
    direct: tuple[Run, Run], reward: tuple[Run, Run]
) -> None:
    """Without a reward as training did at its end; with one, nothing is left out."""
    output = direct[0].output
    own = means(direct[0].json("evaluation.json"))
    with_reward = f"reward.model_name_or_path={reward[0].output / 'model'}"
    run = launch("evaluate.sh", 1, output, str(output), "--overwrite", with_reward)
    again = run.json("evaluation.json")
    assert again["left_out"] == []
    assert {"pm_divergence", "tv_to_optimum"} <= means(again).keys()
    assert {name: means(again)[name] for name in own} == pytest.approx(own, rel=1e-3, abs=1e-5)
