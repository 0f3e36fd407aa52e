"""The exact preferences of the bundled world."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from training.world.topics import Topic


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
    gap = utilities(topic)[first] - utilities(topic)[second]
    return float(1 / (1 + np.exp(-gap)))


def kl_bias(topic: Topic) -> float:
    """Total variation between the population's shares and KL's optimum from the writers' shares.

    TV(softmax(log writers + r*), softmax(r*)), eq. (5.1) at beta = 1.
    """
    tilted = writers_shares(topic) * population_shares(topic)
    return float(np.abs(tilted / tilted.sum() - population_shares(topic)).sum() / 2)


def true_log_loss(comparisons: Iterable[Mapping[str, Any]]) -> float:
    """Log-loss in nats of the population's own probabilities on comparisons_eval.jsonl."""
    return float(-np.mean([np.log(line["bayes_probability"]) for line in comparisons]))
