"""Copies among per-sample gradients: intervals over examples need different examples."""

import logging
from collections.abc import Mapping

import numpy as np

from geomkit.errors import GeometryError
from geomkit.gradients.gradient_set import GradientSet

_LOGGER = logging.getLogger(__name__)

_SAME = 1e-10
"""Squared distance of two gradients, relative to their squared norms, below which they are of one row: far above the
rounding of fp32 in another batch, far below the distance of any two rows."""


def check_different_samples(sets: Mapping[str, GradientSet], minimum: int) -> None:
    """Check that the samples of every set are from enough different rows; log copies, and rows that two sets share.

    Rows are told apart by the fingerprints of their tokens. Samples without provenance count as different.

    Args:
        sets: Sets that were collected with ``per_sample=True``, by name.
        minimum: Least number of different rows.

    Raises:
        GeometryError: If a set has fewer.
    """
    rows = {name: _fingerprints(gradients) for name, gradients in sets.items()}
    for name, fingerprints in rows.items():
        _check(name, len(set(fingerprints)), len(fingerprints), minimum)
    names = list(rows)
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            if shared := set(rows[first]) & set(rows[second]):
                _LOGGER.warning("%s and %s share %d rows, which makes them alike", first, second, len(shared))


def check_different_grams(name: str, gram: np.ndarray, minimum: int) -> None:
    """Check that (N, N) inner products over all parameters are of enough different gradients; log copies.

    Args:
        name: Name of the set in messages.
        gram: The inner products.
        minimum: Least number of different gradients.

    Raises:
        GeometryError: If there are fewer.
    """
    squared = np.diag(gram)
    sums = squared[:, None] + squared[None, :]
    # ‖a − b‖² = ‖a‖² + ‖b‖² − 2⟨a, b⟩; gradients that are zero are not told apart by it, and count as different.
    copies = np.tril(sums - 2 * gram < _SAME * sums, k=-1).any(axis=1)
    _check(name, len(gram) - int(copies.sum()), len(gram), minimum)


def _fingerprints(gradients: GradientSet) -> list[object]:
    return [sample.provenance.data if sample.provenance else object() for sample in gradients.samples]


def _check(name: str, different: int, count: int, minimum: int) -> None:
    if different < minimum <= count:
        raise GeometryError(
            f"expected at least {minimum} different rows in the {name} set, found {different} in {count} gradients; "
            "copies of a row are no sample: give other rows"
        )
    if different < count:
        _LOGGER.warning("%s: %d gradients are of %d different rows; intervals over copies are too narrow", name,
                        count, different)  # fmt: skip
