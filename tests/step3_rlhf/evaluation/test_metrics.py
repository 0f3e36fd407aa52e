"""The paper's metrics by hand, finite wherever their arguments are."""

import math

import pytest
import torch

from step3_rlhf.evaluation.metrics import (
    kl_divergence,
    pm_divergence,
    response_perplexity,
    text_perplexity,
    total_variation,
)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def bernoulli_kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def test_pm_divergence_by_hand() -> None:
    """π(y1) = 0.6, π(y2) = 0.2, so p_llm = 3/4; r1 − r2 = log 4 at β = 2, so p_reward = 2/3."""
    found = pm_divergence(
        tensor(math.log(0.6)), tensor(math.log(0.2)), tensor(math.log(4)), tensor(0.0), 2.0
    )
    assert found.item() == pytest.approx(bernoulli_kl(0.75, 2 / 3), rel=1e-12)
    assert found.item() == pytest.approx(0.01641675862934, rel=1e-9)


def test_pm_divergence_is_zero_exactly_at_preference_matching() -> None:
    """log π = r/β + c gives 0, whatever c; without the division by β it does not."""
    torch.manual_seed(0)
    rewards = 3 * torch.randn(2, 50, dtype=torch.float64)
    logp = rewards / 0.5 - 7.0
    matched = pm_divergence(logp[0], logp[1], rewards[0], rewards[1], 0.5)
    assert matched.abs().max() < 1e-12
    assert pm_divergence(logp[0], logp[1], rewards[0], rewards[1], 1.0).mean() > 0.01


def test_pm_divergence_of_equal_responses_is_zero() -> None:
    assert pm_divergence(tensor(-3.0), tensor(-3.0), tensor(1.0), tensor(1.0), 1.0).item() == 0.0


def test_pm_divergence_of_extreme_ratios_is_finite() -> None:
    found = pm_divergence(
        tensor(-1e4, 0.0), tensor(0.0, -1e4), tensor(0.0, 0.0), tensor(0.0, 1e4), 1.0
    )
    # KL(0 ‖ ½) = log 2; KL(1 ‖ σ(−10⁴)) = 10⁴
    assert found.tolist() == pytest.approx([math.log(2), 1e4], rel=1e-9)
    single = pm_divergence(*(torch.tensor([x]) for x in (-300.0, 0.0, 200.0, 0.0)), 1.0)
    assert single.item() == pytest.approx(200.0, rel=1e-6)


def test_perplexities_by_hand() -> None:
    # p = ½ · ⅛ over two tokens: (1/16)^(−1/2) = 4
    logp, lengths = tensor(math.log(1 / 16), math.log(1 / 9)), tensor(2, 2)
    assert response_perplexity(logp, lengths).tolist() == pytest.approx([4.0, 3.0])
    # over all four tokens: 144^(1/4)
    assert text_perplexity(logp, lengths) == pytest.approx(144**0.25)
    uneven = text_perplexity(tensor(math.log(1 / 16), math.log(1 / 9)), tensor(2, 1))
    assert uneven == pytest.approx(144 ** (1 / 3))


def test_total_variation_and_kl_by_hand() -> None:
    p, q = tensor(0.5, 0.5, 0.0).log(), tensor(0.25, 0.25, 0.5).log()
    assert total_variation(p, q).item() == pytest.approx(0.5)
    assert kl_divergence(p, q).item() == pytest.approx(math.log(2))
    assert kl_divergence(q, p).item() == math.inf
    assert kl_divergence(p, p).item() == 0.0
    both = total_variation(torch.stack([p, q]), torch.stack([q, q]))
    assert both.tolist() == pytest.approx([0.5, 0.0])
