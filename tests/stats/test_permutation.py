import numpy as np
import pytest

from geomkit.stats.permutation import percentile_interval, permuted_labels


def test_permuted_labels_deal_groups_of_the_right_sizes_evenly() -> None:
    labels = permuted_labels(3, 5, 4000, np.random.default_rng(0))
    assert (labels.sum(1) == 3).all()
    assert labels.mean(0) == pytest.approx(np.full(8, 3 / 8), abs=0.03)
    assert len(np.unique(labels, axis=0)) == 56


def test_percentile_interval_is_central() -> None:
    assert percentile_interval(np.arange(1001.0)) == pytest.approx((25, 975))
