"""The exact preferences of the bundled world."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from training.world.topics import Topic

TASTE_SPREAD = np.log(90.0)
"""r* of a group's favourite less that of its least liked answer, if there are two groups."""


def population_shares(topic: Topic) -> np.ndarray:
    """softmax(r*) [n_answers]: the share of the population that prefers each answer."""
    return np.array([answer.population for answer in topic.answers]) / 100


def writers_shares(topic: Topic) -> np.ndarray:
    """The frequencies [n_answers] with which the writers give each answer."""
    return np.array([answer.writers for answer in topic.answers]) / 100


def utilities(topic: Topic) -> np.ndarray:
    """r* [n_answers], fixed up to its free constant by r* = log of the population's shares."""
    return np.log(population_shares(topic))


def preference_probability(topic: Topic, first: int, second: int) -> float:
    """P(first is preferred to second) = sigmoid(r*_first - r*_second)."""
    return preference([population_shares(topic)], first, second)


def preference(groups: Sequence[np.ndarray], first: int, second: int) -> float:
    """P(first is preferred to second) by a member of one of the equally large groups.

    Args:
        groups: the shares [n_answers] of each group, which are softmax(r*) of its utilities.
    """
    gaps = [np.log(shares)[first] - np.log(shares)[second] for shares in groups]
    return float(np.mean([1 / (1 + np.exp(-gap)) for gap in gaps]))


def group_shares(topic: Topic, groups: int) -> list[np.ndarray]:
    """The shares [n_answers] of each of the equally large groups that the population consists of.

    One group is the population itself. Two have opposite tastes: the first likes the answers in
    their order, the utilities falling evenly by `TASTE_SPREAD` from the first to the last, and the
    second in reverse. The population's shares are then the mean of theirs, a mixture.
    """
    if groups == 1:
        return [population_shares(topic)]
    liked = np.exp(-np.linspace(0, TASTE_SPREAD, len(topic.answers)))
    return [liked / liked.sum(), liked[::-1] / liked.sum()]


def kl_bias(topic: Topic) -> float:
    """Total variation between the population's shares and KL's optimum from the writers' shares.

    TV(softmax(log writers + r*), softmax(r*)), eq. (5.1) at beta = 1.
    """
    tilted = writers_shares(topic) * population_shares(topic)
    return float(np.abs(tilted / tilted.sum() - population_shares(topic)).sum() / 2)


def true_log_loss(comparisons: Iterable[Mapping[str, Any]]) -> float:
    """Log-loss in nats of the population's own probabilities on comparisons_eval.jsonl."""
    return float(-np.mean([np.log(line["bayes_probability"]) for line in comparisons]))
