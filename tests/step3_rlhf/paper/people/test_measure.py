"""What is measured on a board: closed forms, and the reference rows."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from step3_rlhf.paper.people.alpha import (
    OUTSIDE_MARGIN,
    Drawn,
    choose,
    log_weight,
    outside_log_mass,
)
from step3_rlhf.paper.people.boards import Board, boards_of
from step3_rlhf.paper.people.measure import (
    FIGURES,
    majority,
    measure,
    minority_share,
    pm_divergence,
    sampling_distance,
    squared,
    uniform,
)
from step3_rlhf.paper.people.reward_model import measure_reward_model

PEOPLE = [0.5, 0.3, 0.15, 0.05]


def entry(identity: str = "q1", **changes: Any) -> dict[str, Any]:
    """As in evaluation.json."""
    rewards = [math.log(share) for share in PEOPLE]
    return {
        "prompt": f"name a pet of {identity}.",
        "topic": f"unseen/{identity}",
        "responses": ["dog", "cat", "fish", "newt"],
        "population": PEOPLE,
        "policy": [0.6, 0.3, 0.08, 0.02],
        "reference": [0.4, 0.4, 0.1, 0.1],
        "rewards": rewards,
        "reward": PEOPLE,
        "outside_mass": 0.25,
    } | changes


def board(**changes: Any) -> Board:
    (found,) = boards_of({"exact": {"per_prompt": [entry(**changes)]}})
    return found


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_figures_of_a_board() -> None:
    found = board()
    assert FIGURES["tv_to_people"](found) == pytest.approx(0.1)
    assert FIGURES["tv_to_reward"](found) == pytest.approx(0.1)
    assert FIGURES["reward_to_people"](found) == 0
    assert FIGURES["outside_mass"](found) == 0.25
    assert FIGURES["top_share"](found) == 0.6
    assert FIGURES["minority_share"](found) == 0.02
    assert FIGURES["tv_to_optimum"](found) is None
    assert FIGURES["entropy"](found) == pytest.approx(
        -sum(p * math.log(p) for p in (0.6, 0.3, 0.08, 0.02))
    )
    optimal = board(optimum=[0.7, 0.2, 0.08, 0.02])
    assert FIGURES["tv_to_optimum"](optimal) == pytest.approx(0.1)


def test_other_strings_that_count_are_told_apart_from_the_rest() -> None:
    every = entry() | {"topic": "unseen-strings/q1", "outside_mass": 0.1}
    del every["population"]
    (found,) = boards_of({"exact": {"per_prompt": [entry(), every]}})
    assert found.other_answers == pytest.approx(0.15)
    assert board().other_answers is None


def test_minorities_are_below_a_tenth_of_people() -> None:
    people = tensor(0.8, 0.1, 0.06, 0.04)
    assert minority_share(uniform(people), people) == pytest.approx(0.5)
    assert minority_share(people, tensor(0.5, 0.4, 0.1)) is None


def test_pm_divergence_is_zero_at_the_reward_models_softmax_and_under_collapse() -> None:
    people, rewards = tensor(*PEOPLE), tensor(*PEOPLE).log()
    assert pm_divergence(people, rewards, people, unequal=False) == pytest.approx(0, abs=1e-12)
    # 99.9 % on the least liked answer: the paper's figure passes it, those of unequal pairs do not
    collapsed = tensor(0.001 / 3, 0.001 / 3, 0.001 / 3, 0.999)
    figures = {
        (unequal, name): pm_divergence(collapsed, rewards, drawn, unequal) or 0.0
        for unequal in (False, True)
        for name, drawn in (("own", collapsed), ("reference", people))
    }
    assert 0 < figures[False, "own"] < 0.02
    assert figures[True, "own"] > 1
    assert figures[True, "reference"] > 0.3


def test_pm_divergence_of_two_answers_literally() -> None:
    p, q = 0.75, 0.5
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    policy, rewards = tensor(p, 1 - p), tensor(0.0, 0.0)
    assert pm_divergence(policy, rewards, policy, unequal=True) == pytest.approx(kl)
    whole = pm_divergence(policy, rewards, policy, unequal=False)
    assert whole == pytest.approx(2 * p * (1 - p) * kl)
    assert pm_divergence(tensor(1.0, 0.0), rewards, tensor(1.0, 0.0), unequal=True) is None


def test_means_are_over_questions_after_seeds() -> None:
    first, second = board(), board(identity="q2", outside_mass=0.5)
    other_seed = replace(first, outside=0.35)
    found = measure([[first, second], [other_seed]], FIGURES["outside_mass"])
    assert found is not None
    assert (found.mean, found.clusters) == (pytest.approx((0.3 + 0.5) / 2), 2)
    assert measure([[first]], FIGURES["tv_to_optimum"]) is None


def test_reference_rows_literally() -> None:
    people = tensor(0.5, 0.3, 0.2)
    assert majority(people).tolist() == [1, 0, 0]
    assert squared(people).tolist() == pytest.approx([25 / 38, 9 / 38, 4 / 38])
    # a fair coin thrown 94 times: E|k/94 − 1/2| = C(94, 47) 2^−95
    fair = math.comb(94, 47) / 2**95
    assert sampling_distance(tensor(0.5, 0.5)) == pytest.approx(fair, abs=0.005)


# The reward model


def test_the_ceilings_are_reached_by_peoples_own_shares() -> None:
    found = measure_reward_model([board()])
    pairs = [(a, b) for i, a in enumerate(PEOPLE) for b in PEOPLE[i + 1 :]]
    weight = sum(a + b for a, b in pairs)
    assert (
        found.accuracy.mean
        == found.best_accuracy
        == pytest.approx(sum(max(a, b) for a, b in pairs) / weight)
    )
    loss = -sum(a * math.log(a / (a + b)) + b * math.log(b / (a + b)) for a, b in pairs) / weight
    assert found.log_loss.mean == pytest.approx(loss) == found.best_log_loss
    assert found.ece == pytest.approx(0, abs=1e-6)


def test_a_reward_model_that_knows_nothing_or_the_opposite() -> None:
    ignorant = measure_reward_model([board(rewards=[0.0] * 4)])
    assert ignorant.accuracy.mean == 0.5
    assert ignorant.log_loss.mean == pytest.approx(math.log(2))
    wrong = measure_reward_model([board(rewards=[-math.log(share) for share in PEOPLE])])
    assert wrong.accuracy.mean == pytest.approx(1 - wrong.best_accuracy)
    assert wrong.ece > 0.3


# α


def instances(rewards: float, ref_logp: float = math.log(1e-3)) -> list[dict[str, Any]]:
    off = {"text": "stone", "ref_logp": ref_logp, "reward": rewards}
    return [{"prompt": entry()["prompt"], "responses": [off] * 3 + [off | {"text": "dog"}]}]


def evaluation() -> dict[str, Any]:
    return {"preference_temperature": 1.0, "exact": {"per_prompt": [entry()]}}


def test_weights_of_natural_responses_are_one() -> None:
    assert log_weight(tensor(-1.0, -3.0), math.exp(-2)).tolist() == [0.0, -3.0]


def test_the_mass_outside_is_estimated_without_bias() -> None:
    # two strings off the board, of which the reference draws one twice as often
    w = [log_weight(tensor(math.log(p)), 0.05).item() for p in (0.2, 0.1)]
    exact = sum(math.exp(lw + r) for lw, r in zip(w, (0.3, -1.0), strict=True))
    drawn = [Drawn(math.log(0.2), 0.3)] * 2 + [Drawn(math.log(0.1), -1.0)]
    assert math.exp(outside_log_mass(drawn, 10, 0.05, 1.0)) == pytest.approx(exact)
    assert outside_log_mass([], 10, 0.05, 1.0) == -math.inf


def test_where_everything_else_is_disliked_the_largest_alpha_that_matches_is_taken() -> None:
    found = choose(evaluation(), boards_of(evaluation()), instances(rewards=-20.0), True)
    assert found.reference_outside_mass == 0.25
    best = min(candidate.tv_to_reward for candidate in found.candidates)
    assert best == pytest.approx(0, abs=1e-12)
    assert found.alpha == 0.01  # at 0.1 two of the four answers are no longer natural
    assert found.candidates[-1].tv_to_reward > 0.1


def test_an_alpha_that_lets_nonsense_in_is_not_chosen() -> None:
    found = choose(evaluation(), boards_of(evaluation()), instances(rewards=-1.0), True)
    chosen = next(c for c in found.candidates if c.alpha == found.alpha)
    lowest = found.candidates[0]
    assert lowest.tv_to_reward < 1e-9
    assert lowest.outside_mass > 0.25 + OUTSIDE_MARGIN
    assert chosen.alpha == 0.01
    assert chosen.outside_mass <= 0.25 + OUTSIDE_MARGIN
    limited = choose(evaluation(), boards_of(evaluation()), instances(rewards=3.0), True)
    assert limited.alpha == 0.01  # none is allowed; this one has the least outside
    free = choose(evaluation(), boards_of(evaluation()), instances(rewards=3.0), False)
    assert free.alpha == 0.01
