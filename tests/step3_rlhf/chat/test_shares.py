"""Counting answers: how they are grouped, their shares, and the entropy."""

import math

import pytest

from step3_rlhf.chat.plain import shares_text
from step3_rlhf.chat.shares import Distribution, grouped, rows_of


def test_white_space_does_not_tell_answers_apart() -> None:
    assert grouped(" Green\n\n tea ") == "Green tea"
    assert grouped("Green  tea") == grouped("Green tea") != grouped("green tea")
    found = Distribution(["Tea", " Tea\n", "tea", "Tea."])
    assert found.counts == {"Tea": 2, "tea": 1, "Tea.": 1}


def test_shares_intervals_and_entropy() -> None:
    found = Distribution(["tea"] * 15 + ["coffee"] * 5)
    share = found.share("coffee")
    assert (found.total, found.distinct) == (20, 2)
    assert (share.count, share.value) == (5, 0.25)
    assert share.low == pytest.approx(0.0866, abs=5e-5)  # tables of Clopper and Pearson
    assert share.high == pytest.approx(0.4910, abs=5e-5)
    assert str(share) == " 25.0% [8.7%, 49.1%]"
    assert found.entropy == pytest.approx(math.log(4) - 0.75 * math.log(3), abs=1e-12)
    assert found.share("water").count == 0


def test_a_collapsed_policy_has_entropy_0() -> None:
    found = Distribution(["tea"] * 200)
    assert found.entropy == 0.0
    assert str(found) == "200 answers, 1 different, entropy 0.00 nats"
    assert found.share("tea").high == 1.0
    assert found.share("tea").low == pytest.approx(0.025 ** (1 / 200), abs=1e-9)


def test_rows_are_the_same_for_all_models() -> None:
    kl, pm = Distribution(["a"] * 9 + ["b"]), Distribution(["b"] * 5 + ["a"] * 3 + ["", "c"])
    rows = rows_of([kl, pm], top=2)
    assert [row.label for row in rows] == ["a", "b", "other (2 different)"]
    assert [[share.count for share in row.shares] for row in rows] == [[9, 3], [1, 5], [0, 2]]
    assert [row.label for row in rows_of([kl, pm], top=4)] == ["a", "b", "(no text)", "c"]


def test_plain_text() -> None:
    text = shares_text("Drink?", ["kl"], [Distribution(["tea"] * 3 + ["coffee"])], top=1)
    assert text.splitlines() == [
        "Drink?",
        "",
        "kl: 4 answers, 2 different, entropy 0.56 nats",
        "   75.0% [19.4%, 99.4%]    3  tea",
        "   25.0% [0.6%, 80.6%]     1  other (1 different)",
    ]
