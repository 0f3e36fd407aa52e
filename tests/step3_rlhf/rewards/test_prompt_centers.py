"""Example 2's C_{1,x}: rewards have mean zero on each prompt, and the optimum stays."""

from collections.abc import Callable

import pytest
import torch

from step3_rlhf import ppo
from step3_rlhf.rewards.prompt_centers import centers_of_iteration, prompt_centers
from step3_rlhf.rollout import sample
from step3_rlhf.trainer import PPOTrainer

pytestmark = pytest.mark.usefixtures("process_group")

Build = Callable[..., PPOTrainer]


def test_means_of_each_prompts_draws() -> None:
    rewards = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, -3.0])
    assert prompt_centers(rewards, 3, 1).tolist() == [3.0, -1.0]
    assert prompt_centers(rewards, 2, 2).tolist() == [1.5, 1.5, 3.0, 3.0, -1.5, -1.5]


def test_an_iteration_is_centered_on_its_own_prompts(build: Build) -> None:
    trainer = build(reward_centering="prompt_mean", reward_centering_draws=3, num_generations=2)
    prompts = trainer.prompts.of_iteration(1)
    drawn_for = trainer.prompts.for_prompt_centering(1, 3)
    assert [ids for ids in prompts.ids[::2] for _ in range(3)] == drawn_for.ids
    assert not set(drawn_for.seeds) & set(prompts.seeds)
    assert len(set(drawn_for.seeds)) == len(drawn_for.seeds)

    trainer.center_prompts(1)
    found = trainer.prompt_centers
    drawn = sample(trainer.reference, trainer.tokenizer, *drawn_for, trainer.config.sampling)
    means = trainer.reward(drawn).view(-1, 3).mean(-1)
    torch.testing.assert_close(found, means.repeat_interleave(2))
    rollout = sample(trainer.reference, trainer.tokenizer, *prompts, trainer.config.sampling)
    rewards = trainer.reward(rollout)
    torch.testing.assert_close(trainer.shape_rewards(rewards, rollout), rewards - found)
    trainer.center_prompts(1)  # as a resumed run does
    assert torch.equal(trainer.prompt_centers, found)
    metrics = trainer.iteration(0)
    assert metrics["objective/scores"] > 0  # as the reward source gave them
    assert trainer.clock.read(1)["time/centering"] > 0


def test_what_the_regularizer_puts_in_the_rewards_place_is_centered(build: Build) -> None:
    trainer = build(reward_centering="prompt_mean", reward_centering_draws=2)
    arguments = (0, trainer.prompts, trainer.reference, trainer.tokenizer)
    once = centers_of_iteration(*arguments, trainer.reward, trainer.config)
    cubed = centers_of_iteration(*arguments, lambda r: trainer.reward(r) ** 3, trainer.config)
    assert (cubed - once**3).abs().max() > 1e-6  # not the effective reward of the mean


def test_the_expected_gradient_does_not_change_and_its_noise_does() -> None:
    """Two prompts with rewards at levels 0 and 10; the score function's sum over all responses."""
    logits = torch.tensor([[0.3, -0.2, 1.0], [0.0, 0.5, -1.0]], dtype=torch.float64)
    pi = logits.softmax(-1)
    rewards = torch.tensor([[0.0, 1.0, -1.0], [10.0, 11.0, 9.0]], dtype=torch.float64)
    centers = prompt_centers((rewards * torch.tensor([[1.0, 1.0, 1.0]])).flatten(), 3, 1)
    score = torch.eye(3, dtype=torch.float64) - pi[:, None, :]  # ∇ log π(y)

    def moments(credit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gradients = credit[..., None] * score
        mean = (pi[..., None] * gradients).sum(1)
        return mean, (pi[..., None] * (gradients - mean[:, None]).square()).sum()

    plain, noise = moments(rewards)
    centered, less = moments(rewards - centers[:, None])
    torch.testing.assert_close(centered, plain, rtol=0, atol=1e-12)
    assert less < 0.1 * noise
    # One center for both prompts leaves each at its level.
    assert moments(rewards - centers.mean())[1] > 5 * less


def test_rloos_baseline_makes_the_center_idle() -> None:
    rewards = torch.tensor([4.0, 6.0, -1.0, 0.0])
    mask = torch.ones(4, 1, dtype=torch.bool)
    nothing = torch.zeros(4, 1)
    center = torch.tensor([5.0, 5.0, -0.5, -0.5])
    plain, centered = (
        ppo.leave_one_out(ppo.place_rewards(nothing, r, mask), mask, 2)[0]
        for r in (rewards, rewards - center)
    )
    torch.testing.assert_close(centered, plain)


def test_centering_for_rloo_is_warned_about(build: Build) -> None:
    changes = {"reward_centering": "prompt_mean", "num_generations": 2}
    rloo = build(advantage_estimator="rloo", critic=None, **changes).config
    assert any("draws responses for nothing" in text for text in rloo.warnings())
    assert not any("draws responses" in text for text in build(**changes).config.warnings())
