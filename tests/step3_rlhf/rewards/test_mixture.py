"""Several groups of people: the reward whose optimum is the mixture of what the groups want."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from step3_rlhf.config import EvaluationConfig, PPOConfig
from step3_rlhf.evaluation.metrics import pm_divergence
from step3_rlhf.regularizers.optimality import certificate
from step3_rlhf.regularizers.registry import parse_regularizer
from step3_rlhf.rewards import mixture as module
from step3_rlhf.rewards.mixture import DECAY, Mixture, log_sums_of_others, mixture_reward
from training.config import check_config
from training.errors import UserError

OPPOSITE = torch.tensor([[0.89, 0.01], [0.10, 0.10], [0.01, 0.89]], dtype=torch.float64)
"""[3, 2]: what each of two groups says, in shares."""
HALVES = torch.tensor([0.5, 0.5], dtype=torch.float64)


def optimum(rewards: Tensor, log_w: Tensor, beta: float) -> Tensor:
    """[K] ∝ w e^{r/β}."""
    return (log_w + rewards / beta).softmax(0)


def total_variation(p: Tensor, q: Tensor) -> float:
    return 0.5 * (p - q).abs().sum().item()


def test_the_optimum_is_what_the_groups_say_in_turn() -> None:
    """Half and half of (.89, .10, .01) and its mirror; the weighted sum is the geometric pool."""
    rewards, log_w = OPPOSITE.log(), torch.zeros(3, dtype=torch.float64)
    mixed = mixture_reward(rewards, rewards.logsumexp(0), HALVES, 1.0)
    assert optimum(mixed, log_w, 1.0).tolist() == pytest.approx([0.45, 0.10, 0.45], abs=1e-12)
    pooled = optimum((HALVES * rewards).sum(-1), log_w, 1.0)
    assert pooled.tolist() == pytest.approx([0.327, 0.346, 0.327], abs=5e-4)


def test_with_weights_and_any_shares_it_is_the_mixture_of_the_groups_optima() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = 3 * torch.randn(7, 3, generator=generator, dtype=torch.float64)
    log_w = torch.randn(7, generator=generator, dtype=torch.float64)
    shares, beta = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), 0.7
    log_z = (log_w[:, None] + rewards / beta).logsumexp(0)
    wanted = torch.zeros(7, dtype=torch.float64)
    for group in range(3):
        wanted += shares[group] * optimum(rewards[:, group], log_w, beta)
    mixed = optimum(mixture_reward(rewards, log_z, shares, beta), log_w, beta)
    torch.testing.assert_close(mixed, wanted, rtol=1e-12, atol=0)
    unweighted = (rewards / beta).logsumexp(0)  # the wrong Z_k
    wrong = optimum(mixture_reward(rewards, unweighted, shares, beta), log_w, beta)
    assert total_variation(wrong, wanted) > 0.01


def test_groups_that_agree_have_the_reward_of_each() -> None:
    rewards = torch.tensor([0.3, -1.2, 4.0], dtype=torch.float64)[:, None].expand(3, 2)
    shares = torch.tensor([0.9, 0.1], dtype=torch.float64)
    log_z = torch.full((2,), 5.0, dtype=torch.float64)
    mixed = mixture_reward(rewards, log_z, shares, 0.5)
    assert mixed.tolist() == pytest.approx([0.3, -1.2, 4.0], abs=1e-12)


def test_a_response_takes_no_part_in_the_normalizers_of_its_own_reward() -> None:
    values = torch.tensor([[[1.0, -2.0], [0.5, 3.0], [-1.0, 0.0]]], dtype=torch.float64)
    found = log_sums_of_others(values)
    expected = math.log(math.exp(0.5) + math.exp(-1.0))
    assert found[0, 0, 0].item() == pytest.approx(expected, abs=1e-12)
    assert found[0, 2, 1].item() == pytest.approx(math.log(math.exp(-2) + math.exp(3)), abs=1e-12)


def test_rewards_of_two_responses_by_hand() -> None:
    """β = ½; Z_k is that of the other response, and on the next visit also of the earlier two."""
    mixture = Mixture([0.5, 0.5], beta=0.5, responses_per_prompt=2)
    by_group = torch.tensor([[1.0, 0.0], [0.0, 0.5]], dtype=torch.float64)
    marginal = torch.tensor([-0.25, 0.5], dtype=torch.float64)
    a = [[1.5, -0.5], [1.0, 2.0]]  # a_k/β of both

    def reward(row: int, log_z: list[float]) -> float:
        level = sum(log_z) / 2
        terms = [0.5 * math.exp(by_group[row, k].item() / 0.5 - log_z[k] + level) for k in (0, 1)]
        return 0.5 * math.log(sum(terms))

    first = mixture.rewards(by_group, marginal, ["x", "x"])
    assert first.tolist() == pytest.approx([reward(0, a[1]), reward(1, a[0])], abs=1e-12)
    again = mixture.rewards(by_group, marginal, ["x", "x"])  # of the same iteration
    assert again.tolist() == first.tolist()
    mixture = Mixture([0.5, 0.5], beta=0.5, responses_per_prompt=2)
    mixture.rewards(by_group, marginal, ["x", "x"])
    mixture.remember()
    sums = [math.exp(a[0][k]) + math.exp(a[1][k]) for k in (0, 1)]
    second = mixture.rewards(by_group, marginal, ["x", "x"])
    expected = [
        reward(row, [math.log(DECAY * sums[k] + math.exp(a[1 - row][k])) for k in (0, 1)])
        for row in (0, 1)
    ]
    assert second.tolist() == pytest.approx(expected, abs=1e-12)
    other = mixture.rewards(by_group, marginal, ["y", "y"])
    assert other.tolist() == pytest.approx(first.tolist(), abs=1e-12)


def test_levels_of_the_groups_rewards_do_not_matter() -> None:
    """A reward model is known up to a constant for each prompt, 1000 here, in opposite ways."""
    generator = torch.Generator().manual_seed(1)
    by_group = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    marginal = torch.randn(6, generator=generator, dtype=torch.float64)
    level = torch.tensor([1000.0, -1000.0])
    plain, shifted = Mixture([0.5, 0.5], 1.0, 3), Mixture([0.5, 0.5], 1.0, 3)
    for _ in range(2):
        one = plain.rewards(by_group, marginal, ["x"] * 3 + ["y"] * 3)
        other = shifted.rewards(by_group + level, marginal, ["x"] * 3 + ["y"] * 3)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
        plain.remember()
        shifted.remember()


def test_the_sums_are_the_same_however_the_prompts_are_divided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(2)
    by_group = torch.randn(8, 2, generator=generator, dtype=torch.float64)
    marginal = torch.randn(8, generator=generator, dtype=torch.float64)
    prompts = ["x", "x", "y", "y", "x", "x", "z", "z"]  # x twice
    alone, ranks = Mixture([0.3, 0.7], 1.0, 2), [Mixture([0.3, 0.7], 1.0, 2) for _ in range(2)]
    for _ in range(2):
        whole = alone.rewards(by_group, marginal, prompts)
        alone.remember()
        rows = [[0, 1, 6, 7], [2, 3, 4, 5]]
        parts = [
            mixture.rewards(by_group[own], marginal[own], [prompts[row] for row in own])
            for mixture, own in zip(ranks, rows, strict=True)
        ]
        assert torch.equal(torch.cat(parts), whole[rows[0] + rows[1]])
        everything = [draw for mixture in ranks for draw in mixture._drawn]
        monkeypatch.setattr(module, "gather_objects", lambda own, all=everything: all)
        for mixture in ranks:
            mixture.remember()
        monkeypatch.undo()
        assert alone.log_sums == ranks[0].log_sums == ranks[1].log_sums
    assert len(alone.log_sums) == 3
    assert json.loads(json.dumps(alone.log_sums)) == alone.log_sums  # what a checkpoint holds


@torch.no_grad()
def trained(reward: str, responses: int, steps: int = 150, prompts: int = 4) -> Tensor:
    """[3] a tabular policy after plain policy gradients under pm; each prompt has its own levels.

    Args:
        reward: "mixture"; "sum" for the weighted sum; "forgetful" for a mixture without memory.
    """
    generator = torch.Generator().manual_seed(3)
    levels = torch.randn(prompts, 2, generator=generator, dtype=torch.float64)
    theta = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64).log()
    mixture = Mixture([0.5, 0.5], 1.0, responses)
    total = torch.zeros(3, dtype=torch.float64)
    for step in range(steps):
        pi = theta.softmax(0)
        drawn = torch.multinomial(pi, prompts * responses, True, generator=generator)
        prompt = torch.arange(prompts).repeat_interleave(responses)
        by_group = OPPOSITE.log()[drawn] + levels[prompt]
        marginal = -pi.log()[drawn]
        if reward == "sum":
            rewards = by_group.mean(-1)
        else:
            rewards = mixture.rewards(by_group, marginal, [str(p) for p in prompt.tolist()])
            mixture.remember()
            if reward == "forgetful":
                mixture = Mixture([0.5, 0.5], 1.0, responses)
        credit = (rewards + marginal).view(prompts, responses)
        advantages = (credit - credit.mean(1, keepdim=True)).flatten() * responses / (responses - 1)
        score = torch.nn.functional.one_hot(drawn, 3).double() - pi
        theta = theta + 0.3 * (advantages[:, None] * score).mean(0)
        if step >= steps // 2:
            total += theta.softmax(0)
    return total / total.sum()


def test_policy_gradients_end_at_the_mixture() -> None:
    wanted = torch.tensor([0.45, 0.10, 0.45], dtype=torch.float64)
    assert total_variation(trained("mixture", responses=4), wanted) < 0.03
    assert total_variation(trained("mixture", responses=2), wanted) < 0.03
    assert total_variation(trained("sum", responses=4), wanted) > 0.2
    # Two responses and no memory: each is judged by the other alone.
    assert total_variation(trained("forgetful", responses=2), wanted) > 0.15


# Settings

GROUPS = [
    {"model_name_or_path": "owner/a", "share": 0.25},
    {"model_name_or_path": "owner/b", "share": 0.75},
]


def settings_with(stage_settings: Any, mixture: list[dict[str, Any]], **changes: Any) -> Any:
    settings = stage_settings("ppo") | {"num_generations": 2, "per_device_train_batch_size": 8}
    settings["regularizer"] = {"name": "pm"}
    return settings | {"reward": {"mixture": mixture}} | changes


def test_a_mixture_is_read(stage_settings: Any) -> None:
    config = check_config(PPOConfig, settings_with(stage_settings, GROUPS), "config:")
    assert config.reward.shares == (0.25, 0.75)
    assert [model.weight for model in config.reward.weighted_models] == [0.25, 0.75]
    assert check_config(PPOConfig, config.model_dump(mode="json"), "config:") == config
    assert any("a mixture is far from exact" in warning for warning in config.warnings())
    more = check_config(
        PPOConfig, settings_with(stage_settings, GROUPS, num_generations=8), "config:"
    )
    assert not any("mixture" in warning for warning in more.warnings())
    stopping = settings_with(
        stage_settings, GROUPS, num_generations=8, early_stopping={"optimum_gap": 0.1}
    )
    (warning,) = check_config(PPOConfig, stopping, "config:").warnings()
    assert warning.startswith("early_stopping: of few draws, optimum/gap of a mixture")


@pytest.mark.parametrize(
    ("mixture", "changes", "fault"),
    [
        (GROUPS[:1], {}, "reward.mixture: one group is no mixture; use model_name_or_path"),
        ([GROUPS[0], GROUPS[0]], {}, "reward.mixture: the shares add up to 0.5; 1 is needed"),
        ([GROUPS[1], GROUPS[0] | {"share": 0.0}], {}, "reward.mixture.1.share"),
        (
            GROUPS,
            {"reward": {"mixture": GROUPS, "models": [{"model_name_or_path": "owner/a"}]}},
            "give exactly one of model_name_or_path, models, mixture, function, url",
        ),
        (GROUPS, {"num_generations": 1}, "num_generations: a mixture needs 2 or more"),
        (GROUPS, {"reward_centering": "reference_mean"}, "reward_centering: not with a mixture"),
        (
            GROUPS,
            {"regularizer": {"name": "f_divergence", "divergence": "hellinger"}},
            "reward.mixture: f_divergence cannot have the mixture of its groups' optima as its",
        ),
        (
            GROUPS,
            {"regularizer": {"name": "generalized_pl", "g": "softplus", "target": "luce"}},
            "reward.mixture: generalized_pl cannot have",
        ),
        (
            GROUPS,
            {"regularizer": {"name": "pm", "beta": "calibrated"}},
            '"calibrated" needs a single reward model',
        ),
    ],
)
def test_faults_of_a_mixture(
    stage_settings: Any, mixture: Any, changes: dict[str, Any], fault: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_config(PPOConfig, settings_with(stage_settings, mixture, **changes), "config:")
    assert fault in str(caught.value)


def test_an_evaluation_refuses_what_training_refuses(stage_settings: Any) -> None:
    settings = settings_with(stage_settings, GROUPS)
    known = {name: settings[name] for name in EvaluationConfig.model_fields if name in settings}
    check_config(EvaluationConfig, known, "config:")
    known["regularizer"] = {"name": "generalized_pl", "g": "softplus"}
    with pytest.raises(UserError, match=r"reward\.mixture: generalized_pl cannot have"):
        check_config(EvaluationConfig, known, "config:")


@pytest.mark.parametrize(
    ("draws", "gap", "kl", "divergence"),
    [
        (2, 0.018, 0.018, 0.04),
        (4, 0.077, 0.097, 0.13),
        (8, 0.014, 0.013, 0.03),
        (16, 0.002, 0.0, 0.01),
    ],
)
def test_what_few_draws_add_at_the_exact_optimum(
    draws: int, gap: float, kl: float, divergence: float
) -> None:
    """The figures in the evaluation's README; with the exact Z_k the divergence is 0."""
    policy = OPPOSITE @ HALVES
    torch.manual_seed(0)
    drawn = torch.multinomial(policy, 20_000 * draws, replacement=True).view(-1, draws)
    logp, by_group = policy.log()[drawn], OPPOSITE.log()[drawn]

    def figures(log_z: torch.Tensor) -> list[float]:
        rewards = mixture_reward(by_group, log_z, HALVES, 1.0)
        credit = by_group - logp[..., None]
        found = certificate(credit, parse_regularizer({"name": "pm"}), HALVES.tolist())
        pairs = pm_divergence(logp[:, 0], logp[:, 1], rewards[:, 0], rewards[:, 1], 1.0)
        return [found["gap"].mean().item(), found["kl"].mean().item(), pairs.mean().item()]

    estimated = log_sums_of_others(by_group - logp[..., None])
    found = figures(estimated)
    assert found[:2] == pytest.approx([gap, kl], abs=0.001)
    assert found[2] == pytest.approx(divergence, abs=0.005)
    assert figures(torch.zeros_like(estimated))[2] == pytest.approx(0, abs=1e-12)
