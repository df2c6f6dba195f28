"""How sure a share of prompts is that was measured in several runs, and whether two arms differ."""

from collections.abc import Sequence

import numpy as np


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share that need not be a whole number of n prompts.

    Example:
        >>> [round(bound, 3) for bound in wilson(0.75, 4)]
        [0.301, 0.954]
    """
    from scipy.stats import norm

    z = float(norm.ppf(0.975))
    centre = share + z * z / (2 * n)
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return float((centre - half) / (1 + z * z / n)), float((centre + half) / (1 + z * z / n))


def spread(runs: Sequence[np.ndarray]) -> dict[str, float | int]:
    """Return what runs over the same prompts say of their mean: its interval over prompts, and the spread over runs.

    Args:
        runs: One outcome per prompt and run.

    Returns:
        ``value``, ``low``, ``high``, ``prompts``; ``runs``, ``seed_sd``, ``least``, ``most``; NaN without a run.
    """
    if not runs:
        return {"value": np.nan, "low": np.nan, "high": np.nan, "prompts": 0, "runs": 0, "seed_sd": np.nan,
                "least": np.nan, "most": np.nan}  # fmt: skip
    means = np.array([run.mean() for run in runs])
    prompts = len(runs[0])
    low, high = wilson(float(means.mean()), prompts)
    return {
        "value": float(means.mean()), "low": low, "high": high, "prompts": prompts, "runs": len(runs),
        "seed_sd": float(means.std(ddof=1)) if len(runs) > 1 else np.nan,
        "least": float(means.min()), "most": float(means.max()),
    }  # fmt: skip


def sign_flip_p(differences: np.ndarray) -> float:
    """Return the two-sided p value that paired differences are symmetric about zero, by flipping their signs.

    Args:
        differences: (prompts,) mean difference of each prompt.

    Returns:
        p; 1 where nothing differs. All 2ⁿ flips of n non-zero differences where those are at most 9,999, else as many
        at random from a fixed seed.

    Example:
        >>> sign_flip_p(np.array([1.0, 1.0, 1.0, 1.0, 0.0]))
        0.125
    """
    from scipy.stats import permutation_test

    different = differences[differences != 0]
    if len(different) == 0:
        return 1.0
    if len(different) == 1:
        return 1.0  # either sign is as far from zero
    found = permutation_test(
        (different,), np.mean, permutation_type="samples", n_resamples=9_999, rng=np.random.default_rng(0)
    )
    return float(found.pvalue)
