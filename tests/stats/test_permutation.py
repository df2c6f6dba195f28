import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from geomkit.stats.permutation import mcnemar_p_value, percentile_interval, permuted_labels, sign_flip_p_value


def test_permuted_labels_deal_groups_of_the_right_sizes_evenly() -> None:
    labels = permuted_labels(3, 5, 4000, np.random.default_rng(0))
    assert (labels.sum(1) == 3).all()
    assert labels.mean(0) == pytest.approx(np.full(8, 3 / 8), abs=0.03)
    assert len(np.unique(labels, axis=0)) == 56


def test_percentile_interval_is_central() -> None:
    assert percentile_interval(np.arange(1001.0)) == pytest.approx((25, 975))


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=8))
def test_the_p_value_is_that_of_all_sign_flips(differences):
    values = np.array(differences, dtype=float)
    flips = np.array(list(itertools.product([-1, 1], repeat=len(values)))) @ values
    expected = 1.0 if not values.any() else np.mean(np.abs(flips) >= abs(values.sum()) - 1e-9)
    assert sign_flip_p_value(values) == pytest.approx(expected)


def test_with_one_run_it_is_mcnemars_exact_test():
    """Where 9 prompts differ, 8 of them one way."""
    differences = np.array([1.0] * 8 + [-1.0] + [0.0] * 50)
    assert sign_flip_p_value(differences) == pytest.approx(binomtest(8, 9).pvalue)


def test_two_arms_that_are_alike_seldom_differ():
    """Runs share what is hard about a prompt, which a test that took them for independent would not survive."""
    rng = np.random.default_rng(0)
    significant = 0
    for _ in range(200):
        # Each arm finds other prompts hard, in all of its runs.
        arms = [np.mean([rng.random(60) < hard for _ in range(5)], axis=0) for hard in rng.random((2, 60))]
        significant += sign_flip_p_value(arms[0] - arms[1]) < 0.05
    assert significant <= 200 * 0.05 + 3 * np.sqrt(200 * 0.05 * 0.95)


@pytest.mark.parametrize(("gained", "lost"), [(0, 1), (4, 0), (3, 5), (7, 6)])
def test_mcnemars_test_is_the_sign_flip_test_of_flags(gained, lost):
    signs = np.array([1.0] * gained + [-1.0] * lost)
    flips = np.array(list(itertools.product([-1, 1], repeat=gained + lost)))
    extreme = np.abs(flips.sum(1)) >= abs(signs.sum())
    assert mcnemar_p_value(gained, lost) == pytest.approx(extreme.mean(), rel=1e-12)


def test_mcnemars_test_without_a_differing_prompt():
    assert mcnemar_p_value(0, 0) == 1.0
