"""Wilson intervals of counts and of means over runs, against scipy and published tables."""

import pytest
from scipy.stats import binomtest

from geomkit.errors import DataError
from geomkit.stats.proportions import Rate, rate, wilson_interval


@pytest.mark.parametrize(("count", "n"), [(0, 20), (3, 20), (20, 20), (117, 240)])
def test_the_interval_is_scipys_where_the_share_is_of_whole_prompts(count, n):
    expected = binomtest(count, n).proportion_ci(method="wilson")
    assert wilson_interval(count / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)],
)
def test_wilson_intervals_of_the_literature(successes, n, low, high):
    """Newcombe (1998), table I, method 3; the first two by hand from z = 1.96."""
    result = Rate(successes, n)
    assert result.interval == pytest.approx((low, high), abs=5e-5)
    assert result.value == successes / n
    assert str(Rate(10, 10)) == "100.0% [72.2%, 100.0%]"


def test_a_rate_of_nothing_is_refused():
    assert rate([True, False]) == Rate(1, 2)
    with pytest.raises(DataError, match="expected at least one outcome"):
        rate([])


def test_a_share_of_no_prompts_is_no_number():
    none = Rate(0, 0)
    assert none.value != none.value
    assert none.percent() == "–"
    assert all(end != end for end in none.interval)
