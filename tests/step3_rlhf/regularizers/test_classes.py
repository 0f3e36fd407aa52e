"""Opinions rather than strings: the optimum over classes, and the estimate of a class's share."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from step3_rlhf.regularizers import Regularizer, ResponseSet, parse_regularizer
from step3_rlhf.regularizers.classes import ClassSettings, log_share
from step3_rlhf.regularizers.optimality import certificate
from step3_rlhf.regularizers.optimum import optimum
from training.config import check_config
from training.errors import UserError

OUTSIDE = -1
"""The class of a response that has none."""


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def by_class(beta: float = 1.0, **parameters: Any) -> Regularizer:
    classes = {"lengths": [4]}  # what decides the class makes no difference to the mathematics
    settings = {"name": "conditional_pm", "level": "class", "classes": classes, "beta": beta}
    return parse_regularizer(settings | parameters)


def shares_of(log_ref: Tensor, classes: Tensor) -> Tensor:
    """[K] log π_ref(c(y)) of each response's class, −inf outside every class."""
    together = torch.stack([log_ref[classes == c].logsumexp(0) for c in classes])
    return torch.where(classes == OUTSIDE, -math.inf, together)


def responses_of(log_ref: Tensor, rewards: Tensor, class_logp: Tensor | None) -> ResponseSet:
    count = len(rewards)
    return ResponseSet(
        torch.arange(count)[:, None],
        log_ref[:, None],
        torch.ones(count, 1, dtype=torch.bool),
        rewards,
        class_logp,
    )


def sums(log_pi: Tensor, classes: Tensor) -> list[float]:
    return [log_pi[classes == c].exp().sum().item() for c in classes.unique()]


PHRASINGS = torch.tensor([0] * 1 + [1] * 5 + [2] * 25)
"""Three opinions with 1, 5 and 25 phrasings."""


def random_problem(classes: Tensor, seed: int = 0, mass: float = 1.0) -> tuple[Tensor, Tensor]:
    """Rewards and log π_ref, both [K]; the reference has `mass` on the set."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(len(classes), generator=generator, dtype=torch.float64)
    log_ref = torch.randn(len(classes), generator=generator, dtype=torch.float64)
    return rewards, log_ref.log_softmax(0) + math.log(mass)


# The optimum


def test_an_opinion_has_one_share_however_many_phrasings_it_has() -> None:
    """1, 5 and 25 phrasings, all equally good: a third each, whatever the reference. Matching over
    strings, the wrong variant, gives 1 : 5 : 25."""
    rewards = torch.zeros(len(PHRASINGS), dtype=torch.float64)
    _, log_ref = random_problem(PHRASINGS)
    classes = responses_of(log_ref, rewards, shares_of(log_ref, PHRASINGS))
    found = sums(optimum(by_class(), classes), PHRASINGS)
    assert found == pytest.approx([1 / 3] * 3, abs=1e-12)
    strings = sums(optimum(parse_regularizer({"name": "pm"}), classes), PHRASINGS)
    assert strings == pytest.approx([1 / 31, 5 / 31, 25 / 31], abs=1e-12)
    # The reference's own opinions are others: kl would inherit them.
    biased = sums(optimum(parse_regularizer({"name": "kl"}), classes), PHRASINGS)
    assert max(abs(share - 1 / 3) for share in biased) > 0.3


def test_another_phrasing_changes_no_opinions_share() -> None:
    """Half of a phrasing's probability goes to a new phrasing of the same opinion and reward."""
    rewards, log_ref = random_problem(PHRASINGS, seed=1)
    before = responses_of(log_ref, rewards, shares_of(log_ref, PHRASINGS))
    halved = log_ref.clone()
    halved[0] -= math.log(2)
    longer = torch.cat([halved, halved[:1]])
    classes = torch.cat([PHRASINGS, PHRASINGS[:1]])
    after = responses_of(longer, torch.cat([rewards, rewards[:1]]), shares_of(longer, classes))
    wanted = sums(optimum(by_class(), before), PHRASINGS)
    assert sums(optimum(by_class(), after), classes) == pytest.approx(wanted, abs=1e-12)
    pm = parse_regularizer({"name": "pm"})
    moved = sums(optimum(pm, after), classes)[0] / sums(optimum(pm, before), PHRASINGS)[0]
    assert moved > 1.5


@pytest.mark.parametrize("beta", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("mass", [1.0, 0.6])
def test_classes_get_the_mean_of_e_to_the_reward_and_within_it_is_kl(
    beta: float, mass: float
) -> None:
    rewards, log_ref = random_problem(PHRASINGS, seed=2, mass=mass)
    responses = responses_of(log_ref, rewards, shares_of(log_ref, PHRASINGS))
    log_pi = optimum(by_class(beta), responses)
    utilities = (rewards / beta).exp()
    means = []
    for c in range(3):
        inside = c == PHRASINGS
        within = log_ref[inside].softmax(0)  # π_ref(y|c)
        means.append((within * utilities[inside]).sum().item())
        wanted = (log_ref[inside] + rewards[inside] / beta).log_softmax(0)
        torch.testing.assert_close(log_pi[inside].log_softmax(0), wanted, rtol=0, atol=1e-12)
    assert sums(log_pi, PHRASINGS) == pytest.approx([m / sum(means) for m in means], abs=1e-12)


def test_responses_outside_every_class_keep_the_references_weight() -> None:
    classes = torch.tensor([0, 0, 1, OUTSIDE, OUTSIDE])
    log_ref = vector(0.4, 0.2, 0.1, 0.25, 0.05).log()
    rewards = vector(0.0, math.log(3), math.log(2), math.log(4), 0.0)
    found = optimum(by_class(), responses_of(log_ref, rewards, shares_of(log_ref, classes))).exp()
    weights = vector(0.4 / 0.6, 0.2 / 0.6 * 3, 2.0, 0.25 * 4, 0.05)
    torch.testing.assert_close(found, weights / weights.sum(), rtol=1e-12, atol=0)


def test_only_natural_classes_are_matched() -> None:
    classes = torch.tensor([0, 0, 1, 2])
    log_ref = vector(0.5, 0.25, 0.2, 0.05).log()
    rewards = vector(0.0, 0.0, 1.0, 2.0)
    responses = responses_of(log_ref, rewards, shares_of(log_ref, classes))
    for threshold in ({"alpha": 0.1}, {"log_alpha": math.log(0.1)}):
        regularizer = by_class(**threshold)
        natural = regularizer.natural(responses.ref_logp, responses.mask, responses.class_logp)
        assert natural is not None
        assert natural.tolist() == [True, True, True, False]
        weights = vector(0.5 / 0.75, 0.25 / 0.75, 1.0, 0.05) * rewards.exp()
        found = optimum(regularizer, responses).exp()
        torch.testing.assert_close(found, weights / weights.sum(), rtol=1e-12, atol=0)


def test_identities() -> None:
    rewards, log_ref = random_problem(torch.arange(6), seed=3)
    kl, pm = (optimum_of_strings(name, log_ref, rewards) for name in ("kl", "pm"))

    def over(classes: Tensor, **parameters: Any) -> Tensor:
        responses = responses_of(log_ref, rewards, shares_of(log_ref, classes))
        return optimum(by_class(**parameters), responses)

    # every string is an opinion; all are one; none is natural; none has a class
    torch.testing.assert_close(over(torch.arange(6)), pm, rtol=0, atol=1e-12)
    torch.testing.assert_close(over(torch.zeros(6).long()), kl, rtol=0, atol=1e-12)
    torch.testing.assert_close(over(torch.arange(6), alpha=1.1), kl, rtol=0, atol=1e-12)
    torch.testing.assert_close(over(torch.full((6,), OUTSIDE)), kl, rtol=0, atol=1e-12)
    assert (pm.exp() - kl.exp()).abs().sum() > 0.2


def optimum_of_strings(name: str, log_ref: Tensor, rewards: Tensor) -> Tensor:
    return optimum(parse_regularizer({"name": name}), responses_of(log_ref, rewards, None))


def test_the_certificate_is_zero_at_its_optimum_and_nowhere_else() -> None:
    rewards, log_ref = random_problem(PHRASINGS, seed=4)
    responses = responses_of(log_ref, rewards, shares_of(log_ref, PHRASINGS))
    regularizer = by_class(0.7)

    def spread(log_pi: Tensor, class_logp: Tensor) -> float:
        marginal = regularizer.marginal(log_pi[:, None], responses.ref_logp, responses.mask)
        credit = regularizer.effective_reward(rewards, class_logp) + marginal.per_token.sum(-1)
        return certificate(credit[None], regularizer)["spread"].item()

    assert responses.class_logp is not None
    best = optimum(regularizer, responses)
    assert spread(best, responses.class_logp) <= 1e-24
    pm = optimum(parse_regularizer({"name": "pm", "beta": 0.7}), responses)
    assert spread(pm, responses.class_logp) > 0.1
    # with the response's own probability in place of its class's
    assert spread(best, log_ref) > 0.1


def test_the_mathematics_of_one_response() -> None:
    """π = 0.2, π_ref = 0.04 in two tokens, a class of 0.5: r + β log 2, and the penalty of kl."""
    logp, ref_logp = vector(0.5, 0.4).log()[None], vector(0.8, 0.05).log()[None]
    mask = torch.tensor([[True, True]])
    regularizer = by_class(2.0)
    rewards, class_logp = vector(3.0), vector(0.5).log()
    effective = regularizer.effective_reward(rewards, class_logp)
    assert effective.tolist() == pytest.approx([3.0 + 2 * math.log(2)], abs=1e-12)
    per_token = regularizer.marginal(logp, ref_logp, mask).per_token
    wanted = [-2 * math.log(0.5 / 0.8), -2 * math.log(0.4 / 0.05)]
    assert per_token.tolist()[0] == pytest.approx(wanted, abs=1e-12)
    assert regularizer.value(logp, ref_logp, mask).tolist() == pytest.approx([-2 * math.log(5)])
    single = regularizer.effective_reward(rewards.float(), class_logp)
    assert single.dtype == torch.float32
    with pytest.raises(ValueError, match="needs class_logp"):
        regularizer.effective_reward(rewards)
    with pytest.raises(ValueError, match="needs class_logp"):
        regularizer.natural(ref_logp, mask)
    assert by_class().response_classes == ClassSettings(lengths=(4,))
    assert parse_regularizer({"name": "kl"}).response_classes is None
    assert not by_class().weighs_tokens  # type: ignore[attr-defined]


# The estimate of a share


@pytest.mark.parametrize("draws", [1, 4, 64])
@pytest.mark.parametrize("p", [0.02, 0.3, 0.9])
def test_the_estimate_is_log_p_but_for_the_tail_of_its_series(draws: int, p: float) -> None:
    """Its expectation, over every number that can be drawn."""
    counts = torch.arange(draws + 1)
    chances = vector(
        *(math.comb(draws, n) * p**n * (1 - p) ** (draws - n) for n in range(draws + 1))
    )
    found = (chances * log_share(counts, draws)).sum().item()
    series = -sum((1 - p) ** i / i for i in range(1, draws + 1))
    assert found == pytest.approx(series, rel=1e-10)
    tail = (1 - p) ** (draws + 1) / ((draws + 1) * p)
    assert -1e-12 <= found - math.log(p) <= tail + 1e-12


def test_the_share_of_the_draws_itself_would_be_biased() -> None:
    """The wrong variants: log of the share, where there is one, and log of the smoothed share."""
    draws, p = 64, 0.1
    counts = torch.arange(draws + 1)
    chances = vector(
        *(math.comb(draws, n) * p**n * (1 - p) ** (draws - n) for n in range(draws + 1))
    )
    ours = (chances * log_share(counts, draws)).sum().item() - math.log(p)
    smoothed = (chances * ((counts + 0.5) / (draws + 1)).log()).sum().item() - math.log(p)
    some = chances[1:] / chances[1:].sum()
    plain = (some * (counts[1:] / draws).log()).sum().item() - math.log(p)
    assert abs(ours) < 2e-4
    assert abs(plain) > 0.05
    assert abs(smoothed) > 0.002
    assert log_share(torch.tensor(0), draws).item() == pytest.approx(math.log(0.56 / 64), abs=0.02)
    assert log_share(torch.tensor(draws), draws).item() == 0.0


# Configs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"level": "token", "alpha": 0.1}, "classes: "),
        ({"classes": None}, "classes: "),
        ({"alpha": 0.1, "log_alpha": -2.0}, "exactly one of"),
        ({"alpha_per_token": 0.1}, "alpha_per_token: only with"),
        ({"epsilon": 0.1}, "epsilon: only with"),
        ({"classes": {"answer_kee": "x"}}, "did you mean 'answer_key'?"),
        ({"classes": {"function": "no_colon"}}, "pattern"),
        ({"classes": {"lengths": [0]}}, "greater than or equal to 1"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message.replace("?", r"\?")):
        by_class(**changes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give exactly one of answer_key, function, lengths"),
        ({"lengths": [4], "function": "a:b"}, "give exactly one"),
        ({"lengths": [8, 4]}, "lengths: they must ascend"),
        ({"lengths": [4, 4]}, "lengths: they must ascend"),
        ({"answer_key": "nowhere.jsonl"}, "answer_key: nowhere.jsonl does not exist"),
    ],
)
def test_contradictory_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_config(ClassSettings, settings, "classes:")


def test_an_answer_key_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "key.jsonl").touch()
    assert ClassSettings(answer_key=str(tmp_path / "key.jsonl")).faults() == []
