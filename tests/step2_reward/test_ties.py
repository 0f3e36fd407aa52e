"""How often people call responses tied: first values, learning, and a run on data with ties."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from step2_reward import main as reward
from step2_reward.config import RewardConfig
from step2_reward.main import PreferenceModelling
from step2_reward.ties import STEP, WithTies, choices_of, first_prevalences, require_decided
from training.config import check_config
from training.errors import UserError

EOS, PAD = 2, 3


def rows(*levels: list[int], unranked: int = 0, largest: int = 2) -> Dataset:
    return Dataset.from_dict(
        {
            "levels": list(levels),
            "unranked": [unranked] * len(levels),
            "largest_tie": [largest] * len(levels),
        }
    )


def test_choices_of_a_ranking() -> None:
    assert choices_of([0, 1], 0) == [(2, 1)]  # what is left is no choice
    assert choices_of([0, 0], 0) == [(2, 2)]
    assert choices_of([0, 1, 1, 2], 0) == [(4, 1), (3, 2)]
    assert choices_of([0, 1, 2, 3], 2) == [(4, 1), (3, 1)]  # the best two of four


def test_first_prevalences_are_those_of_equal_responses() -> None:
    """3 ties in 10 pairs: δ/(2 + δ) = 3.5/11, half a choice of each kind added."""
    (log_delta,) = first_prevalences(rows(*[[0, 1]] * 7, *[[0, 0]] * 3)).tolist()
    delta = math.exp(log_delta)
    assert delta / (2 + delta) == pytest.approx(3.5 / 11, rel=1e-6)
    # of three: δ_2 · 3/3 and δ_3 · 1/3 are the odds of ties to a single best
    triples = rows(*[[0, 1, 1]] * 4, *[[0, 0, 1]] * 2, [0, 0, 0], largest=3)
    found = first_prevalences(triples).exp().tolist()
    assert found[1] == pytest.approx((1.5 / 4.5) * (4 * 3 + 2 * 3 + 3 + 4 * 2) / 7, rel=1e-5)
    assert first_prevalences(rows([0, 1], largest=1)).shape == (0,)


def test_adamw_moves_a_prevalence_by_the_step_whatever_the_learning_rate() -> None:
    class Scalar(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return torch.zeros(1, 1)

    for learning_rate in (1e-5, 1e-3):
        module = WithTies(Scalar(), torch.tensor([0.5, -1.0]), learning_rate)
        solver = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=0.0)
        for step in range(1, 4):
            _, log_ties = module(torch.zeros(1, 1), torch.ones(1, 1))
            (log_ties * torch.tensor([3.0, -0.1])).sum().backward()
            assert module.moved.grad.tolist() == pytest.approx([3.0, -0.1])
            solver.step()
            solver.zero_grad()
            _, log_ties = module(torch.zeros(1, 1), torch.ones(1, 1))
            assert log_ties.tolist() == pytest.approx([0.5 - step * STEP, -1.0 + step * STEP])


@pytest.mark.usefixtures("process_group")
def test_a_run_with_ties_learns_them_and_judges_what_is_decided(
    stage_settings: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    settings = stage_settings("reward") | {"max_steps": 4}
    settings["data"]["max_eval_samples"] = 64
    for name in ("sources", "eval_sources"):
        (source,) = settings["data"][name]
        lines = [json.loads(line) for line in Path(source).read_text().splitlines()]
        for number, line in enumerate(lines):
            line["tie"] = number % 4 == 0
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        settings["data"][name] = [str(path)]
    config = check_config(RewardConfig, settings, "config:")
    reward.main(config)
    output = Path(config.output_dir)
    report = json.loads((output / "evaluation.json").read_text())
    (prevalence,) = report["tie_prevalence"]
    assert 0.4 < prevalence < 1.0  # a quarter are ties: δ/(2 + δ) = 1/4 of equal responses
    weights = output / "model" / "model.safetensors"
    assert b"moved" not in weights.read_bytes()[:100_000]  # the model itself has no ties


def test_held_out_data_of_ties_alone_are_refused() -> None:
    require_decided({"validation": rows([0, 0], [0, 1]), "test": rows([0, 0, 1])})
    require_decided({"test": rows([0, 1, 2], unranked=2)})
    with pytest.raises(UserError, match="None of the test prompts' comparisons is decided"):
        require_decided({"validation": rows([0, 1]), "test": rows([0, 0], [0, 0, 0], largest=3)})


@pytest.mark.usefixtures("process_group")
def test_the_loss_of_ties_and_of_the_best_of_several(
    stage_settings: Callable[[str], dict[str, Any]],
) -> None:
    config = check_config(RewardConfig, stage_settings("reward"), "config:")
    data = Dataset.from_dict(
        {
            "group": ["a", "b", "c"],
            "prompt_ids": [[1], [1], [1]],
            "responses_ids": [[[5, EOS], [6, EOS]], [[5, EOS], [6, EOS]],
                              [[6, EOS], [5, EOS], [7, EOS]]],
            "levels": [[0, 0], [0, 1], [0, 1, 2]],
            "unranked": [0, 0, 2],
            "largest_tie": [2, 2, 1],
        }
    )  # fmt: skip
    rewards = {5: 0.4, 6: -1.0, 7: 2.0}

    def model(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.tensor([rewards[row[1]] for row in ids.tolist()])
        return values[:, None].expand(ids.shape), torch.tensor([0.3])

    task = PreferenceModelling(model, data, {"test": data}, config, PAD)
    a, b, c = (math.exp(rewards[token]) for token in (5, 6, 7))
    tie = math.exp(0.3) * math.sqrt(a * b)
    expected = [
        -math.log(tie / (a + b + tie)),
        -math.log(a / (a + b + tie)),
        -math.log(b / (a + b + c)),
    ]
    for row, loss in enumerate(expected):
        assert task.loss_sum(task.collate([row])).item() == pytest.approx(loss, rel=1e-6)
    assert task.loss_sum(task.collate([2, 0, 1])).item() == pytest.approx(sum(expected), rel=1e-6)
    log_ties = torch.tensor([0.3], requires_grad=True)
    task.model = lambda ids, mask: (model(ids, mask)[0], log_ties)
    untied = data.select([1]).map(lambda row: {"largest_tie": 1})
    task.train = untied
    task.loss_sum(task.collate([0])).backward()
    assert log_ties.grad.item() == 0.0  # there, for the average over ranks
    task.train, task.model = data, model
    figures = task.evaluate("test")
    assert figures["test/loss"] == pytest.approx(sum(expected) / 3, rel=1e-6)
    assert task.calibration["pairs"] == 3  # 5 over 6; 6 over 5 and over 7
    assert task.calibration["tie_prevalence"] == pytest.approx([math.exp(0.3)])
