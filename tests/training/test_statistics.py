"""Intervals against closed forms and literal numbers."""

import math

import pytest
import torch

from training.statistics import (
    estimate,
    log_estimate,
    log_ratio_estimate,
    mean_ci95,
    numbered,
    ratio_estimate,
    ratio_standard_error,
    share_interval,
    t_quantile,
)


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


def test_students_quantiles_are_those_of_the_tables() -> None:
    assert t_quantile(1) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-10)  # Cauchy
    assert t_quantile(2) == pytest.approx(4.30265272991, rel=1e-10)
    assert t_quantile(9) == pytest.approx(2.26215716274, rel=1e-10)
    assert t_quantile(15) == pytest.approx(2.13144954556, rel=1e-10)
    assert t_quantile(100_000) == pytest.approx(1.95998771, rel=1e-8)


def test_estimate_by_hand() -> None:
    """x̄ = 3, s² = (4 + 1 + 0 + 9) / 3; t(3) · s / √4 with t(3) = 3.18244630528."""
    found = estimate(tensor(1.0, 2.0, 3.0, 6.0))
    assert (found.mean, found.count, found.clusters) == (3.0, 4, 4)
    assert found.ci95 == pytest.approx(3.18244630528 * math.sqrt(14 / 3) / 2, rel=1e-10)
    assert (found.low, found.high) == (3.0 - found.ci95, 3.0 + found.ci95)
    assert found.ci95 != pytest.approx(1.96 * math.sqrt(14 / 3) / 2, rel=0.3)  # as if n were large


def test_a_single_cluster_has_no_interval() -> None:
    alone = estimate(torch.tensor([5]))
    assert (alone.mean, alone.count, alone.clusters) == (5.0, 1, 1)
    assert alone.ci95 is alone.low is alone.high is None
    together = estimate(tensor(5.0, 6.0), torch.tensor([3, 3]))
    assert (together.ci95, together.count, together.clusters) == (None, 2, 1)


def test_items_of_a_cluster_are_not_independent() -> None:
    """16 topics of 8 identical phrasings are 16 observations, not 128."""
    topics = torch.arange(16, dtype=torch.float64)
    values, clusters = topics.repeat_interleave(8), torch.arange(16).repeat_interleave(8)
    found, once = estimate(values, clusters), estimate(topics)
    assert found.ci95 == pytest.approx(once.ci95, rel=1e-12)
    assert (found.count, found.clusters) == (128, 16)
    wrong = estimate(values).ci95  # phrasings taken as independent
    assert wrong is not None
    assert found.ci95 is not None
    assert found.ci95 / wrong == pytest.approx(
        math.sqrt(127 / 15) * 2.13144954556 / 1.97881953476, rel=1e-9
    )


def test_coverage_of_clustered_means() -> None:
    """Of 400 data sets of 10 clusters, 95 % of the intervals hold the true mean, 0."""
    random = torch.Generator().manual_seed(1)
    clusters = torch.arange(10).repeat_interleave(6)
    covered = naive = 0
    for _ in range(400):
        effects = torch.randn(10, generator=random, dtype=torch.float64)[clusters]
        values = effects + 0.3 * torch.randn(60, generator=random, dtype=torch.float64)
        for wrong in (False, True):
            found = estimate(values, None if wrong else clusters)
            inside = found.low <= 0 <= found.high
            naive, covered = naive + (wrong and inside), covered + (not wrong and inside)
    assert 0.92 < covered / 400 < 0.98
    assert naive / 400 < 0.7


def test_mean_over_pairs_by_hand() -> None:
    """x̄ = 3; prompts {1, 2} and {3, 6}: sums −3 and 3; t(1) · √(2 · 18) / 4."""
    pairs = tensor(1.0, 2.0, 3.0, 6.0)
    clustered = mean_ci95(pairs, torch.tensor([7, 7, 2, 2]))
    assert clustered == pytest.approx(12.7062047362 * 1.5, rel=1e-10)
    assert mean_ci95(pairs, torch.arange(4)) == estimate(pairs).ci95


def test_a_perplexitys_interval_is_that_of_its_logarithm() -> None:
    """One text of a huge loss: the symmetric interval would reach below 1, which none can."""
    nll, tokens = tensor(1, 1, 1, 20), tensor(4, 4, 4, 4)
    found, log = log_ratio_estimate(nll, tokens), ratio_estimate(nll, tokens)
    assert found.mean == pytest.approx(math.exp(23 / 16), rel=1e-14)
    assert log.mean == pytest.approx(23 / 16)
    assert log.ci95 is not None
    assert found.low == pytest.approx(math.exp(23 / 16 - log.ci95), rel=1e-12)
    assert found.high == pytest.approx(math.exp(23 / 16 + log.ci95), rel=1e-12)
    assert found.method == "log t"
    assert found.low > 0
    assert found.mean - log.ci95 * found.mean < 0  # the delta method's


def test_the_interval_of_a_skewed_mean_is_that_of_its_logarithm() -> None:
    """x̄ = 3.25, SE = √(Σ (x − x̄)²/12); the symmetric interval reaches below 0, where none is."""
    values = tensor(1, 1, 1, 10)
    found, plain = log_estimate(values), estimate(values)
    error = math.sqrt((3 * 2.25**2 + 6.75**2) / 12)
    factor = math.exp(t_quantile(3) * error / 3.25)
    assert found.mean == plain.mean == 3.25
    assert found.low == pytest.approx(3.25 / factor, rel=1e-12)
    assert found.high == pytest.approx(3.25 * factor, rel=1e-12)
    assert found.ci95 == pytest.approx((found.high - found.low) / 2, rel=1e-12)
    assert found.method == "log t"
    assert plain.low < 0 < found.low
    alone = log_estimate(values, torch.zeros(4).long())
    assert (alone.mean, alone.ci95, alone.low, alone.high) == (3.25, None, None, None)
    nothing = log_estimate(tensor(0, 0))
    assert (nothing.low, nothing.high) == (0.0, 0.0)


def test_it_covers_a_skewed_mean_more_often() -> None:
    """1,500 samples of 16 values 1 + 2 e^z; the mean is 1 + 2 √e."""
    generator, truth = torch.Generator().manual_seed(0), 1 + 2 * math.exp(0.5)
    covered = {log_estimate: 0, estimate: 0}
    for _ in range(1500):
        values = 1 + 2 * torch.randn(16, generator=generator).double().exp()
        for interval in covered:
            found = interval(values)
            covered[interval] += found.low <= truth <= found.high
    assert covered[log_estimate] / 1500 == pytest.approx(0.88, abs=0.02)
    assert covered[estimate] / 1500 == pytest.approx(0.85, abs=0.02)


def test_numbers_of_groups() -> None:
    assert numbered(["b", "a", "b", "c"]).tolist() == [0, 1, 0, 2]


def test_interval_of_a_perplexity_covers_95_percent() -> None:
    """Against the truth, over 1,000 samples of 40 texts; tokens' losses are exponential."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(1000):
        lengths = torch.randint(1, 30, (40,), generator=generator)
        losses = [torch.empty(int(n)).exponential_(0.5, generator=generator).sum() for n in lengths]
        found = log_ratio_estimate(torch.stack(losses), lengths)
        covered += found.low <= math.exp(2.0) <= found.high
    assert 0.925 <= covered / 1000 <= 0.97


def test_interval_of_a_share_in_closed_form() -> None:
    """Where all draws are equal, P(X ≥ n | p) = pⁿ; 5 of 20 as in Clopper and Pearson's tables."""
    for total in (1, 20, 2000):
        low, high = share_interval(total, total)
        assert high == 1.0
        assert low == pytest.approx(0.025 ** (1 / total), abs=1e-10)
        assert share_interval(0, total) == (0.0, pytest.approx(1 - low, abs=1e-12))
    assert share_interval(5, 20) == (
        pytest.approx(0.0866, abs=5e-5),
        pytest.approx(0.4910, abs=5e-5),
    )


@pytest.mark.parametrize("share", [0.01, 0.1, 0.37])
def test_interval_of_a_share_covers_it(share: float) -> None:
    """The exact coverage over all outcomes of 30 draws; that of mean ± t · SE is too small."""
    draws = 30
    covered, wrong = 0.0, 0.0
    for count in range(draws + 1):
        chance = math.comb(draws, count) * share**count * (1 - share) ** (draws - count)
        low, high = share_interval(count, draws)
        covered += chance * (low <= share <= high)
        mean = count / draws
        half = t_quantile(draws - 1) * math.sqrt(mean * (1 - mean) / (draws - 1))
        wrong += chance * (abs(mean - share) <= half)
    assert covered >= 0.95
    assert wrong < covered
