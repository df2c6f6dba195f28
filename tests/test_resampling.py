import numpy as np
import pytest

from geomkit.resampling import bootstrap_interval, bootstrap_weights, percentile_interval, permuted_labels


def test_bootstrap_weights_are_shares_of_a_resample() -> None:
    weights = bootstrap_weights(5, 1000, np.random.default_rng(0))
    assert weights.shape == (1000, 5)
    assert weights.sum(1) == pytest.approx(np.ones(1000))
    assert weights.mean(0) == pytest.approx(np.full(5, 0.2), abs=0.02)
    assert np.var(weights[:, 0] * 5) == pytest.approx(0.8, rel=0.15)


def test_permuted_labels_deal_groups_of_the_right_sizes_evenly() -> None:
    labels = permuted_labels(3, 5, 4000, np.random.default_rng(0))
    assert (labels.sum(1) == 3).all()
    assert labels.mean(0) == pytest.approx(np.full(8, 3 / 8), abs=0.03)
    assert len(np.unique(labels, axis=0)) == 56


def test_percentile_interval_is_central() -> None:
    assert percentile_interval(np.arange(1001.0)) == pytest.approx((25, 975))


def test_bootstrap_interval_covers_the_mean_of_few_skewed_values() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(800):
        low, high = bootstrap_interval(generator.beta(4, 3, 8), generator, draws=400)
        hits += low <= 4 / 7 <= high
    assert 0.93 <= hits / 800 <= 0.97
