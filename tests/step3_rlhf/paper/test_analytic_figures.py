"""The analytic figures: the numbers that they plot, and that they are drawn."""

from pathlib import Path

import pytest

from step3_rlhf.paper import analytic_figures as figures
from step3_rlhf.paper.analytic_figures import (
    aligned_preference,
    preference_grid,
    two_groups,
)
from step3_rlhf.regularizers.registry import parse_regularizer


def test_figure_2_plots_equation_5_2() -> None:
    kl = parse_regularizer({"name": "kl"})
    for p_ref in figures.REFERENCES:
        for p in (0.1, 0.5, 0.8):
            expected = p_ref * p / (p_ref * p + (1 - p_ref) * (1 - p))
            assert aligned_preference(kl, p, p_ref) == pytest.approx(expected, abs=1e-12)
    assert aligned_preference(kl, 0.5, 0.3) < 0.5 < aligned_preference(kl, 0.5, 0.7)


def test_figure_2_is_the_diagonal_for_preference_matching_alone() -> None:
    pm = parse_regularizer({"name": "pm"})
    for p_ref in figures.REFERENCES:
        assert aligned_preference(pm, 0.8, p_ref) == pytest.approx(0.8, abs=1e-12)
    hellinger = parse_regularizer({"name": "f_divergence", "divergence": "hellinger"})
    assert abs(aligned_preference(hellinger, 0.8, 0.5) - 0.8) > 0.05


def test_figure_9_shows_the_papers_collapse() -> None:
    """Section A.3: with β = 0.1 and p_reward > 0.7, p_rlhf > 0.99."""
    sharp = parse_regularizer({"name": "kl", "beta": 0.1})
    exact = parse_regularizer({"name": "kl", "beta": 1.0})
    assert aligned_preference(sharp, 0.7, 0.5) > 0.99
    assert aligned_preference(exact, 0.7, 0.5) == pytest.approx(0.7, abs=1e-12)


def test_two_groups_end_at_the_published_shares() -> None:
    """(.45, .10, .45); as a weighted sum (.327, .346, .327); pooled (.331, .338, .331)."""
    found = {name: shares.tolist() for name, shares in two_groups(0.5).items()}
    assert found["first choices"] == pytest.approx([0.45, 0.10, 0.45], abs=1e-12)
    assert found["mixture"] == pytest.approx([0.45, 0.10, 0.45], abs=1e-12)
    assert found["weighted sum"] == pytest.approx([0.327, 0.346, 0.327], abs=5e-4)
    assert found["pooled comparisons"] == pytest.approx([0.331, 0.338, 0.331], abs=5e-4)


def test_a_single_group_is_matched_by_every_reward() -> None:
    for shares in two_groups(1.0).values():
        assert shares.tolist() == pytest.approx(figures.TASTE, abs=1e-9)
    for share in (0.1, 0.3, 0.8):  # and the mixture is right in any proportion
        found = two_groups(share)
        assert found["mixture"].tolist() == pytest.approx(found["first choices"].tolist())
        for wrong in ("weighted sum", "pooled comparisons"):
            assert (found[wrong] - found["first choices"]).abs().sum() > 0.02


def test_grid_lies_inside_and_is_symmetric() -> None:
    grid = preference_grid(5)
    assert grid == sorted(grid)
    assert 0.0 < grid[0] < 0.05
    assert [1 - p for p in reversed(grid)] == pytest.approx(grid)


@pytest.mark.long
def test_command_draws_every_figure(tmp_path: Path) -> None:
    figures.main([str(tmp_path / "new")])
    written = {path.name: path for path in (tmp_path / "new").iterdir()}
    names = ("figure2", "figure2_f_divergences", "figure9", "two_groups", "figure_length")
    assert set(written) == {f"{name}.png" for name in names}
    for path in written.values():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 20_000


def test_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        figures.main([])
    assert "the following arguments are required: directory" in capsys.readouterr().err
