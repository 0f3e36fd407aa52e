"""Intervals against closed forms and literal numbers."""

import math

import pytest
import torch

from training.statistics import estimate, mean_ci95, ratio_standard_error


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_ratio_of_sums_by_hand() -> None:
    """R = (1 + 2 + 6) / (1 + 2 + 3) = 3/2; residuals −½, −1, 3/2; √(3/2 · 7/2) / 6."""
    error = ratio_standard_error(tensor(1, 2, 6), tensor(1, 2, 3))
    assert error == pytest.approx(math.sqrt(21 / 4) / 6, rel=1e-14)
    assert error == pytest.approx(0.381881307913, rel=1e-11)


def test_clusters_are_summed_before_they_are_squared() -> None:
    """Clusters {1, 2} and {6}: sums −3/2 and 3/2; √(2 · 9/2) / 6 = ½, not the 0.38 of above."""
    y, x, clusters = tensor(1, 2, 6), tensor(1, 2, 3), torch.tensor([4, 4, 9])
    assert ratio_standard_error(y, x, clusters) == pytest.approx(0.5, rel=1e-14)
    assert ratio_standard_error(y, x) < 0.4  # the wrong variant: items taken as independent


def test_clusters_of_one_item_are_independent_items() -> None:
    y, x = tensor(1, 2, 6), tensor(1, 2, 3)
    alone = ratio_standard_error(y, x, torch.tensor([2, 0, 1]))
    assert alone == pytest.approx(ratio_standard_error(y, x), rel=1e-14)


def test_a_single_cluster_says_nothing() -> None:
    assert ratio_standard_error(tensor(5), tensor(2)) == math.inf
    assert ratio_standard_error(tensor(5, 6), tensor(2, 2), torch.zeros(2).long()) == math.inf


def test_an_exact_ratio_has_no_error() -> None:
    assert ratio_standard_error(tensor(2, 4, 6), tensor(1, 2, 3)) == 0.0


def test_estimate_by_hand() -> None:
    """x̄ = 3, s² = (4 + 1 + 0 + 9) / 3; 1.96 · s / √4."""
    found = estimate(tensor(1.0, 2.0, 3.0, 6.0))
    assert (found.mean, found.count) == (3.0, 4)
    assert found.ci95 == pytest.approx(1.96 * math.sqrt(14 / 3) / 2, rel=1e-14)
    assert found.ci95 == pytest.approx(2.11704196148, rel=1e-11)


def test_estimate_of_a_single_value_has_an_infinite_interval() -> None:
    alone = estimate(torch.tensor([5]))
    assert (alone.mean, alone.ci95, alone.count) == (5.0, math.inf, 1)


def test_mean_over_pairs_by_hand() -> None:
    """x̄ = 3; prompts {1, 2} and {3, 6}: sums −3 and 3; 1.96 · √(2 · 18) / 4 = 2.94."""
    pairs = tensor(1.0, 2.0, 3.0, 6.0)
    clustered = mean_ci95(pairs, torch.tensor([7, 7, 2, 2]))
    assert clustered == pytest.approx(2.94, rel=1e-14)
    independent = mean_ci95(pairs, torch.arange(4))
    assert independent == pytest.approx(estimate(pairs).ci95, rel=1e-14)
    assert independent != pytest.approx(clustered, rel=0.1)  # as if pairs were independent


def test_mean_over_the_pairs_of_one_prompt_has_no_interval() -> None:
    assert mean_ci95(tensor(1.0, 2.0), torch.tensor([3, 3])) is None
