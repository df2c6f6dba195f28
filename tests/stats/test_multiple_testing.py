import numpy as np
import pytest

from geomkit.stats.multiple_testing import benjamini_hochberg


def step_up(p_values: np.ndarray) -> np.ndarray:
    """The definition: q of a p-value is the smallest level at which the step-up procedure rejects it."""
    ranked = np.sort(p_values)
    n = len(ranked)
    return np.array([min(n * ranked[k] / (k + 1) for k in range(n) if ranked[k] >= p) for p in p_values]).clip(max=1)


@pytest.mark.parametrize("seed", range(5))
def test_q_values_are_those_of_the_step_up_procedure(seed: int) -> None:
    p_values = np.random.default_rng(seed).uniform(size=20) ** 3
    assert benjamini_hochberg(p_values) == pytest.approx(step_up(p_values))


def test_what_was_not_tested_stays_out() -> None:
    tested = [0.001, 0.2, 0.03]
    result = benjamini_hochberg([np.nan, *tested, np.nan])
    assert result[1:4] == pytest.approx(benjamini_hochberg(tested))
    assert np.isnan(result[[0, 4]]).all()
    assert np.isnan(benjamini_hochberg([np.nan])).all()
    assert benjamini_hochberg([]).shape == (0,)


def test_false_discoveries_are_as_rare_as_promised() -> None:
    """40 nulls beside 20 effects: of what is called at q < .1, at most a tenth is false on average."""
    from scipy.stats import norm

    generator = np.random.default_rng(0)
    shares = []
    for _ in range(400):
        called = benjamini_hochberg(norm.sf(generator.normal(size=60) + np.repeat([0.0, 3.0], [40, 20]))) < 0.1
        shares.append(called[:40].sum() / max(called.sum(), 1))
    assert 0.04 < np.mean(shares) < 0.1
