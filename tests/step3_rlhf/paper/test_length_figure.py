"""The figure of length: the shares that it plots."""

import pytest
import torch

from step3_rlhf.paper.length_figure import (
    CURVES,
    LENGTHS,
    PHRASINGS,
    long_share,
    share_up_to,
    shares,
    words,
)
from step3_rlhf.regularizers.registry import parse_regularizer
from training.world.population import population_shares, writers_shares
from training.world.topics import TOPICS

KL, PM, CONDITIONAL, CLASSES = (parse_regularizer(config) for config, _ in CURVES.values())


def test_with_one_phrasing_pm_is_the_population_and_kl_is_tilted_by_the_writers() -> None:
    for topic in TOPICS:
        population, writers = population_shares(topic), writers_shares(topic)
        assert shares(PM, topic).tolist() == pytest.approx(population.tolist(), abs=1e-12)
        tilted = population * writers / (population * writers).sum()
        assert shares(KL, topic).tolist() == pytest.approx(tilted.tolist(), abs=1e-12)


def test_a_length_has_the_writers_mean_of_the_populations_shares() -> None:
    """e^r is the population's share; the writers' mean of it within a length, normalized."""
    for topic in TOPICS:
        population, writers = population_shares(topic), writers_shares(topic)
        lengths = [sum(count > end for end in LENGTHS) for count in words(topic)]
        inside = {c: [c == other for other in lengths] for c in set(lengths)}
        means = {c: (writers * population)[i].sum() / writers[i].sum() for c, i in inside.items()}
        found = shares(CLASSES, topic)
        for c, rows in inside.items():
            expected = means[c] / sum(means.values())
            assert found[torch.tensor(rows)].sum().item() == pytest.approx(expected, abs=1e-12)


def test_more_phrasings_of_long_answers_move_strings_and_not_classes() -> None:
    for regularizer in (KL, CLASSES):
        found = [long_share(regularizer, count) for count in PHRASINGS]
        assert found == pytest.approx([found[0]] * len(found), abs=1e-12)
    strings = [long_share(PM, count) for count in PHRASINGS]
    assert strings == sorted(strings)
    assert strings[0] == pytest.approx(0.296, abs=5e-4)
    assert strings[-1] == pytest.approx(0.885, abs=5e-4)
    # One response's probability falls below α as the phrasings multiply.
    assert max(long_share(CONDITIONAL, count) for count in PHRASINGS) > 0.5
    assert long_share(CONDITIONAL, 25) < 0.35


def test_shares_up_to_a_length() -> None:
    population = [torch.tensor(population_shares(topic)) for topic in TOPICS]
    assert share_up_to(10, population) == pytest.approx(1.0, abs=1e-12)
    assert share_up_to(0, population) == 0.0
    assert share_up_to(1, population) < share_up_to(2, population)
