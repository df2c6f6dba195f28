"""False discovery rate of many p-values."""

import numpy as np
from numpy.typing import ArrayLike


def benjamini_hochberg(p_values: ArrayLike) -> np.ndarray:
    """Return q-values: of the tests with a q-value below .05, at most 5 % are expected to be false discoveries.

    The bound holds for independent p-values (Benjamini and Hochberg 1995), and also for positively dependent p-values,
    such as the p-values of a model's layers.

    Args:
        p_values: (n,) between 0 and 1. NaN stands for a test that was not possible: it stays NaN and does not count
            as a test.

    Returns:
        (n,) adjusted p-values, in the order given.

    Example:
        >>> benjamini_hochberg([0.01, float("nan"), 0.04, 0.5])
        array([0.03,  nan, 0.06, 0.5 ])
    """
    from scipy.stats import false_discovery_control

    adjusted = np.array(p_values, dtype=np.float64)
    tested = ~np.isnan(adjusted)
    adjusted[tested] = false_discovery_control(adjusted[tested])
    return adjusted
