"""Potential curves: means over all subsets, against enumeration and against the exact order statistic."""

from itertools import combinations
from statistics import mean, median

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.potential import best_of, median_of, plot_potential, potential_curve

REWARDS = st.lists(st.floats(-10, 10), min_size=1, max_size=7)


@given(rewards=REWARDS, data=st.data())
def test_both_are_means_over_all_subsets(rewards, data):
    size = data.draw(st.integers(1, len(rewards)))
    table = torch.tensor([rewards], dtype=torch.float64)
    subsets = list(combinations(rewards, size))
    assert best_of(table, size).item() == pytest.approx(mean(map(max, subsets)), abs=1e-9)
    assert median_of(table, size).item() == pytest.approx(mean(map(median, subsets)), abs=1e-9)


def test_the_best_of_n_uniform_numbers_has_the_known_mean():
    # The largest of n uniform numbers has mean n / (n + 1). 2,000 prompts of 16: standard errors below 0.003.
    table = torch.rand(2000, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for size in (1, 2, 5, 16):
        assert best_of(table, size).mean().item() == pytest.approx(size / (size + 1), abs=0.012)
        assert median_of(table, size).mean().item() == pytest.approx(0.5, abs=0.012)


def test_a_curve_rises_with_n_and_starts_at_the_mean():
    curve = potential_curve([[0.0, 1.0, 5.0], [2.0, 2.0, 2.0]])
    assert curve["n"] == [1, 2, 3]
    # Best of two of (0, 1, 5): 1, 5, 5; with the second prompt's 2: (11/3 + 2) / 2.
    assert [entry["value"] for entry in curve["best"]] == pytest.approx([2.0, 17 / 6, 3.5])
    assert [entry["value"] for entry in curve["median"]] == pytest.approx([2.0, 2.0, 1.5])
    assert curve["best"][0]["count"] == 2


def test_many_samples_do_not_overflow():
    assert best_of(torch.arange(1000.0, dtype=torch.float64)[None], 500).item() == pytest.approx(500 * 1001 / 501 - 1)


@pytest.mark.parametrize("rewards", [[], [[]], [[1.0], [1.0, 2.0]]], ids=["no prompts", "no samples", "uneven"])
def test_uneven_samples_are_refused(rewards):
    with pytest.raises(ValueError, match="same number of samples"):
        potential_curve(rewards)


@pytest.mark.parametrize("size", [0, 4])
def test_a_size_that_does_not_exist_is_refused(size):
    with pytest.raises(ValueError, match=f"{size} of 3 samples"):
        best_of(torch.zeros(1, 3), size)


def test_the_picture_is_a_png(tmp_path):
    plot_potential(
        {"T = 1": potential_curve([[0.0, 1.0], [2.0, 3.0]]), "alone": potential_curve([[1.0]])}, tmp_path / "p.png"
    )
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]
