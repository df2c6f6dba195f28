"""How well a ranking finds planted rows: AUROC, and precision at the number of planted rows, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geomkit.stats.proportions import Rate

_DRAWS = 1000


@dataclass(frozen=True)
class Detection:
    """How well a ranking finds the planted rows of several draws of a case.

    Attributes:
        auroc: Probability that a planted row is ranked above a clean row, the mean over draws; ties count one half.
        low: Lower end of its 95 % bootstrap interval over planted and clean rows of each draw.
        high: Upper end.
        precision: Share of planted rows among as many rows with the highest scores, over all draws.
        precision_low: Lower end of its 95 % Wilson interval.
        precision_high: Upper end.
    """

    auroc: float
    low: float
    high: float
    precision: float
    precision_low: float
    precision_high: float


def detection(
    scores: Sequence[NDArray[np.float64]], planted: Sequence[NDArray[np.bool_]], *, seed: int = 0
) -> Detection:
    """Return how well scores find planted rows.

    Args:
        scores: For each draw, (N,) scores.
        planted: For each draw, (N,) which rows are planted.
        seed: Seed of the bootstrap.
    """
    generator = np.random.default_rng(seed)
    # Whether planted row i is above clean row j, for every draw: resampled rows are resampled rows and columns of it.
    above = [_above(values[flags], values[~flags]) for values, flags in zip(scores, planted, strict=True)]
    resampled = [np.mean([_resampled_mean(table, generator) for table in above]) for _ in range(_DRAWS)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    found = [_found(values, flags) for values, flags in zip(scores, planted, strict=True)]
    precision = Rate(round(sum(found)), sum(int(flags.sum()) for flags in planted))
    return Detection(
        float(np.mean([table.mean() for table in above])), float(low), float(high),
        precision.value, *precision.interval,
    )  # fmt: skip


def _above(planted: NDArray[np.float64], clean: NDArray[np.float64]) -> NDArray[np.float64]:
    difference = planted[:, None] - clean[None, :]
    return np.asarray((difference > 0) + 0.5 * (difference == 0), dtype=np.float64)


def _resampled_mean(above: NDArray[np.float64], generator: np.random.Generator) -> float:
    rows, columns = above.shape
    # Weights of multinomial draws: the mean over resampled rows and columns without copying the table.
    row_weights = generator.multinomial(rows, np.full(rows, 1 / rows)) / rows
    column_weights = generator.multinomial(columns, np.full(columns, 1 / columns)) / columns
    return float(row_weights @ above @ column_weights)


def _found(scores: NDArray[np.float64], planted: NDArray[np.bool_]) -> float:
    """Return the number of planted rows among as many rows with the highest scores; of tied rows, their share."""
    count = int(planted.sum())
    threshold = np.sort(scores)[-count]
    surely, tied = scores > threshold, scores == threshold
    places = count - int(surely.sum())
    return float(planted[surely].sum() + places * planted[tied].mean())
