"""The law of truncation, by dynamic programming over a bigram reference."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from step3_rlhf.regularizers import ResponseSet, parse_regularizer
from step3_rlhf.regularizers.log_linear import LogLinear
from step3_rlhf.regularizers.optimum import optimum
from step3_rlhf.regularizers.truncation import cut_share, end_weight_of, log_growth_of

TOKENS, END = 6, 6
ALPHAS = [0.02, 0.1, 0.15, 0.2, 0.3, 0.5, 1.1]


def bigram(tokens: int = TOKENS, seed: int = 3) -> Tensor:
    """[tokens, tokens + 1] log π_ref(v|s), the end last."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(tokens, tokens + 1, generator=generator).double()
    return logits.log_softmax(-1)


def token_level(alpha: float) -> LogLinear:
    found = parse_regularizer({"name": "conditional_pm", "alpha": alpha})
    assert isinstance(found, LogLinear)
    return found


def weights(regularizer: LogLinear, log_ref: Tensor) -> tuple[Tensor, Tensor]:
    """W [s, v] over the tokens that do not end, and e [s]."""
    w = regularizer.log_weights(log_ref, torch.ones_like(log_ref).bool()).exp()
    return w[:, :-1], w[:, -1]


def cut_by_dynamic_programming(w: Tensor, e: Tensor, start: int, length: int) -> float:
    """Share of the weight of cut responses, all responses of at most `length` tokens counted."""
    state = torch.zeros(len(w), dtype=torch.float64)
    state[start] = 1.0
    ended = 0.0
    for _ in range(length):
        ended += (state @ e).item()
        state = state @ w
        scale = state.sum().item()  # only ratios matter, and powers of ρ overflow
        state, ended = state / scale, ended / scale
    return 1.0 / (1.0 + ended)


def perron(w: Tensor) -> tuple[float, Tensor]:
    """ρ and its left eigenvector with sum 1."""
    values, vectors = torch.linalg.eig(w.T)
    place = int(values.real.argmax())
    u = vectors[:, place].real
    return values[place].real.item(), u / u.sum()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_limit_of_the_share_of_cut_responses(alpha: float) -> None:
    w, e = weights(token_level(alpha), bigram())
    rho, u = perron(w)
    measured = [cut_by_dynamic_programming(w, e, start, 4000) for start in range(TOKENS)]
    law = (rho - 1) / (rho - 1 + (u @ e).item()) if rho > 1 else 0.0
    assert measured == pytest.approx([law] * TOKENS, abs=1e-6)
    assert cut_share(math.log(rho), (u @ e).item(), 4000) == pytest.approx(law, abs=1e-6)


def test_both_sides_of_1_are_among_the_thresholds() -> None:
    roots = {alpha: perron(weights(token_level(alpha), bigram())[0])[0] for alpha in ALPHAS}
    assert roots[0.02] > 1.5
    assert roots[1.1] < 1  # kl: rows of W sum to 1 − π_ref(end)
    assert sorted(roots.values(), reverse=True) == [roots[alpha] for alpha in ALPHAS]


def test_with_one_state_the_share_is_exact_at_every_length() -> None:
    w, e = torch.tensor([[1.3]], dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64)
    for length in (1, 2, 7, 50):
        found = cut_share(math.log(1.3), 0.2, length)
        assert found == pytest.approx(cut_by_dynamic_programming(w, e, 0, length), rel=1e-12)
    assert cut_share(math.log(1.3), 0.2, 10_000) == pytest.approx(0.3 / 0.5, rel=1e-12)
    assert cut_share(0.0, 0.5, 4) == pytest.approx(1 / 3, rel=1e-12)  # ρ = 1: 1/(1 + 4 · ½)
    assert cut_share(-1.0, 0.5, 10_000) == 0.0
    # kl: the reference's own share of cut responses
    assert cut_share(math.log(0.9), 0.1, 20) == pytest.approx(0.9**20, rel=1e-12)


def test_it_is_the_share_of_the_optimum_and_rewards_move_its_odds_by_their_spread() -> None:
    """All responses of at most four tokens over two: the package's own optimum."""
    log_ref, length, beta = bigram(tokens=2, seed=1), 4, 0.5
    end = 2
    rows = [[*y, end] for n in range(length) for y in itertools.product(range(2), repeat=n)] + [
        list(y) for y in itertools.product(range(2), repeat=length)
    ]
    tokens = torch.tensor([y + [end] * (length - len(y)) for y in rows])
    mask = torch.tensor([[t < len(y) for t in range(length)] for y in rows])
    before = torch.tensor([[0, *y][:length] + [0] * (length - 1 - len(y)) for y in rows])
    cut = torch.tensor([y[-1] != end for y in rows])
    regularizer = parse_regularizer({"name": "conditional_pm", "alpha": 0.3, "beta": beta})
    assert isinstance(regularizer, LogLinear)
    w, e = weights(regularizer, log_ref)

    def odds(rewards: Tensor) -> float:
        best = optimum(
            regularizer, ResponseSet(tokens, log_ref[before.clamp(max=1), tokens], mask, rewards)
        )
        return (best.exp()[cut].sum() / best.exp()[~cut].sum()).item()

    expected = cut_by_dynamic_programming(w, e, 0, length)
    flat = odds(torch.zeros(len(rows)))
    assert flat == pytest.approx(expected / (1 - expected), rel=1e-9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        rewards = torch.rand(len(rows), generator=generator)
        largest = math.exp((rewards.max() - rewards.min()).item() / beta)
        assert flat / largest < odds(rewards) < flat * largest
    assert odds(cut.double()) == pytest.approx(flat * math.exp(1 / beta), rel=1e-9)


def test_growth_and_end_weight_of_a_prefix() -> None:
    """α = .3 over (.5, .2, .2, .1): 1 + .2 + .1 without the third, which ends; ids that do not
    exist weigh nothing, even under pm."""
    shares = torch.tensor([[0.5, 0.2, 0.2, 0.1, 0.0]]).double()
    log_ref = shares.log().clamp(min=torch.finfo(torch.float32).min)
    ends = torch.tensor([False, False, True, False, False])
    conditional, pm = token_level(0.3), parse_regularizer({"name": "pm"})
    assert isinstance(pm, LogLinear)
    assert log_growth_of(conditional, log_ref, ends).item() == pytest.approx(math.log(1.3))
    assert end_weight_of(conditional, log_ref, ends).item() == pytest.approx(0.2)
    assert log_growth_of(pm, log_ref, ends).item() == pytest.approx(math.log(3))
    assert end_weight_of(pm, log_ref, ends).item() == pytest.approx(1.0)
    kl = parse_regularizer({"name": "kl"})
    assert isinstance(kl, LogLinear)
    assert log_growth_of(kl, log_ref, ends).item() == pytest.approx(math.log(0.8))


# How much of the optimum is natural


def natural_by_dynamic_programming(alpha: float, log_ref: Tensor, length: int) -> float:
    """π*(M) at r = 0: weight of the responses whose tokens all have π_ref ≥ α, of that of all."""
    w, e = weights(token_level(alpha), log_ref)
    inside = log_ref >= math.log(alpha)
    in_w, in_e = w * inside[:, :-1], e * inside[:, -1]
    whole, natural = torch.zeros(2, len(w), dtype=torch.float64)
    whole[0] = natural[0] = 1.0
    all_ended = natural_ended = 0.0
    for _ in range(length):
        all_ended, natural_ended = all_ended + whole @ e, natural_ended + natural @ in_e
        whole, natural = whole @ w, natural @ in_w
    return ((natural_ended + natural.sum()) / (all_ended + whole.sum())).item()


def test_few_long_responses_are_natural_at_the_level_of_tokens() -> None:
    """Twenty tokens: what is claimed of this level is of less and less as responses grow."""
    log_ref = bigram(tokens=20, seed=0)
    found = {
        length: [natural_by_dynamic_programming(alpha, log_ref, length) for alpha in (0.02, 0.1)]
        for length in (1, 4, 32)
    }
    assert found[1] == pytest.approx([0.9917, 0.8404], abs=1e-4)
    assert found[4] == pytest.approx([0.9645, 0.5415], abs=1e-4)
    assert found[32] == pytest.approx([0.7517, 0.0098], abs=1e-4)
    assert natural_by_dynamic_programming(0.3, log_ref, 1) == 0.0  # no token after the first state
