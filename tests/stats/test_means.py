"""Means and perplexities with their intervals, against scipy's and closed forms."""

import math

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from geomkit.errors import DataError
from geomkit.stats.means import mean_estimate, perplexity

NUMBERS = [0.1, 0.9, 0.4, 0.55, 0.3]


def test_a_mean_has_the_interval_of_the_t_test():
    found = mean_estimate(NUMBERS)
    expected = ttest_1samp(NUMBERS, 0).confidence_interval(0.95)
    assert found.value == pytest.approx(np.mean(NUMBERS))
    assert found.interval == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert found.n == 5


def test_perplexity_weighs_tokens_alike():
    found = perplexity([1.0, 3.0], [9, 1])
    assert found.value == pytest.approx(math.exp((9 * 1.0 + 1 * 3.0) / 10), rel=1e-12)
    assert found.low < found.value < found.high


def test_the_interval_of_perplexity_of_texts_of_one_length_is_that_of_the_mean_loss():
    found, mean = perplexity(NUMBERS, [7] * 5), mean_estimate(NUMBERS)
    assert found.interval == pytest.approx((math.exp(mean.low), math.exp(mean.high)), rel=1e-9)


def test_a_single_text_has_no_interval_and_no_text_no_mean():
    for found in (mean_estimate([2.0]), perplexity([2.0], [3])):
        assert math.isnan(found.low)
        assert math.isnan(found.high)
    assert perplexity([800.0], [3]).value == math.inf
    with pytest.raises(DataError, match="found none"):
        mean_estimate([])
    with pytest.raises(DataError, match="found none"):
        perplexity([], [])
