"""Many p-values at once: how many of those called small are expected to be false."""

import numpy as np
from numpy.typing import ArrayLike


def benjamini_hochberg(p_values: ArrayLike) -> np.ndarray:
    """Return q-values: among those below .05, at most 5 % are expected to be false (Benjamini and Hochberg 1995).

    That holds for independent p-values and for those that rise and fall together, as those of a model's layers do.

    Args:
        p_values: (n,) between 0 and 1. NaN, where nothing could be tested, is no test: it stays NaN and does not
            count among the others.

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
