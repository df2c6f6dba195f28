"""Measures of rank of planted singular values."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geomkit.gradients.factored import FactoredGradient
from geomkit.svd.layer_spectrum import LayerSpectrum, layer_spectrum
from tests.helpers.gradients import factored

RANKS = ("numeric_rank", "effective_rank", "entropy_rank", "participation_ratio", "stable_rank")


def planted(values: list[float], size: int = 12) -> LayerSpectrum:
    count = len(values)
    return layer_spectrum("w", FactoredGradient(torch.diag(torch.tensor(values)), torch.eye(count, size)))


@pytest.mark.parametrize("k", [1, 3, 8])
def test_equal_singular_values_have_that_rank_by_every_measure(k: int) -> None:
    result = planted([2.0] * k).statistics()
    assert [result[name] for name in RANKS] == pytest.approx([k] * len(RANKS))
    assert result["rank99"] == k


def test_measures_of_a_geometric_spectrum() -> None:
    result = planted([4.0, 2.0, 1.0])
    shares = np.array([4, 2, 1]) / 7
    energy = np.array([16, 4, 1]) / 21
    assert result.effective_rank == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))
    assert result.entropy_rank == pytest.approx(math.exp(-(energy * np.log(energy)).sum()))
    assert result.participation_ratio == pytest.approx(21**2 / (16**2 + 4**2 + 1))
    assert result.stable_rank == pytest.approx(21 / 16)
    assert [result.cer(k) for k in (1, 2, 3, 9)] == pytest.approx([16 / 21, 20 / 21, 1, 1])
    assert [result.rank_at(energy) for energy in (0.5, 16 / 21, 0.9, 0.99, 1.0)] == [1, 1, 2, 3, 3]


def test_nine_of_ten_equal_values_hold_ninety_percent() -> None:
    assert planted([0.1] * 10).rank_at(0.9) == 9


def test_numeric_rank_leaves_rounding_out() -> None:
    result = planted([1.0, 1e-3, 1e-7, 0.0])
    assert result.tolerance == pytest.approx(12 * np.finfo(np.float32).eps)
    assert result.numeric_rank == 2


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12))
def test_measures_are_ordered_and_bounded(values: list[float]) -> None:
    result = planted(values)
    slack = 1 + 1e-6
    assert 1 / slack <= result.stable_rank <= result.entropy_rank * slack
    assert result.participation_ratio <= result.entropy_rank * slack <= result.effective_rank * slack**2
    assert result.effective_rank <= result.rank_bound * slack


@pytest.mark.parametrize(("tokens", "published"), [(16, 0.69), (32, 0.41), (64, 0.25), (128, 0.16)])
def test_cer_of_gaussian_factors(tokens: int, published: float) -> None:
    drawn = [layer_spectrum("w", factored(tokens, 1024, 1024, seed)).cer(10) for seed in (0, 10, 20, 30)]
    assert np.mean(drawn) == pytest.approx(published, abs=0.01)
