"""One PPO iteration: its gradients by hand, and what must not change them."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig

from step3_rlhf import ppo
from step3_rlhf.config import EvaluationConfig, PPOConfig
from step3_rlhf.evaluation.held_out import HeldOut
from step3_rlhf.experience import Judged
from step3_rlhf.iteration_metrics import IterationMetrics
from step3_rlhf.main import means_of, train
from step3_rlhf.ptx import PtxTexts
from step3_rlhf.regularizers.registry import parse_regularizer
from step3_rlhf.rewards.functions import FunctionReward
from step3_rlhf.rewards.sources import ByGroup
from step3_rlhf.roles import training_roles_of
from step3_rlhf.rollout import sample
from step3_rlhf.trainer import PPOTrainer
from training.data import collate_texts
from training.errors import UserError
from training.models.policy import Policy
from training.models.pretrained import Pretrained
from training.models.scalar import ScalarModel

pytestmark = pytest.mark.usefixtures("process_group")

Build = Callable[..., PPOTrainer]


def weights(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value.detach().clone()
        for name, trained in trainer.trained.items()
        for key, value in trained.module.state_dict().items()
    }


def assert_same_update(
    one: dict[str, torch.Tensor],
    other: dict[str, torch.Tensor],
    start: dict[str, torch.Tensor],
) -> None:
    """Differences between the two are far below what the step itself changed."""
    step = max((one[name] - start[name]).abs().max().item() for name in start)
    assert step > 1e-3
    gap = max((one[name] - other[name]).abs().max().item() for name in start)
    assert gap < 1e-4 * step


# One forward pass or two


def test_a_single_pass_makes_the_same_update_as_two(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, passes = [], []
    for fused in (True, False):
        monkeypatch.setattr(PPOConfig, "uses_rollout_once", property(lambda self, f=fused: f))
        trainer = build()
        start = weights(trainer)
        scored: list[int] = []
        for module in (trainer.actor, trainer.critic):
            module.engine.register_forward_hook(lambda *call, into=scored: into.append(1))
        metrics = trainer.iteration(0)
        found.append((weights(trainer), metrics))
        passes.append(len(scored))
    assert passes == [2, 4]  # actor and critic, once or twice
    (single, single_metrics), (double, double_metrics) = found
    assert_same_update(single, double, start)
    assert single_metrics == pytest.approx(double_metrics, rel=1e-4, abs=1e-5, nan_ok=True)


def test_when_a_rollout_is_used_once(configured) -> None:
    def once(**changes: Any) -> bool:
        return configured(**changes).uses_rollout_once

    assert once()
    assert once(gradient_accumulation_steps=2)
    assert once(advantage_normalization="center")
    assert not once(num_ppo_epochs=2)
    assert not once(num_mini_batches=2)
    assert not once(advantage_normalization="center", gradient_accumulation_steps=2)


@pytest.mark.parametrize("normalization", ["none", "center", "full"])
def test_accumulation_changes_nothing(build: Build, normalization: str) -> None:
    found = []
    for micro, accumulation in ((8, 1), (2, 4)):
        trainer = build(
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            advantage_normalization=normalization,
        )
        start = weights(trainer)
        metrics = trainer.iteration(0)
        found.append((weights(trainer), metrics))
    (whole, whole_metrics), (parts, parts_metrics) = found
    assert_same_update(whole, parts, start)
    assert whole_metrics == pytest.approx(parts_metrics, rel=1e-3, abs=1e-5, nan_ok=True)


def test_mini_batches_and_epochs_are_optimizer_steps(build: Build) -> None:
    trainer = build(num_mini_batches=2, num_ppo_epochs=3, per_device_train_batch_size=4)
    metrics = trainer.iteration(0)
    assert trainer.actor.engine.global_steps == 6
    assert metrics["policy/approxkl"] > 0  # the later passes are off-policy


# By hand


@pytest.fixture
def experience(build: Build) -> tuple[PPOTrainer, Judged, torch.Tensor]:
    """A trainer, one micro-batch of a rollout, and the raw rewards.

    A quarter of the tokens end a response, so that lengths differ.
    """
    trainer = build()
    trainer.actor.module.ends = tuple(range(0, len(trainer.tokenizer), 4))
    batch = trainer.prompts.of_iteration(0)
    rollout = sample(trainer.actor.engine, trainer.tokenizer, *batch, trainer.config.sampling)
    rewards = trainer.reward(rollout)
    (part,) = trainer.micro_batches(rollout, rewards, trainer.reference_logp(rollout))
    return trainer, part, rewards


def own_logp(policy: Policy, part: Judged) -> torch.Tensor:
    """[B, R] log π of response tokens from the Hugging Face model's whole logits, with gradient."""
    rollout = part.rollout
    positions = (rollout.attention_mask.cumsum(-1) - 1).clamp(min=0)
    logits = policy.model(
        input_ids=rollout.input_ids,
        attention_mask=rollout.attention_mask,
        position_ids=positions,
    ).logits
    steps = logits[:, rollout.prompt_length - 1 : -1].log_softmax(-1)
    tokens = rollout.input_ids[:, rollout.prompt_length :]
    return steps.gather(-1, tokens[..., None]).squeeze(-1)


def own_values(critic: ScalarModel, part: Judged) -> torch.Tensor:
    rollout = part.rollout
    positions = (rollout.attention_mask.cumsum(-1) - 1).clamp(min=0)
    hidden = critic.model.model(
        input_ids=rollout.input_ids,
        attention_mask=rollout.attention_mask,
        position_ids=positions,
    ).last_hidden_state
    return critic.model.score(hidden).squeeze(-1)[:, rollout.prompt_length - 1 : -1]


def gradients(loss: torch.Tensor, module: torch.nn.Module) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters())))


def test_the_first_step_is_reinforce_with_a_baseline(experience) -> None:
    """∇ = −Σ_t A_t ∇log π_t with A by hand from reward, penalty and values (kl, β = ½)."""
    trainer, part, rewards = experience
    actor, critic, mask = trainer.actor.module, trainer.critic.module, part.rollout.response_mask
    logp, values = own_logp(actor, part), own_values(critic, part)
    with torch.no_grad():
        reference = own_logp(trainer.reference, part)
        token_rewards = -0.5 * (logp - reference) * mask
        lasts = mask.sum(-1) - 1
        token_rewards[torch.arange(8), lasts] += rewards
        advantages = torch.zeros_like(values)
        for row in range(8):
            following = next_value = 0.0
            for t in reversed(range(int(lasts[row]) + 1)):
                delta = token_rewards[row, t] + next_value - values[row, t]
                following = delta + 0.95 * following
                next_value = values[row, t]
                advantages[row, t] = following
        returns = (advantages + values) * mask
    divisor = 8 * 6  # responses · response_length, however long the responses are
    assert mask.sum() < divisor
    wanted_policy = -(advantages * logp)[mask].sum() / divisor
    wanted_value = 0.5 * 0.5 * ((values - returns)[mask] ** 2).sum() / divisor  # vf_coef = ½

    scores = trainer.old_scores(part)
    torch.testing.assert_close(scores.logp[mask], logp[mask].detach(), rtol=0, atol=1e-5)
    (placed,) = trainer.with_advantages([part], [scores])
    torch.testing.assert_close(placed.advantages, advantages, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(placed.returns, returns, rtol=1e-4, atol=1e-4)

    expected = {
        name: (value.detach().clone(), g)
        for module, loss, prefix in (
            (actor, wanted_policy, "actor"),
            (critic, wanted_value, "critic"),
        )
        for (key, value), g in zip(module.named_parameters(), gradients(loss, module), strict=True)
        if (name := f"{prefix}.{key}")
    }
    trainer.iteration(0)  # the same rollout: prompts and draws depend on number and seed alone
    after = weights(trainer)
    for name, (before, g) in expected.items():
        step = -0.1 * g / (g.abs() + 1.0)  # the first AdamW step with ε = 1
        torch.testing.assert_close(after[name], before + step, rtol=0, atol=2e-6, msg=name)


def test_metrics_of_the_first_iteration_by_hand(experience) -> None:
    trainer, part, rewards = experience
    mask = part.rollout.response_mask
    with torch.no_grad():
        logp = own_logp(trainer.actor.module, part).double()
        reference = own_logp(trainer.reference, part).double()
    kl = ((logp - reference) * mask).sum(-1)
    metrics = trainer.iteration(0)
    expected = {
        "objective/scores": rewards.mean().item(),
        "objective/kl": kl.mean().item(),
        "objective/regularizer": -0.5 * kl.mean().item(),
        "objective/rlhf_reward": (rewards - 0.5 * kl).mean().item(),
        "objective/entropy": -(logp * mask).sum(-1).mean().item(),
        "objective/bound_fraction": 0.0,
        "policy/kl_per_token": (kl.sum() / mask.sum()).item(),
        "policy/approxkl": 0.0,
        "policy/clipfrac": 0.0,
        "val/clipfrac": 0.0,
        "response/length": mask.sum().item() / 8,
        "response/ended_fraction": part.rollout.ended.double().mean().item(),
        "actor/learning_rate": 0.1,
        "critic/learning_rate": 0.1,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    missing = {"policy/entropy_per_token", "loss/policy", "loss/value", "val/explained_variance"}
    assert missing <= metrics.keys()


def test_how_often_a_bound_takes_effect_is_logged(experience) -> None:
    """χ²: |2β(u − 1)| above the bound; a bound between the fourth and the fifth of eight."""
    trainer, part, _ = experience
    with torch.no_grad():
        ratio = own_logp(trainer.actor.module, part) - own_logp(trainer.reference, part)
    log_u = (ratio * part.rollout.response_mask).sum(-1)
    sizes = (2 * (log_u.exp() - 1)).abs().sort().values
    bound = (sizes[4] + sizes[5]).item() / 2
    settings = {"name": "f_divergence", "divergence": "chi_squared", "max_marginal": bound}
    trainer.regularizer = parse_regularizer(settings)
    assert trainer.iteration(0)["objective/bound_fraction"] == pytest.approx(3 / 8)


def test_explained_variance_by_hand(experience) -> None:
    trainer, part, _ = experience
    (placed,) = trainer.with_advantages([part], [trainer.old_scores(part)])
    mask = part.rollout.response_mask
    returns, errors = placed.returns[mask], (placed.returns - placed.old.values)[mask]
    expected = 1 - errors.double().var(unbiased=False) / returns.double().var(unbiased=False)
    metrics = trainer.iteration(0)
    assert metrics["val/explained_variance"] == pytest.approx(expected.item(), abs=1e-4)


def test_reference_scores_do_not_depend_on_the_batch(experience) -> None:
    trainer, part, _ = experience
    own = own_logp(trainer.reference, part) * part.rollout.response_mask
    for size in (1, 3, 8):
        trainer.config = trainer.config.model_copy(update={"per_device_eval_batch_size": size})
        found = trainer.reference_logp(part.rollout)
        torch.testing.assert_close(found, own, rtol=0, atol=1e-5)


# Shaping


def test_rewards_as_ppo_gets_them(build: Build, experience) -> None:
    _, part, _ = experience
    rollout = part.rollout
    rewards = torch.linspace(-3.0, 4.0, 8)

    def shaped(center: float = 0.0, **changes: Any) -> torch.Tensor:
        trainer = build(**changes)
        trainer.reward_center = center
        return trainer.shape_rewards(rewards, rollout)

    assert torch.equal(shaped(), rewards)
    torch.testing.assert_close(shaped(center=0.5), rewards - 0.5)
    torch.testing.assert_close(shaped(reward_clip=2.0), rewards.clamp(-2, 2))
    expected = torch.where(rollout.ended, rewards, rewards - 1.5)
    torch.testing.assert_close(shaped(missing_eos_penalty=1.5), expected)
    torch.testing.assert_close(shaped(center=1.0, reward_clip=2.0), (rewards - 1.0).clamp(-2, 2))


def test_the_center_is_the_references_mean_reward(build: Build) -> None:
    trainer = build(reward_centering="reference_mean", reward_centering_samples=12)
    trainer.center_rewards()
    batch = trainer.prompts.for_centering(12)
    rollout = sample(trainer.reference, trainer.tokenizer, *batch, trainer.config.sampling)
    expected = sum(len(response) / 10 for response in rollout.responses) / 12
    assert trainer.reward_center == pytest.approx(expected, rel=1e-6)


def test_a_constant_in_the_reward_does_not_change_advantages_beyond_the_value(experience) -> None:
    """C_1: with λ = γ = 1 every advantage moves by exactly the constant."""
    _, part, rewards = experience
    mask, values = part.rollout.response_mask, torch.zeros(part.rollout.response_mask.shape)
    nothing = torch.zeros_like(values)
    one, other = (
        ppo.advantages_and_returns(
            ppo.place_rewards(nothing, rewards + c, mask), values, mask, 1.0, 1.0
        )[0]
        for c in (0.0, 3.0)
    )
    torch.testing.assert_close(other - one, 3.0 * mask)


# Around the trainer


def test_where_the_critic_starts(configured, tiny_world, tmp_path, world_tokenizer) -> None:
    base, same, other = str(tiny_world / "base"), str(tmp_path / "same"), str(tmp_path / "other")
    world_tokenizer.save_pretrained(same)
    longer = copy.deepcopy(world_tokenizer)
    longer.add_tokens(["<another>"])
    longer.save_pretrained(other)
    for directory in (same, other):
        shutil.copy(f"{base}/config.json", directory)

    headless = str(tmp_path / "headless")
    shutil.copytree(same, headless)
    bert = BertConfig(num_hidden_layers=1, num_labels=1, hidden_size=12)
    bert.save_pretrained(headless)

    def source(**changes: object) -> tuple[str, str]:
        roles = training_roles_of(configured(**changes))
        return roles.critic.name_or_path, roles.critic_note

    assert source() == (base, "")  # a function rewards: the policy
    models = [{"model_name_or_path": same}, {"model_name_or_path": other}]
    assert source(reward={"models": models}) == (same, "")
    path, why = source(reward={"models": models[::-1]})  # it would read other words
    assert path == base
    assert "another vocabulary" in why
    path, why = source(reward={"model_name_or_path": headless})
    assert path == base
    assert "no value after each token" in why
    assert source(critic_model_name_or_path=same) == (same, "")


def test_an_evaluations_means_are_logged() -> None:
    figures = {
        "prompts": 3,
        "kl": {"mean": 0.5, "ci95": 0.1, "count": 3},
        "exact": {"tv_to_reward": {"mean": 0.2}, "tv_to_optimum": None, "per_prompt": []},
    }
    assert means_of(figures) == {"validation/kl": 0.5, "validation/tv_to_reward": 0.2}


def test_statistics_add_up_over_micro_batches(experience) -> None:
    trainer, part, _ = experience
    metrics = IterationMetrics(trainer.regularizer, trainer.config)
    for first in (0, 4):
        rows = part.rollout.rows(first, first + 4)
        columns = rows.response_mask.shape[1]
        chosen = slice(first, first + 4)
        half = Judged(rows, part.rewards[chosen], part.ref_logp[chosen, :columns])
        trainer.losses_in_one_pass(half, metrics)
    assert metrics.sums["responses"] == 8
    assert metrics.sums["tokens"] == part.rollout.response_mask.sum()
    assert math.isfinite(metrics.sums["policy_loss"])


# Several responses to a prompt


def test_responses_to_one_prompt_are_adjacent_and_their_spread_is_logged(build: Build) -> None:
    """optimum/* by hand: the unbiased variance of r + R + πR′ within each prompt (kl, β = ½)."""
    trainer = build(num_generations=4)
    batch = trainer.prompts.of_iteration(1)
    assert [batch.dialogues[k : k + 4] for k in (0, 4)] == [
        [batch.dialogues[k]] * 4 for k in (0, 4)
    ]
    assert batch.dialogues[0] != batch.dialogues[4]
    assert [seed[-1] for seed in batch.seeds] == list(range(8, 16))
    rollout = sample(trainer.actor.engine, trainer.tokenizer, *batch, trainer.config.sampling)
    assert len(set(rollout.responses)) == 8
    rewards = trainer.reward(rollout)
    (part,) = trainer.micro_batches(rollout, rewards, trainer.reference_logp(rollout))
    with torch.no_grad():
        ratio = own_logp(trainer.actor.module, part) - own_logp(trainer.reference, part)
    credit = (rewards - 0.5 * (ratio * rollout.response_mask).sum(-1)).double()
    spreads = [(c.sub(c.mean()) ** 2).sum().item() / 3 / 0.5**2 for c in credit.split(4)]
    metrics = trainer.iteration(1)
    assert metrics["optimum/spread"] == pytest.approx(sum(spreads) / 2, rel=1e-4)
    assert metrics["optimum/gap"] == pytest.approx(0.25 * sum(spreads) / 2, rel=1e-4)
    assert metrics["optimum/kl"] > 0
    assert not any(name.startswith("optimum/") for name in build().iteration(0))


def test_several_responses_change_nothing_with_accumulation(build: Build) -> None:
    found = []
    for micro, accumulation in ((8, 1), (4, 2)):
        trainer = build(
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            num_generations=4,
        )
        metrics = trainer.iteration(0)
        found.append({name: metrics[name] for name in metrics if name.startswith("optimum/")})
    assert found[0] == pytest.approx(found[1], rel=1e-4)


# RLOO

RLOO = {"advantage_estimator": "rloo", "critic": None, "num_generations": 4}


def test_the_first_step_of_rloo_by_hand(build: Build) -> None:
    """∇ = −Σ_i A_i ∇log π(y_i) with A_i = a_i − mean of the other three (kl, β = ½)."""
    trainer = build(**RLOO)
    batch = trainer.prompts.of_iteration(0)
    rollout = sample(trainer.actor.engine, trainer.tokenizer, *batch, trainer.config.sampling)
    rewards, mask = trainer.reward(rollout), rollout.response_mask
    (part,) = trainer.micro_batches(rollout, rewards, trainer.reference_logp(rollout))
    actor = trainer.actor.module
    logp = own_logp(actor, part)
    with torch.no_grad():
        credit = rewards - 0.5 * ((logp - own_logp(trainer.reference, part)) * mask).sum(-1)
        baseline = torch.stack(
            [credit[[j for j in range(8) if j // 4 == i // 4 and j != i]].mean() for i in range(8)]
        )
    loss = -((credit - baseline) * (logp * mask).sum(-1)).sum() / (8 * 6)
    start = {name: value.detach().clone() for name, value in actor.named_parameters()}
    wanted = dict(zip(start, gradients(loss, actor), strict=True))
    metrics = trainer.iteration(0)
    for name, g in wanted.items():
        step = -0.1 * g / (g.abs() + 1.0)  # the first AdamW step with ε = 1
        after = actor.get_parameter(name)
        torch.testing.assert_close(after, start[name] + step, rtol=0, atol=2e-6, msg=name)
    assert trainer.trained.keys() == {"actor"}
    of_critic = ("critic/", "val/", "loss/value")
    assert not [name for name in metrics if name.startswith(of_critic)]
    assert metrics["optimum/gap"] > 0


def test_rloo_in_one_pass_in_two_and_with_accumulation(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants: list[tuple[bool, dict[str, Any]]] = [
        (True, {}),
        (False, {}),
        (True, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
    ]
    found = []
    for fused, changes in variants:
        monkeypatch.setattr(PPOConfig, "uses_rollout_once", property(lambda self, f=fused: f))
        trainer = build(**RLOO, **changes)
        start = weights(trainer)
        found.append((trainer.iteration(0), weights(trainer)))
    for metrics, after in found[1:]:
        assert metrics == pytest.approx(found[0][0], rel=1e-3, abs=1e-5, nan_ok=True)
        assert_same_update(found[0][1], after, start)


def test_rloo_clips_in_several_epochs(build: Build) -> None:
    trainer = build(
        **RLOO, num_ppo_epochs=3, num_mini_batches=2, per_device_train_batch_size=4, cliprange=1e-4
    )
    metrics = trainer.iteration(0)
    assert trainer.actor.engine.global_steps == 6
    assert metrics["policy/clipfrac"] > 0


def test_what_does_not_go_with_rloo(configured) -> None:
    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(UserError, match=message):
            configured(**RLOO | changes)

    refused("num_generations: rloo compares the responses", num_generations=1)
    refused("advantage_normalization: full .* 0/0", advantage_normalization="full")
    refused("gamma: rloo gives every token", gamma=0.9)
    refused('critic: missing; .*advantage_estimator="rloo"', advantage_estimator="gae")
    assert configured(**RLOO).warnings() == []
    (warning,) = configured(**RLOO | {"critic": {"learning_rate": 0.1}, "lam": 1.0}).warnings()
    assert warning == "critic, lam: without effect, because rloo has no critic"
    roles = training_roles_of(configured(**RLOO))
    assert (roles.critic, roles.critic_note) == (None, "")


# Texts beside the rewards, and the moving average


def test_the_texts_gradient_is_that_of_the_mean_over_their_tokens(build: Build) -> None:
    """With and without ptx_data: the difference of the first steps is −c ∇ mean log π."""
    data = Dataset.from_dict(
        {"prompt_ids": [[5, 6], [7], [8, 9]], "response_ids": [[10, 11, 2], [12, 2], [13]]}
    )
    found = []
    for accumulation in (1, 2):
        changes = RLOO | {"gradient_accumulation_steps": accumulation}
        changes["per_device_train_batch_size"] = 8 // accumulation
        plain = build(**changes)
        trainer = build(**changes)
        start = weights(plain)
        trainer.config = trainer.config.model_copy(update={"ptx_coef": 0.7})
        trainer.ptx = PtxTexts(data, trainer.config, 0)
        policy = trainer.actor.module
        batch = collate_texts(data, [0, 1, 2], 0)
        logp, _ = policy(batch.input_ids, batch.attention_mask, batch.response_mask)
        loss = -0.7 * logp.sum() / 6  # 3 + 2 + 1 tokens, whatever the micro-batches have
        names = [name for name, _ in policy.named_parameters()]
        wanted = dict(zip(names, gradients(loss, policy), strict=True))
        plain.iteration(0)
        metrics = trainer.iteration(0)
        assert metrics["loss/ptx"] == pytest.approx(loss.item() / 0.7, rel=1e-5)
        before, after = weights(plain), weights(trainer)
        for name, g in wanted.items():
            # The first AdamW step with ε = 1 is −lr·g/(1 + |g|): what the gradients were.
            steps = [(w[f"actor.{name}"] - start[f"actor.{name}"]) / -0.1 for w in (before, after)]
            rewards, both = (step / (1 - step.abs()) for step in steps)
            torch.testing.assert_close(both - rewards, g, rtol=0, atol=3e-5, msg=name)
        found.append(after)
    assert_same_update(*found, start)


def test_each_step_has_the_next_texts_whatever_the_micro_batches(build: Build) -> None:
    prompts, responses = [[5]] * 20, [[k, 2] for k in range(20)]
    data = Dataset.from_dict({"prompt_ids": prompts, "response_ids": responses})
    read = []
    for micro, accumulation in ((8, 1), (4, 2)):
        sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation}
        config = build(**sizes).config.model_copy(update={"ptx_coef": 0.5})
        texts = PtxTexts(data, config, 0)
        steps = [texts.of_step(step, divisor=48) for step in range(3)]
        assert [[part.tokens for part in step] for step in steps[:2]] == [
            [16 // accumulation] * accumulation
        ] * 2
        assert {part.weight for part in steps[0]} == {0.5 * 48 / 16}
        assert {part.weight for part in steps[2]} == {0.5 * 48 / 8}  # the epoch's last four texts
        kept = [part.texts for step in steps for part in step]
        rows = [batch.input_ids[batch.response_mask[:, 1], 1] for batch in kept]
        read.append(sorted(torch.cat(rows).tolist()))
    assert read == [list(range(20))] * 2


def test_what_texts_and_averages_need(configured) -> None:
    with pytest.raises(UserError, match="ptx_coef: above 0 it needs ptx_data"):
        configured(ptx_coef=0.5)
    with pytest.raises(UserError, match="ema_decay"):
        configured(ema_decay=1.0)
    to_disk = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/local"}}
    with pytest.raises(UserError, match="ema_decay: weights that are offloaded to NVMe"):
        configured(ema_decay=0.9, deepspeed={"zero_optimization": to_disk})
    data = configured().data.model_dump(mode="json")
    (warning,) = configured(ptx_coef=0.5, ptx_data=data).warnings()
    assert warning == "ptx_coef=0.5: moves the optimum towards the texts of ptx_data"


def test_the_average_after_two_steps(build: Build) -> None:
    """θ̄ = d² θ0 + d (1 − d) θ1 + (1 − d) θ2; training goes on from θ2."""
    trainer = build(ema_decay=0.75)
    (average,) = trainer.averages.values()
    seen = [weights(trainer)]
    for number in range(2):
        trainer.iteration(number)
        seen.append(weights(trainer))
    shares = (0.75**2, 0.75 * 0.25, 0.25)
    name = "model.lm_head.weight"
    wanted = sum(share * w[f"actor.{name}"] for share, w in zip(shares, seen, strict=True))
    torch.testing.assert_close(average.averages[name], wanted, rtol=1e-6, atol=1e-7)
    with average.in_place():
        inside = weights(trainer)[f"actor.{name}"]
        torch.testing.assert_close(inside, wanted, rtol=1e-6, atol=1e-7)
        assert not torch.equal(inside, seen[2][f"actor.{name}"])
    assert all(torch.equal(value, seen[2][key]) for key, value in weights(trainer).items())
    with pytest.raises(ValueError, match="not those of this model"):
        average.load({name: torch.zeros(1)})


def test_a_batch_that_does_not_hold_whole_prompts_is_refused(configured) -> None:
    with pytest.raises(UserError, match="num_generations: 3 does not divide"):
        configured(num_generations=3)
    stopping = {"early_stopping": {"optimum_gap": 0.1}}
    with pytest.raises(UserError, match="only known with num_generations"):
        configured(**stopping)
    step = {"name": "f_divergence", "divergence": "total_variation"}
    with pytest.raises(UserError, match="total_variation or of a token-level"):
        configured(**stopping, num_generations=2, regularizer=step)
    (warning,) = configured(num_generations=2, regularizer=step).warnings()
    assert "no optimum/gap is logged" in warning


def test_a_run_that_has_arrived_ends_and_a_resumed_one_stays_there(build: Build) -> None:
    """Any gap counts as arrived: three iterations in a row of ten."""
    nothing = HeldOut([], [], [], [])
    changes: dict[str, Any] = {
        "num_generations": 2,
        "early_stopping": {"optimum_gap": 1e9, "patience": 3},
        "save_steps": 2,
        "export_steps": 2,
        "ema_decay": 0.5,
    }
    trainer = build(**changes)
    output = Path(trainer.config.output_dir)
    output.mkdir()
    (output / "config.json").write_text(json.dumps(trainer.config.model_dump(mode="json")))
    evaluation = EvaluationConfig.of(trainer.config)
    assert train(trainer, 10, nothing, evaluation) == (0, 3)
    kept = [path.name for path in sorted((output / "checkpoints").iterdir())]
    assert kept == ["step-00000002", "step-00000003"]
    exported = sorted(path.relative_to(output) for path in (output / "exports").glob("*/*"))
    assert list(map(str, exported)) == [
        "exports/step-00000002/actor",
        "exports/step-00000002/actor_ema",
    ]
    Pretrained(str(output / exported[0])).config  # noqa: B018  # loads
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 3

    resumed = build(**changes, resume_from_checkpoint="latest")
    assert train(resumed, 10, nothing, evaluation) == (3, 3)  # no further iteration
    shutil.rmtree(output / "checkpoints" / "step-00000003")
    again = build(**changes, resume_from_checkpoint="latest")
    assert train(again, 10, nothing, evaluation) == (2, 3)  # two of the three in a row were before
    for name, value in weights(trainer).items():
        assert torch.equal(value, weights(again)[name]), name


# Several groups


@pytest.fixture
def build_mixed(build: Build) -> Build:
    """A trainer for two groups: one likes long responses, the other certain first letters."""
    groups = [
        {"model_name_or_path": "owner/a", "share": 0.3},
        {"model_name_or_path": "owner/b", "share": 0.7},
    ]

    def trainer(**changes: Any) -> PPOTrainer:
        built = build(**{"reward": {"mixture": groups}, "num_generations": 2} | changes)
        letters = FunctionReward(
            lambda p, texts: [ord((t or "m")[0]) % 7 / 7 for t in texts], "m:g"
        )
        built.reward = ByGroup([built.reward, letters])
        return built

    return trainer


def test_a_mixtures_first_rewards_by_hand(build_mixed: Build) -> None:
    """kl, β = ½: log Z_k is a_k/β of the other response to the prompt."""
    trainer = build_mixed()
    rollout = sample(
        trainer.actor.engine,
        trainer.tokenizer,
        *trainer.prompts.of_iteration(0),
        trainer.config.sampling,
    )
    by_group = trainer.reward(rollout)
    assert by_group.shape == (8, 2)
    (part,) = trainer.micro_batches(rollout, by_group, trainer.reference_logp(rollout))
    (placed,) = trainer.with_advantages([part], [trainer.old_scores(part)])
    mask = part.rollout.response_mask
    kl = ((placed.old.logp - part.ref_logp) * mask).sum(-1).double()
    for row in range(8):
        other = row ^ 1
        log_z = [by_group[other, k].item() / 0.5 - kl[other].item() for k in (0, 1)]
        level = 0.3 * log_z[0] + 0.7 * log_z[1]
        terms = (
            share * math.exp(by_group[row, k].item() / 0.5 - log_z[k] + level)
            for k, share in enumerate((0.3, 0.7))
        )
        expected = 0.5 * math.log(sum(terms))
        assert placed.rewards[row].item() == pytest.approx(expected, abs=1e-4)
    metrics = trainer.iteration(0)
    mean = (by_group @ torch.tensor([0.3, 0.7])).mean().item()
    assert metrics["objective/scores"] == pytest.approx(mean, abs=1e-5)
    assert len(trainer.mixture.log_sums) == 4


def test_neither_passes_nor_accumulation_change_a_mixture(
    build_mixed: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for fused, micro, accumulation in ((True, 8, 1), (True, 2, 4), (False, 4, 2)):
        monkeypatch.setattr(PPOConfig, "uses_rollout_once", property(lambda self, f=fused: f))
        trainer = build_mixed(
            per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation
        )
        start = weights(trainer)
        metrics = trainer.iteration(0)
        found.append((weights(trainer), metrics, trainer.mixture.log_sums))
    for after, metrics, sums in found[1:]:
        assert_same_update(after, found[0][0], start)
        assert metrics == pytest.approx(found[0][1], rel=1e-3, abs=1e-4, nan_ok=True)
        for key, values in sums.items():
            assert values == pytest.approx(found[0][2][key], abs=1e-3)


def test_a_mixtures_sums_survive_a_stop(build_mixed: Build) -> None:
    changes: dict[str, Any] = {"save_steps": 1, "total_episodes": 24}
    trainer = build_mixed(**changes)
    output = Path(trainer.config.output_dir)
    output.mkdir()
    (output / "config.json").write_text(json.dumps(trainer.config.model_dump(mode="json")))
    nothing, evaluation = HeldOut([], [], [], []), EvaluationConfig.of(trainer.config)
    train(trainer, 3, nothing, evaluation)
    shutil.rmtree(output / "checkpoints" / "step-00000003")
    resumed = build_mixed(**changes, resume_from_checkpoint="latest")
    assert resumed.mixture.log_sums == {}
    assert train(resumed, 3, nothing, evaluation) == (2, 3)
    assert resumed.mixture.log_sums == trainer.mixture.log_sums != {}
    for name, value in weights(trainer).items():
        assert torch.equal(value, weights(resumed)[name]), name


# Cut responses


def test_a_run_foresees_how_many_responses_its_optimum_cuts(build: Build, capsys) -> None:
    """pm: the whole vocabulary but the end weighs V − 1, from the first line of metrics on."""
    trainer = build(regularizer={"name": "pm"}, save_steps=1)
    output = Path(trainer.config.output_dir)
    output.mkdir()
    (output / "config.json").write_text(json.dumps(trainer.config.model_dump(mode="json")))
    nothing, evaluation = HeldOut([], [], [], []), EvaluationConfig.of(trainer.config)
    train(trainer, 1, nothing, evaluation)
    (line,) = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    policy = trainer.actor.module
    existing = policy.model.lm_head.weight.shape[0]
    existing -= 0 if policy.absent is None else int(policy.absent.sum())
    ends = len(policy.ends or (0,))
    assert line["cut/log_growth"] == pytest.approx(math.log(existing - ends), rel=1e-6)
    assert line["cut/predicted_share"] > 0.9
    assert "response_length=6 moves the optimum" in capsys.readouterr().out
    resumed = build(regularizer={"name": "pm"}, save_steps=1, resume_from_checkpoint="latest")
    train(resumed, 2, nothing, evaluation)
    last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["cut/log_growth"] == line["cut/log_growth"]

    anew = {"overwrite_output_dir": True}
    kl = build(regularizer={"name": "kl"}, **anew)
    kl.foresee_cuts()
    assert kl.cuts["cut/log_growth"] < 0
    settings = {"name": "conditional_pm", "alpha": 0.1, "level": "sequence"}
    by_response = build(regularizer=settings, **anew)
    by_response.foresee_cuts()
    assert by_response.cuts == {}
