"""From padded batches to rankings: which reward belongs to which response of which prompt."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from step2_reward import main as reward
from step2_reward.config import RewardConfig
from step2_reward.losses import btl_loss
from step2_reward.main import (
    PreferenceModelling,
    Ranked,
    by_group,
    implied_pairs,
    log_odds,
    summary,
)
from training.config import check_config
from training.data import FILLER, Split, collate_groups
from training.models.loading import load_scalar_model
from training.models.pretrained import Pretrained
from training.runtime.engine import TrainedModule

pytestmark = pytest.mark.usefixtures("process_group")

PAD, EOS = 3, 2
GROUPS = Dataset.from_dict(
    {
        "group": ["one", "another"],
        "prompt_ids": [[1, 5], [1, 6, 6]],
        "responses_ids": [[[7, EOS], [8, 8, EOS]], [[9, EOS], [10, EOS], [11, 4, 4, EOS]]],
        "levels": [[0, 1], [0, 1, 2]],
        "unranked": [0, 0],
        "largest_tie": [1, 1],
    }
)


def test_rewards_are_put_back_into_their_groups() -> None:
    batch = collate_groups(GROUPS, [1, 0, FILLER], PAD)
    rewards, present = by_group(torch.arange(1.0, 9.0), batch)
    assert rewards.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 0.0], [6.0, 7.0, 8.0]]
    assert present.tolist() == [[True, True, True], [True, True, False], [False] * 3]


def test_margins_of_every_pair_that_a_ranking_implies() -> None:
    rewards = torch.tensor([[3.0, 1.0, 0.0], [0.0, 5.0, 99.0], [7.0, 7.0, 7.0]])
    present = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]]).bool()
    levels, ranked = torch.arange(3).expand(3, 3), torch.ones(3, 3).bool()
    whole = Ranked(rewards, present, levels, ranked, False, torch.ones(3).long(), torch.zeros(0))
    found = implied_pairs(whole)
    assert sorted(found) == [(0.0, 5.0, 1), (1.0, 0.0, 0), (3.0, 0.0, 0), (3.0, 1.0, 0)]
    pairs = torch.tensor([pair[:2] for pair in sorted(found)])
    assert log_odds(pairs, "exponential").tolist() == [-5.0, 1.0, 3.0, 2.0]
    g = torch.nn.functional.softplus(pairs)
    torch.testing.assert_close(log_odds(pairs, "softplus"), (g[:, 0] / g[:, 1]).log())
    # Ties decide nothing, nor do those that come after the others in unknown order.
    tied = replace(whole, levels=torch.tensor([[0, 0, 1], [0, 0, 1], [0, 1, 2]]))
    assert sorted(implied_pairs(tied)) == [(1.0, 0.0, 0), (3.0, 0.0, 0)]
    best = torch.tensor([True, False, False]).expand(3, 3)
    assert sorted(implied_pairs(replace(whole, ranked=best))) == [
        (0.0, 5.0, 1),
        (3.0, 0.0, 0),
        (3.0, 1.0, 0),
    ]


@pytest.fixture
def task(stage_settings, world_tokenizer) -> PreferenceModelling:
    config = check_config(
        RewardConfig, stage_settings("reward") | {"per_device_eval_batch_size": 1}, "config:"
    )
    model = load_scalar_model(Pretrained(config.model_name_or_path), world_tokenizer, new_head=True)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.model.score.weight)
    trained = TrainedModule(model, config, config, 1)
    return PreferenceModelling(trained, GROUPS, {"test": GROUPS}, config, PAD)


def own_rewards(task: PreferenceModelling, prompt: list[int], responses: list) -> torch.Tensor:
    """One by one, without padding, from the sequence-classification model itself."""
    model = task.model.module.model
    rows = [torch.tensor([[*prompt, *response]]) for response in responses]
    return torch.cat([model(input_ids=row).logits.reshape(1) for row in rows])


@torch.no_grad()
def test_the_loss_of_a_pair_is_btl_on_the_models_own_rewards(task: PreferenceModelling) -> None:
    chosen, rejected = own_rewards(task, **_columns(0))
    batch = task.collate([0])
    expected = btl_loss(chosen, rejected)
    assert task.items(batch) == 1
    assert task.loss_sum(batch).item() == pytest.approx(expected.item(), rel=1e-5)
    assert abs(task.loss_sum(batch).item() - btl_loss(rejected, chosen).item()) > 1e-3


@torch.no_grad()
def test_evaluation_is_a_mean_over_rankings_with_pairwise_calibration(
    task: PreferenceModelling,
) -> None:
    a, b = own_rewards(task, **_columns(0))
    x, y, z = own_rewards(task, **_columns(1))
    pair = math.log1p(math.exp(b - a))
    ranking = torch.stack([x, y, z]).logsumexp(0) - x + torch.stack([y, z]).logsumexp(0) - y
    found = task.evaluate("test")
    assert found["test/loss"] == pytest.approx((pair + ranking.item()) / 2, rel=1e-5)
    assert task.calibration["pairs"] == 4
    margins = torch.stack([a - b, x - y, x - z, y - z])
    assert found["test/accuracy"] == pytest.approx((margins > 0).double().mean().item())
    losses = torch.nn.functional.softplus(-margins).double()
    assert found["test/log_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    # two prompts, of one pair and of three
    sums = [(part - losses.mean()).sum().item() for part in (losses[:1], losses[1:])]
    expected = 12.7062047 * math.sqrt(2 * (sums[0] ** 2 + sums[1] ** 2)) / 4
    assert found["test/log_loss_ci95"] == pytest.approx(expected, rel=1e-4)
    assert task.calibration["clusters"] == 2


@torch.no_grad()
def test_another_link_has_other_probabilities_of_the_same_rewards(
    task: PreferenceModelling,
) -> None:
    config = task.config.model_copy(update={"link": "softplus"})
    other = PreferenceModelling(task.model, GROUPS, {"test": GROUPS}, config, PAD)
    a, b = torch.nn.functional.softplus(own_rewards(task, **_columns(0)))
    x, y, z = torch.nn.functional.softplus(own_rewards(task, **_columns(1)))
    losses = [-(a / (a + b)).log(), -(x / (x + y + z)).log() - (y / (y + z)).log()]
    found = other.evaluate("test")
    assert found["test/loss"] == pytest.approx(sum(losses).item() / 2, rel=1e-5)
    assert other.loss_sum(other.collate([0, 1])).item() == pytest.approx(
        sum(losses).item(), rel=1e-5
    )
    probabilities = torch.stack([a / (a + b), x / (x + y), x / (x + z), y / (y + z)])
    assert found["test/log_loss"] == pytest.approx(-probabilities.log().mean().item(), rel=1e-5)
    exponential = task.evaluate("test")["test/log_loss"]
    assert abs(found["test/log_loss"] - exponential) > 1e-4 * exponential
    assert other.calibration["link"] == "softplus"


def test_comparisons_of_the_same_prompt_are_one_prompts(task: PreferenceModelling) -> None:
    rows = Dataset.from_dict({name: [GROUPS[row][name] for row in (1, 0, 1)] for name in GROUPS[0]})
    again = PreferenceModelling(task.model, GROUPS, {"test": rows}, task.config, PAD)
    found = again.evaluate("test")
    assert (again.calibration["pairs"], again.calibration["clusters"]) == (7, 2)
    alone = PreferenceModelling(task.model, GROUPS, {"test": rows.select([0, 2])}, task.config, PAD)
    metrics = alone.evaluate("test")
    assert (alone.calibration["clusters"], alone.calibration["log_loss_ci95"]) == (1, None)
    assert found.keys() - metrics.keys() == {"test/accuracy_ci95", "test/log_loss_ci95"}


def test_the_summary_has_intervals_where_there_are_any() -> None:
    figures = {"test/accuracy": 0.5684, "test/log_loss": 0.67401, "test/ece": 0.0312}
    assert summary(figures) == (
        "accuracy 0.568, log-loss 0.6740 nats, expected calibration error 0.031"
    )
    intervals = {"test/accuracy_ci95": 0.0719, "test/log_loss_ci95": 0.0123}
    assert summary(figures | intervals) == (
        "accuracy 0.568 ± 0.072, log-loss 0.6740 ± 0.0123 nats, expected calibration error 0.031"
    )


def _columns(row: int) -> dict:
    return {"prompt": GROUPS[row]["prompt_ids"], "responses": GROUPS[row]["responses_ids"]}


@torch.no_grad()
def test_fillers_carry_no_loss(task: PreferenceModelling) -> None:
    batch = task.collate([FILLER])
    assert task.items(batch) == 0
    assert task.loss_sum(batch).item() == 0.0


def test_the_best_weights_are_the_ones_saved(
    stage_settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation losses 3, 1, 2: what is on disk is the second evaluation's model."""
    losses, heads = iter([3.0, 1.0, 2.0]), []
    real = PreferenceModelling.evaluate

    def evaluate(self: PreferenceModelling, split: Split) -> dict[str, float]:
        if split == "test":
            return real(self, split)
        heads.append(self.model.module.model.score.weight.detach().clone())
        return real(self, split) | {"validation/loss": next(losses)}

    monkeypatch.setattr(PreferenceModelling, "evaluate", evaluate)
    settings = stage_settings("reward") | {"max_steps": 3, "eval_steps": 1}
    config = check_config(RewardConfig, settings, "config:")
    reward.main(config)
    output = Path(config.output_dir)
    saved = AutoModelForSequenceClassification.from_pretrained(output / "model")
    assert torch.equal(saved.score.weight, heads[1])
    assert not torch.equal(saved.score.weight, heads[2])
    assert saved.config.num_labels == 1
    assert saved.config.response_end == "eos"  # which stage 3 needs to know
    report = json.loads((output / "evaluation.json").read_text())
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert report["log_loss"] == lines[1]["test/log_loss"] != lines[1]["validation/log_loss"]
    assert "test/log_loss" not in lines[2]
    assert report["split"] == "test"
    assert {"pairs", "accuracy", "log_loss", "ece", "reliability"} <= report.keys()
    assert report["accuracy_ci95"] == lines[1]["test/accuracy_ci95"]
    assert report["log_loss_ci95"] == lines[1]["test/log_loss_ci95"] > 0
