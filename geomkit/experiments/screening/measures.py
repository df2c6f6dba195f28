"""How well a ranking finds planted rows: AUROC, and precision at the number of planted rows, with intervals."""

from collections.abc import Hashable, Sequence
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
        low: Lower end of its 95 % bootstrap interval over the different planted and clean rows.
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
    scores: Sequence[NDArray[np.float64]],
    planted: Sequence[NDArray[np.bool_]],
    rows: Sequence[Sequence[Hashable]] | None = None,
    *,
    seed: int = 0,
) -> Detection:
    """Return how well scores find planted rows.

    Args:
        scores: For each draw, (N,) scores.
        planted: For each draw, (N,) which rows are planted.
        rows: For each draw, N names of the rows, where draws share rows: the bootstrap then draws the different rows,
            each with its scores in all draws. All rows are different when left out.
        seed: Seed of the bootstrap.
    """
    generator = np.random.default_rng(seed)
    names: Sequence[Sequence[Hashable]] = rows or [
        [(draw, row) for row in range(len(flags))] for draw, flags in enumerate(planted)
    ]
    # Whether planted row i is above clean row j, for every draw: resampled rows are resampled rows and columns of it.
    above = [_above(values[flags], values[~flags]) for values, flags in zip(scores, planted, strict=True)]
    places, clean = (_places(names, planted, flag=flag) for flag in (True, False))
    resampled = [_resampled_mean(above, places, clean, generator) for _ in range(_DRAWS)]
    low, high = np.nanquantile(resampled, [0.025, 0.975])
    found = [_found(values, flags) for values, flags in zip(scores, planted, strict=True)]
    # The interval is that of as many rows as there are different planted ones.
    share = sum(found) / sum(int(flags.sum()) for flags in planted)
    different = 1 + max(int(each.max()) for each in places)
    precision = Rate(round(share * different), different)
    return Detection(
        float(np.mean([table.mean() for table in above])), float(low), float(high),
        share, *precision.interval,
    )  # fmt: skip


def _places(
    names: Sequence[Sequence[Hashable]], planted: Sequence[NDArray[np.bool_]], *, flag: bool
) -> list[NDArray[np.int64]]:
    """Return, for each draw, the numbers of its planted or clean rows among the different ones of all draws."""
    chosen = [
        [names_[row] for row in np.flatnonzero(flags == flag).tolist()]
        for names_, flags in zip(names, planted, strict=True)
    ]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(name for each in chosen for name in each))}
    return [np.array([numbers[name] for name in each]) for each in chosen]


def _above(planted: NDArray[np.float64], clean: NDArray[np.float64]) -> NDArray[np.float64]:
    difference = planted[:, None] - clean[None, :]
    return np.asarray((difference > 0) + 0.5 * (difference == 0), dtype=np.float64)


def _resampled_mean(
    above: Sequence[NDArray[np.float64]],
    planted: Sequence[NDArray[np.int64]],
    clean: Sequence[NDArray[np.int64]],
    generator: np.random.Generator,
) -> float:
    """Return the mean over draws after the different rows were drawn anew; draws without a planted row are left out."""
    # Multinomial counts as weights: the mean over resampled rows and columns without copying the tables.
    row_counts, column_counts = (_counts(places, generator) for places in (planted, clean))
    means = []
    for table, rows, columns in zip(above, planted, clean, strict=True):
        row_weights, column_weights = row_counts[rows], column_counts[columns]
        if total := float(row_weights.sum() * column_weights.sum()):
            means.append(float(row_weights @ table @ column_weights) / total)
    return float(np.mean(means)) if means else float("nan")


def _counts(places: Sequence[NDArray[np.int64]], generator: np.random.Generator) -> NDArray[np.int64]:
    different = 1 + max(int(each.max()) for each in places)
    return generator.multinomial(different, np.full(different, 1 / different))


def _found(scores: NDArray[np.float64], planted: NDArray[np.bool_]) -> float:
    """Return the number of planted rows among as many rows with the highest scores; of tied rows, their share."""
    count = int(planted.sum())
    threshold = np.sort(scores)[-count]
    surely, tied = scores > threshold, scores == threshold
    places = count - int(surely.sum())
    return float(planted[surely].sum() + places * planted[tied].mean())
