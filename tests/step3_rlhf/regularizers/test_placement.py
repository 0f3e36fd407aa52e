"""Where conditional PM at the level of sequences places log w: on the tokens that decide it."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from step3_rlhf import ppo
from step3_rlhf.regularizers.base import on_last_token
from step3_rlhf.regularizers.log_linear import LogLinear
from step3_rlhf.regularizers.registry import parse_regularizer

LENGTH = 6
TOKENS = torch.tensor(list(product((0, 1), repeat=LENGTH)))  # all responses: no end, two tokens
PREFIX = torch.tensor(
    [
        [2**t - 1 + sum(2**i * y[i] for i in range(t)) for t in range(LENGTH)]
        for y in TOKENS.tolist()
    ]
)
"""[K, LENGTH] number of the prefix before each token."""
MASK = torch.ones(TOKENS.shape, dtype=torch.bool)
CONFIGS: list[dict[str, Any]] = [
    {"alpha": 0.05},
    {"log_alpha": -3.5},
    {"alpha": 0.02, "epsilon": 1e-3},
    {"alpha": 0.02, "log_epsilon": -2.0},
    {"alpha": 2.0, "epsilon": 0.5},  # nothing is inside
]


def of_sequences(config: dict[str, Any]) -> LogLinear:
    found = parse_regularizer({"name": "conditional_pm", "level": "sequence", **config})
    assert isinstance(found, LogLinear)
    return found


def token_logps(seed: int) -> Tensor:
    """[K, LENGTH] log-probabilities of a random model with its own logits after each prefix."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2**LENGTH, 2, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1)[PREFIX, TOKENS]


def at_the_end(log_w: Tensor) -> Tensor:
    """The same weights on the last token, at which the whole response is known."""
    return on_last_token(log_w.sum(-1), MASK)


def at_the_start(log_w: Tensor) -> Tensor:
    """The wrong variant: later tokens would have no part in what they decide."""
    return log_w.sum(-1, keepdim=True) * torch.eye(LENGTH, dtype=torch.float64)[0]


def gradient(log_w: Tensor, logp: Tensor) -> tuple[Tensor, float]:
    """Mean and variance of PPO's gradient from one response, without a critic, for β log w.

    ∇ log π(token | prefix) with respect to the prefix's two logits is 1(token) − π.
    """
    advantages, _ = ppo.advantages_and_returns(log_w, torch.zeros_like(log_w), MASK, 1.0, 1.0)
    own, other = 1 - logp.exp(), logp.exp() - 1
    each = torch.zeros(len(TOKENS), 2**LENGTH, 2, dtype=torch.float64)
    rows = torch.arange(len(TOKENS))[:, None]
    each[rows, PREFIX, TOKENS] = advantages * own
    each[rows, PREFIX, 1 - TOKENS] = advantages * other
    chances = logp.sum(-1).exp()
    mean = (chances[:, None, None] * each).sum(0)
    variance = (chances * each.square().sum((1, 2))).sum() - mean.square().sum()
    return mean, variance.item()


def test_by_hand() -> None:
    """π_ref of the prefixes .5, .2, .02, .01: outside M(x) from the third token on."""
    ref_logp = torch.tensor([[0.5, 0.4, 0.1, 0.5, 0.5]], dtype=torch.float64).log()
    mask = torch.tensor([[True, True, True, True, False]])
    kept = of_sequences({"alpha": 0.1}).log_weights(ref_logp, mask)
    assert kept[0].tolist() == pytest.approx([0, 0, math.log(0.02), math.log(0.5), 0], abs=1e-12)
    fixed = of_sequences({"alpha": 0.1, "epsilon": 1e-3}).log_weights(ref_logp, mask)
    assert fixed[0].tolist() == pytest.approx([0, 0, math.log(1e-3), 0, 0], abs=1e-12)
    inside = of_sequences({"alpha": 0.01}).log_weights(ref_logp, mask)
    assert inside.abs().max() == 0
    # A response can come back to a geometric mean of .3: only the end decides.
    mean = of_sequences({"alpha_per_token": 0.35}).log_weights(ref_logp, mask)
    assert mean[0].tolist() == pytest.approx([0, 0, 0, math.log(0.01), 0], abs=1e-12)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_it_is_the_weight_of_the_response(config: dict[str, Any]) -> None:
    regularizer, ref_logp = of_sequences(config), token_logps(0)
    whole = ref_logp.sum(-1)
    inside = regularizer.natural(ref_logp, MASK)
    threshold = config.get("log_alpha", math.log(config.get("alpha", 1.0)))
    assert torch.equal(inside, whole >= threshold)
    assert inside.any() == (threshold <= 0)
    assert not inside.all()
    outside = whole
    if "epsilon" in config or "log_epsilon" in config:
        log_epsilon = config.get("log_epsilon", math.log(config.get("epsilon", 1.0)))
        outside = torch.full_like(whole, log_epsilon)
    expected = torch.where(inside, 0.0, outside)
    torch.testing.assert_close(regularizer.log_weights(ref_logp, MASK).sum(-1), expected)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_same_gradient_on_average_with_less_variance(config: dict[str, Any]) -> None:
    log_w, logp = of_sequences(config).log_weights(token_logps(0), MASK), token_logps(1)
    mean, variance = gradient(log_w, logp)
    last_mean, last_variance = gradient(at_the_end(log_w), logp)
    torch.testing.assert_close(mean, last_mean, rtol=1e-12, atol=1e-14)
    first_mean, _ = gradient(at_the_start(log_w), logp)
    if config.get("alpha") == 2.0:  # the weight is a constant
        assert mean.abs().max() < 1e-14
    else:
        assert (first_mean - mean).norm() > 0.3 * mean.norm()
    print(
        f"{config}: variance {last_variance:.3f} on the last token, {variance:.3f} token by token"
    )
    assert variance < 0.8 * last_variance
