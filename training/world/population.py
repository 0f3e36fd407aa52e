"""Who prefers what in the bundled world, exactly."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from training.world.topics import Topic


def population_shares(topic: Topic) -> np.ndarray:
    """softmax(r*): the share of the population that prefers each answer, [n_answers]."""
    return np.array([answer.population for answer in topic.answers]) / 100


def writers_shares(topic: Topic) -> np.ndarray:
    """How often the writers give each answer, [n_answers]."""
    return np.array([answer.writers for answer in topic.answers]) / 100


def utilities(topic: Topic) -> np.ndarray:
    """r* = log population shares, which fixes the free constant, [n_answers]."""
    return np.log(population_shares(topic))


def preference_probability(topic: Topic, first: int, second: int) -> float:
    """P(first preferred to second) = sigmoid(r*_first - r*_second)."""
    gap = utilities(topic)[first] - utilities(topic)[second]
    return float(1 / (1 + np.exp(-gap)))


def kl_bias(topic: Topic) -> float:
    """Total variation between KL's optimum for a writers' reference and the population's shares.

    TV(softmax(log writers + r*), softmax(r*)), eq. (5.1) at beta = 1.
    """
    tilted = writers_shares(topic) * population_shares(topic)
    return float(np.abs(tilted / tilted.sum() - population_shares(topic)).sum() / 2)


def true_log_loss(comparisons: Iterable[Mapping[str, Any]]) -> float:
    """Log-loss in nats of the population's own probabilities on lines of comparisons_eval.jsonl."""
    return float(-np.mean([np.log(line["bayes_probability"]) for line in comparisons]))
