import numpy as np
import pytest
from scipy import stats

from geomkit.stats.jackknife import interactions, jackknife_groups, jackknife_interval, jackknife_p_value


def leave_one_out(values: np.ndarray) -> np.ndarray:
    return np.array([np.delete(values, place).mean() for place in range(len(values))])


def test_of_a_mean_it_is_students_interval() -> None:
    values = np.random.default_rng(0).standard_normal(9)
    expected = stats.t.interval(0.9, 8, values.mean(), stats.sem(values))
    assert jackknife_interval(values.mean(), leave_one_out(values), confidence=0.9) == pytest.approx(expected)


def test_of_a_difference_of_means_it_is_welchs_interval() -> None:
    generator = np.random.default_rng(1)
    a, b = generator.standard_normal(7), 3 * generator.standard_normal(12)
    low, high = jackknife_interval(a.mean() - b.mean(), leave_one_out(a) - b.mean(), a.mean() - leave_one_out(b))
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert (low, high) == pytest.approx((expected.low, expected.high))


def test_measures_many_statistics_at_once_and_one_that_never_moves() -> None:
    values = np.random.default_rng(2).standard_normal((6, 2))
    without = np.array([np.delete(values, place, axis=0).mean(0) for place in range(6)])
    low, high = jackknife_interval(np.array([*values.mean(0), 5.0]), np.column_stack([without, np.full(6, 5.0)]))
    for column in range(2):
        expected = jackknife_interval(values[:, column].mean(), leave_one_out(values[:, column]))
        assert [low[column], high[column]] == pytest.approx([float(end) for end in expected])
    assert low[2] == high[2] == 5


def test_p_values_are_those_of_the_t_tests() -> None:
    generator = np.random.default_rng(4)
    a, b = generator.standard_normal(7), 3 * generator.standard_normal(12)
    one = jackknife_p_value(a.mean(), leave_one_out(a))
    assert float(one) == pytest.approx(stats.ttest_1samp(a, 0).pvalue)
    two = jackknife_p_value(a.mean() - b.mean(), leave_one_out(a), leave_one_out(b))
    assert float(two) == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue)


def test_p_values_of_what_never_moves_and_of_what_cannot_be_measured() -> None:
    without = np.array([[0.0, 2.0, np.nan], [0.0, 2.0, np.nan]])
    assert jackknife_p_value(np.array([0.0, 2.0, np.nan]), without) == pytest.approx([1, 0, np.nan], nan_ok=True)


@pytest.mark.parametrize(("examples", "groups"), [(24, 24), (48, 12)])
def test_covers_a_curved_statistic_in_groups_too(examples: int, groups: int) -> None:
    """The logarithm of the mean of skewed values."""
    generator = np.random.default_rng(3)
    drawn = generator.gamma(2.0, size=(1500, examples))
    hits = 0
    for values in drawn:
        left_out = jackknife_groups(examples, groups, generator)
        without = np.array([np.log(np.delete(values, group).mean()) for group in left_out])
        low, high = jackknife_interval(np.log(values.mean()), without)
        hits += bool(low <= np.log(2.0) <= high)
    assert 0.93 <= hits / 1500 <= 0.97


def test_groups_hold_every_example_once() -> None:
    groups = jackknife_groups(50, 8, np.random.default_rng(0))
    assert sorted(np.concatenate(groups)) == list(range(50))
    assert {len(group) for group in groups} == {6, 7}


def test_interactions_are_what_two_way_means_leave() -> None:
    generator = np.random.default_rng(4)
    values = generator.normal(size=(6, 4))
    expected = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    assert interactions(values) == pytest.approx(expected, abs=1e-12)
    absent = np.eye(6, 4, dtype=bool)
    additive = generator.normal(size=(6, 1)) + generator.normal(size=4)
    assert abs(interactions(additive, absent)).max() < 0.05 * additive.std()
