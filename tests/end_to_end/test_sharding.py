"""The same losses, rollouts and exports however a global batch is divided.

One process and two, accumulation 1 and 4, ZeRO 0 to 3, padded and packed, through the real
launcher. The division changes the padding as well: a micro-batch is padded to its own longest row.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from many_runs import launch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from training.data import collate_texts, read_records, tokenize
from training.data.settings import DataSettings
from training.fitting import held_out_splits
from training.models.loading import load_policy, load_scalar_model
from training.models.pretrained import Pretrained

pytestmark = pytest.mark.launcher

GLOBAL_BATCH = 16
TOLERANCE = 1e-5
STAGE = {
    "sft": "sft",
    "btl": "reward",
    "plackett_luce": "reward",
    "ppo": "ppo",
    "sft_lora": "sft",
    "ppo_lora": "ppo",
    "rloo": "ppo",
    "mixture": "ppo",
}
KINDS = tuple(STAGE)
# A loss of PPO is a mean of terms of both signs; differences are relative to the terms' size.
SIZES = {"loss/policy": 1.0, "objective/rlhf_reward": 1.0, "objective/kl": 1.0}
FIGURES = {
    "sft": ("train/loss", "validation/loss"),
    "reward": ("train/loss", "validation/loss", "validation/accuracy"),
    "ppo": ("loss/policy", "loss/value", "objective/scores", "objective/kl", "objective/entropy",
            "objective/rlhf_reward", "response/length", "response/ended_fraction"),
}  # fmt: skip
REWARD = "def by_length(prompts, responses):\n    return [len(text) / 10 for text in responses]\n"


@dataclass(frozen=True)
class Division:
    """How a global batch is divided."""

    processes: int
    accumulation: int
    zero: int
    packed: bool = False

    def settings(self) -> dict[str, Any]:
        return {
            "per_device_train_batch_size": GLOBAL_BATCH // (self.processes * self.accumulation),
            "gradient_accumulation_steps": self.accumulation,
            "deepspeed": {"zero_optimization": {"stage": self.zero}},
            "packing": self.packed,
        }

    def __str__(self) -> str:
        name = f"{self.processes}x{self.accumulation}-zero{self.zero}"
        return name + ("-packed" if self.packed else "")


RLOO = {"advantage_estimator": "rloo", "num_generations": 2, "ema_decay": 0.5, "ptx_coef": 0.5}
WHOLE = Division(1, 1, 0)
CONTROL, CONTROLLED = Division(2, 4, 0), ("sft", "btl", "plackett_luce")
PACKED = [Division(1, 1, 0, packed=True), Division(2, 4, 2, packed=True),
          Division(2, 1, 3, packed=True)]  # fmt: skip
ALL = [
    Division(processes, accumulation, zero)
    for processes in (1, 2)
    for accumulation in (1, 4)
    for zero in (0, 1, 2, 3)
] + PACKED
PAIRS = [WHOLE, Division(1, 4, 0), Division(2, 1, 0), Division(1, 1, 1), Division(2, 4, 1),
         Division(1, 4, 2), Division(2, 1, 2), Division(1, 1, 3), Division(2, 4, 3),
         *PACKED]  # fmt: skip
"""Any two of processes, accumulation and ZeRO stage meet in every way."""
SOME = [WHOLE, Division(1, 4, 0), Division(2, 1, 1), Division(2, 4, 2, packed=True),
        Division(2, 1, 3)]  # fmt: skip


def divisions(kind: str) -> list[Division]:
    """All divisions meet with SFT: every kind takes its optimizer steps with the same function.

    Of Plackett-Luce, LoRA, RLOO and mixtures most of the code is that of another kind.
    """
    return {"sft": ALL, "btl": PAIRS, "ppo": PAIRS}.get(kind, SOME)


class Matrix:
    """Every kind of training under every division; figures and exports of each."""

    def __init__(self, directory: Path, settings: Callable[[str], dict[str, Any]]) -> None:
        self.directory = directory
        (directory / "lengths.py").write_text(REWARD)
        for processes in (1, 2):
            runs = [self.policy(settings)] if processes == 1 else []
            runs += [
                self.run(settings, kind, division)
                for kind in KINDS
                for division in divisions(kind)
                if division.processes == processes
            ]
            if processes == CONTROL.processes:
                runs += [self.run(settings, kind, CONTROL, wrongly=True) for kind in CONTROLLED]
            launch(processes, runs, directory)

    def policy(self, settings: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
        """What PPO starts from: trained until its responses end, each at its own length."""
        given = settings("sft") | {"learning_rate": 5e-3, "max_steps": 60}
        return {"stage": "sft", "settings": given | {"output_dir": str(self.directory / "policy")}}

    def run(
        self,
        settings: Callable[[str], dict[str, Any]],
        kind: str,
        division: Division,
        wrongly: bool = False,
    ) -> dict[str, Any]:
        stage = STAGE[kind]
        given = settings(stage) | division.settings()
        given["output_dir"] = str(self.output(kind, division, wrongly))
        given["per_device_eval_batch_size"] = 3
        # With a tiny ε Adam turns rounding of a gradient of 0 into a whole step.
        if stage == "ppo":
            for model in ("actor", "critic"):
                given[model] = given[model] | {"adam_epsilon": 1e-3}
            given |= {"reward": {"function": "lengths:by_length"}, "total_episodes": 48}
            given["model_name_or_path"] = str(self.directory / "policy" / "model")
            if division.zero == 3:
                given["frozen_deepspeed"] = given["deepspeed"]
            if kind == "rloo":
                given |= RLOO | {"critic": None, "ptx_data": settings("sft")["data"]}
            if kind == "mixture":
                groups = [self.output(group, WHOLE) for group in ("btl", "plackett_luce")]
                models = [{"model_name_or_path": str(group / "model")} for group in groups]
                given["reward"] = {"mixture": [model | {"share": 0.5} for model in models]}
                given["num_generations"] = 2
        else:
            given |= {"adam_epsilon": 1e-3, "max_steps": 3}
            # Two whole batches and 7 rows: the last one is not the same for all ranks.
            given["data"] = given["data"] | {"max_train_samples": 2 * GLOBAL_BATCH + 7}
        if "lora" in kind:
            given["lora"] = {"r": 4}
        if kind == "plackett_luce":
            given["data"] = given["data"] | {
                "sources": [str(self.rankings(given["data"]["sources"][0]))],
                "eval_sources": [],
                "eval_fraction": 0.2,
            }
        return {"stage": stage, "settings": given, "mean_of_means": wrongly}

    def rankings(self, comparisons: str) -> Path:
        """The world's comparisons with a third, shorter response ranked last."""
        path = self.directory / "rankings.jsonl"
        if not path.exists():
            records = [json.loads(line) for line in Path(comparisons).read_text().splitlines()]
            lines = [
                {
                    "prompt": record["prompt"],
                    "responses": [record["rejected"], record["chosen"], "no"][: 2 + number % 2],
                    "ranking": [1, 0, 2][: 2 + number % 2],
                }
                for number, record in enumerate(records)
            ]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    def output(self, kind: str, division: Division, wrongly: bool = False) -> Path:
        return self.directory / f"{kind}-{division}{'-wrong' if wrongly else ''}"

    def figures(self, kind: str, division: Division, wrongly: bool = False) -> dict[str, float]:
        """`step name` → value, for every logged step."""
        lines = (self.output(kind, division, wrongly) / "metrics.jsonl").read_text().splitlines()
        return {
            f"{line['step']} {name}": line[name]
            for line in map(json.loads, lines)
            for name in FIGURES[STAGE[kind]]
            if name in line
        }

    def difference(self, kind: str, division: Division, wrongly: bool = False) -> float:
        """The largest relative difference of any figure from that of the undivided batch."""
        whole, divided = self.figures(kind, WHOLE), self.figures(kind, division, wrongly)
        assert whole.keys() == divided.keys()
        return max(
            abs(divided[name] - value)
            / max(abs(value), abs(divided[name]), SIZES.get(name.split()[1], 1e-2))
            for name, value in whole.items()
        )


def test_any_two_values_meet() -> None:
    for one, other in itertools.combinations(("processes", "accumulation", "zero"), 2):
        met, all_pairs = (
            {(getattr(d, one), getattr(d, other)) for d in group if not d.packed}
            for group in (PAIRS, ALL)
        )
        assert met == all_pairs


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory, tiny_world: Path) -> Matrix:
    directory = tmp_path_factory.mktemp("sharding")

    def settings(stage: str) -> dict[str, Any]:
        kind = "texts" if stage == "sft" else "comparisons"
        common: dict[str, Any] = {
            "model_name_or_path": str(tiny_world / "base"),
            "data": {
                "sources": [str(tiny_world / f"{kind}.jsonl")],
                "eval_sources": [str(tiny_world / f"{kind}_eval.jsonl")],
                "max_eval_samples": 7,
                "max_prompt_length": 48,
                "max_response_length": 16,
                "cache_dir": str(directory / "token_ids"),
            },
        }
        if stage != "ppo":
            return common | {"learning_rate": 1e-3}
        optimizer = {"learning_rate": 1e-3, "lr_scheduler_type": "constant"}
        return common | {
            "regularizer": {"name": "conditional_pm", "alpha": 0.3},
            "actor": optimizer,
            "critic": optimizer,
            "response_length": 6,
            "rollout_batch_size": 16,
            "evaluation": {"max_prompts": 3},
        }

    return Matrix(directory, settings)


@pytest.mark.parametrize("kind", KINDS)
def test_division_changes_nothing(matrix: Matrix, kind: str) -> None:
    differences = {str(d): matrix.difference(kind, d) for d in divisions(kind)}
    print(f"{kind}: largest relative difference {max(differences.values()):.1e}", differences)
    assert max(differences.values()) <= TOLERANCE, differences


@pytest.mark.parametrize("kind", CONTROLLED)
def test_a_mean_of_means_would_be_seen(matrix: Matrix, kind: str) -> None:
    """Not in PPO, whose losses are divided by what does not depend on the drawn lengths."""
    assert matrix.difference(kind, CONTROL, wrongly=True) > 10 * TOLERANCE


def test_rollouts_are_the_same_responses(matrix: Matrix) -> None:
    for division in divisions("ppo"):
        whole, divided = matrix.figures("ppo", WHOLE), matrix.figures("ppo", division)
        for step in (1, 2, 3):
            for name in ("response/length", "response/ended_fraction"):
                assert divided[f"{step} {name}"] == whole[f"{step} {name}"]
            scores = f"{step} objective/scores"  # of the texts: their lengths, added in any order
            assert divided[scores] == pytest.approx(whole[scores], rel=1e-6)
    assert whole["1 response/length"] < 6  # they end, each at its own length


EXPORTS = [
    ("sft", "model"),
    ("btl", "model"),
    ("ppo", "actor"),
    ("ppo", "critic"),
    ("sft_lora", "model"),
    ("ppo_lora", "actor"),
    ("ppo_lora", "critic"),
    ("rloo", "actor"),
    ("rloo", "actor_ema"),
]


@pytest.mark.parametrize(("kind", "export"), EXPORTS)
def test_exports_are_the_same_weights_under_every_zero_stage(
    matrix: Matrix, kind: str, export: str
) -> None:
    whole = load_file(matrix.output(kind, WHOLE) / export / "model.safetensors")
    for division in divisions(kind):
        divided = load_file(matrix.output(kind, division) / export / "model.safetensors")
        assert divided.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(divided[name], value, rtol=0, atol=1e-5, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sft", "sft_lora"])
def test_exports_have_the_loss_that_the_training_process_measured(
    matrix: Matrix, kind: str, tiny_world: Path
) -> None:
    """Loaded here and scored text by text; 1e-5 nats per token."""
    path = str(matrix.output(kind, WHOLE) / "model")
    tokenizer = Pretrained(path).tokenizer
    data = DataSettings(
        sources=[str(tiny_world / "texts.jsonl")],
        eval_sources=[str(tiny_world / "texts_eval.jsonl")],
        max_eval_samples=7,
        max_prompt_length=48,
        max_response_length=16,
    )
    held_out = tokenize(read_records(data, "sft"), tokenizer, data, "sft").eval
    texts = held_out_splits(held_out, data)["validation"]
    batch = collate_texts(texts, list(range(len(texts))), tokenizer.pad_token_id)
    for division in divisions(kind):
        policy = load_policy(Pretrained(str(matrix.output(kind, division) / "model")), tokenizer)
        logp, _ = policy(batch.input_ids, batch.attention_mask, batch.response_mask)
        loss = -logp.sum().item() / int(batch.response_mask.sum())
        measured = matrix.figures(kind, division)["3 validation/loss"]
        assert loss == pytest.approx(measured, abs=1e-5), division


@torch.no_grad()
def test_what_a_fresh_process_loads_is_what_was_trained(matrix: Matrix) -> None:
    """Log-probabilities and rewards of the exports, loaded here, whoever wrote them."""
    ids = torch.tensor([[1, 50, 60, 70, 2]])
    mask = torch.ones_like(ids)
    scored = mask.bool()
    scored[:, 0] = False
    logps: dict[str, list[torch.Tensor]] = {"sft": [], "sft_lora": []}
    for kind, found in logps.items():
        for division in divisions(kind):
            path = matrix.output(kind, division) / "model"
            found.append(
                load_policy(Pretrained(str(path)), Pretrained(str(path)).tokenizer)(
                    ids, mask, scored
                )[0]
            )
            logits = AutoModelForCausalLM.from_pretrained(path)(input_ids=ids).logits[0, :-1]
            own = logits.log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
            torch.testing.assert_close(own, found[-1][0, 1:], rtol=0, atol=1e-5)
            torch.testing.assert_close(found[-1], found[0], rtol=0, atol=1e-5)
    rewards = []
    for division in divisions("btl"):
        path = matrix.output("btl", division) / "model"
        scalar = load_scalar_model(Pretrained(str(path)), Pretrained(str(path)).tokenizer)
        rewards.append(scalar.rewards(ids, mask))
        own = AutoModelForSequenceClassification.from_pretrained(path)(input_ids=ids).logits[:, 0]
        torch.testing.assert_close(own, rewards[-1], rtol=0, atol=1e-5)
        torch.testing.assert_close(rewards[-1], rewards[0], rtol=0, atol=1e-5)
