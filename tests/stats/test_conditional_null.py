"""P-values whose null depends on the length: uniform by simulation, whatever the length and the shape of the null."""

import numpy as np
import pytest
from scipy.stats import genpareto

from geomkit.stats import conditional_null
from geomkit.stats.conditional_null import FEWEST, outside, standardized, upper_p_values
from geomkit.stats.multiple_testing import benjamini_hochberg


def drawn(generator, count, shape, low=5, high=500):
    """Scores whose location and spread depend on the length, as those of rows of 5 to 500 tokens do."""
    tokens = np.exp(generator.uniform(np.log(low), np.log(high), count)).astype(int)
    noise = {
        "normal": lambda: generator.normal(size=count),
        "heavy": lambda: generator.standard_t(3, size=count),
        "skewed": lambda: generator.exponential(size=count) - 1,
    }[shape]()
    return np.log(tokens), 0.3 * np.log(tokens) + 3 * noise / np.sqrt(tokens)


def p_values(generator, shape, rows=400, null=300, **lengths):
    x, values = drawn(generator, rows, shape, **lengths)
    null_x, null_values = drawn(generator, null, shape)
    return upper_p_values(*standardized(values, x, null_values, null_x))


@pytest.mark.parametrize("shape", ["normal", "heavy", "skewed"])
def test_false_positives_at_the_stated_level_for_rows_of_5_to_500_tokens(shape):
    generator = np.random.default_rng(1)
    found = np.concatenate([p_values(generator, shape) for _ in range(60)])
    assert (found <= 0.05).mean() == pytest.approx(0.05, abs=0.015)
    assert (found <= 0.01).mean() == pytest.approx(0.01, abs=0.005)
    assert (found <= 0.001).mean() < 0.003


@pytest.mark.parametrize("shape", ["normal", "heavy", "skewed"])
@pytest.mark.parametrize("null", [80, 300])
def test_a_clean_set_has_a_false_discovery_no_more_often_than_the_level(shape, null):
    generator = np.random.default_rng(8)
    sets = [p_values(generator, shape, null=null) for _ in range(120)]
    flagged = np.mean([(benjamini_hochberg(found) <= 0.1).any() for found in sets])
    assert flagged <= 0.155  # .1 and two standard errors


def test_a_few_rows_far_out_are_found_against_hundreds_of_null_rows():
    generator = np.random.default_rng(9)
    flagged = []
    for _ in range(20):
        (x, values), (null_x, null) = drawn(generator, 400, "normal"), drawn(generator, 300, "normal")
        lengths = np.exp(x[:3])
        values[:3] = 0.3 * np.log(lengths) + 30 / np.sqrt(lengths)  # ten standard deviations
        flagged.append(benjamini_hochberg(upper_p_values(*standardized(values, x, null, null_x)))[:3] <= 0.1)
    assert np.mean(flagged) > 0.95


@pytest.mark.parametrize("lengths", [(5, 15), (15, 60), (60, 200), (200, 500)])
def test_the_level_holds_for_rows_of_one_length_against_a_null_of_all(lengths):
    generator = np.random.default_rng(2)
    found = np.concatenate([p_values(generator, "normal", low=lengths[0], high=lengths[1]) for _ in range(40)])
    assert (found <= 0.05).mean() == pytest.approx(0.05, abs=0.015)


def test_without_the_length_the_level_does_not_hold():
    generator = np.random.default_rng(2)
    shares = {}
    for low, high in ((5, 15), (60, 200)):
        _, values = drawn(generator, 20_000, "normal", low, high)
        shares[low] = (upper_p_values(values, drawn(generator, 20_000, "normal")[1]) <= 0.05).mean()
    assert shares[5] > 0.08
    assert shares[60] < 0.03


def test_below_the_tail_a_p_value_is_the_share_of_null_values_as_high():
    generator = np.random.default_rng(3)
    null, values = generator.normal(size=200), generator.normal(size=50) - 1
    below = values < np.sort(null)[-21]
    expected = (1 + (null[None] >= values[:, None]).sum(1)) / 201
    np.testing.assert_allclose(upper_p_values(values, null)[below], expected[below])
    assert below.sum() > 30


def test_p_values_fall_with_the_value_also_in_the_tail():
    null = np.random.default_rng(4).normal(size=300)
    found = upper_p_values(np.linspace(-4, 12, 400), null)
    assert (np.diff(found) <= 0).all()
    assert 0 < found[-1] < 1e-4


@pytest.mark.parametrize("shape", [0.0, 0.2, 0.4])
def test_the_tail_is_that_of_scipy(shape):
    sample = np.sort(genpareto.rvs(shape, scale=2, size=50_000, random_state=5))
    found = conditional_null._pareto(sample)
    assert found == pytest.approx((shape, 2), abs=0.06)


def test_a_tail_that_ends_is_taken_as_exponential():
    sample = np.sort(np.random.default_rng(6).uniform(size=5000))
    assert conditional_null._pareto(sample) == pytest.approx((0, 0.5), abs=0.01)


def test_equal_null_values_are_no_error():
    z, null = standardized([1.0, 2.0], [0.0, 0.0], np.ones(FEWEST), np.zeros(FEWEST))
    found = upper_p_values(z, null)
    assert found[0] == 1.0
    assert 0 < found[1] < 0.06
    zeros = standardized([0.0], [0.0], np.zeros(FEWEST), np.zeros(FEWEST))
    assert zeros[0].tolist() == [0.0]


def test_leaving_a_value_out_of_its_neighbours_makes_no_difference_among_many(monkeypatch):
    generator = np.random.default_rng(7)
    x, values = drawn(generator, 3000, "normal")
    _, with_it_left_out = standardized(values, x, values, x)
    monkeypatch.setattr(conditional_null, "MANY", 10)
    _, without = standardized(values, x, values, x)
    differences = np.abs(with_it_left_out - without)
    assert np.quantile(differences, 0.99) < 0.05
    assert differences.max() < 0.2


def test_lengths_beyond_the_null_are_told():
    assert outside([1, 2, 3, 4], [2, 3]).tolist() == [True, False, False, True]
