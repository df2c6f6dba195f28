"""Overlaps between the leading subspaces of single examples, within sets and between sets.

The leading subspace of each example's gradient is compared with the leading subspaces of all other examples. Gradients
of the same layer share the covariance of the layer's inputs and overlap without any common content. Only the contrast,
the mean overlap within a set minus the mean overlap with another set, shows that the examples of the first set share a
subspace that the examples of the other set do not.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import permutations
from typing import TYPE_CHECKING

import numpy as np

from geomkit.errors import GeometryError
from geomkit.gradients.checks import check_enough, check_sets, sample_counts
from geomkit.gradients.copies import check_different_samples
from geomkit.gradients.gradient_set import GradientSet
from geomkit.stats.jackknife import Interval
from geomkit.stats.multiple_testing import benjamini_hochberg
from geomkit.stats.pair_means import WithinBetween, mean_between, within_between
from geomkit.svd.common_basis import to_common_basis
from geomkit.svd.nulls import haar_overlap
from geomkit.svd.one_sample.pooled import (
    common_rank_overlaps,
    is_matrix,
    no_subspaces,
    pooled_gradients,
    pooled_places,
    space_dimension,
)
from geomkit.svd.singular_vectors import Side
from geomkit.utils.arguments import check_confidence, check_draws, check_rank, check_seed
from geomkit.utils.figures import DrawnResult, draw

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_MIN_EXAMPLES = 3


@dataclass(frozen=True, eq=False)
class Overlaps(DrawnResult):
    """Overlaps between the leading subspaces of single examples of several sets.

    Attributes:
        side: Side whose singular vectors span the subspaces, ``"left"`` or ``"right"``.
        rank: The requested rank; in a parameter, at most the rank that all examples have.
        names: Names of the sets.
        counts: Number of examples of each set.
        pairs: (N, N) overlap ‖U_iᵀU_j‖_F²/k of every two examples, mean over parameters, set after set.
        matrix: (sets, sets) mean overlap of two different examples within a set, and between two sets.
        intervals: Jackknife interval of each entry of ``matrix``, over examples.
        contrasts: For each ordered pair of sets, the mean within the first set minus the mean between the two sets.
        expected: Expected overlap of uniformly random subspaces, mean over parameters.
        parameters: Parameters in which every example has a gradient.
        confidence: Nominal coverage of all intervals.
    """

    side: Side
    rank: int
    names: tuple[str, ...]
    counts: tuple[int, ...]
    pairs: np.ndarray = field(repr=False)
    matrix: np.ndarray
    intervals: Mapping[tuple[str, str], Interval] = field(repr=False)
    contrasts: Mapping[tuple[str, str], WithinBetween] = field(repr=False)
    expected: float
    parameters: tuple[str, ...] = field(repr=False)
    confidence: float = 0.95

    def to_frame(self) -> "pd.DataFrame":
        """Return a data frame with one row per ordered pair of sets.

        ``value`` is the mean overlap with its interval ``low`` to ``high``, and ``null`` the expected overlap of random
        subspaces; ``contrast`` is the first set's mean overlap within itself minus ``value``, with its interval,
        permutation ``p_value`` and ``q_value`` (Benjamini and Hochberg 1995, over pairs of sets).
        """
        import pandas as pd

        q_values = dict(
            zip(self.contrasts, benjamini_hochberg([c.p_value for c in self.contrasts.values()]), strict=True)
        )
        rows = []
        for row, first in enumerate(self.names):
            for column, second in enumerate(self.names):
                low, high = self.intervals[first, second]
                contrast = self.contrasts.get((first, second), WithinBetween())
                rows.append(
                    {
                        "first": first,
                        "second": second,
                        "value": self.matrix[row, column],
                        "low": low,
                        "high": high,
                        "null": self.expected,
                        "contrast": contrast.value,
                        "contrast_low": contrast.interval[0],
                        "contrast_high": contrast.interval[1],
                        "p_value": contrast.p_value,
                        "q_value": q_values.get((first, second), float("nan")),
                    }
                )
        return pd.DataFrame(rows)

    def plot(self) -> "go.Figure":
        """Draw the overlaps, see :func:`geomkit.plots.one_sample.plot_overlaps`."""
        return draw("plot_overlaps", self)

    def __str__(self) -> str:
        """Return the mean overlap within the first set, and with each other set with the contrast, as text."""
        first, *others = self.names
        low, high = self.intervals[first, first]
        between = "; ".join(
            f"with {name} {self.matrix[0, place]:.3f}, contrast {self.contrasts[first, name]}"
            for place, name in enumerate(others, 1)
        )
        return (
            f"{self.side}-{self.rank} overlap of two examples: within {first} {self.matrix[0, 0]:.3f} "
            f"[{low:.3f}, {high:.3f}]; {between}; random subspaces {self.expected:.3f}"
        )


def overlaps(
    sets: Mapping[str, GradientSet],
    *,
    rank: int = 10,
    side: Side = "left",
    draws: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Overlaps:
    """Compare the leading subspaces of every two examples, within and between several sets.

    Between sets of equal size, examples at the same place are not compared (they may be one prompt, answered in two
    ways), are left out together in the jackknife, and swap their labels together in the permutation test; all three
    rules are valid for independent examples as well. Intervals are jackknife intervals over examples. The one-sided
    p-value (1 + #{permuted ≥ observed}) / (1 + draws) is the probability of a contrast this high if the labels of the
    two sets were exchangeable. Measured error rates and coverage: tests/benchmarks/README.md.

    Args:
        sets: Two sets or more by name, each of at least three examples collected with ``per_sample=True``.
        rank: Largest number of directions to compare; in a parameter, at most the rank that all examples have.
        side: ``"left"`` for the output space, ``"right"`` for the input space.
        draws: Number of permutations of the labels, for each pair of sets.
        seed: Seed of the permutations.
        confidence: Nominal coverage of all intervals, between 0 and 1.

    Returns:
        The overlaps within and between sets, and the contrasts.

    Raises:
        GeometryError: If there are fewer than two sets; if a set has fewer than three per-sample gradients, covers
            other parameters or has a value that is not finite; if no parameter has a gradient in every example; or if
            ``rank``, ``draws`` or the confidence is out of range.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> def head(name):
        ...     rows = gk.load_examples(name).select(range(4))
        ...     return gk.collect_gradients(model, tokenizer, rows, per_sample=True, layers="lm_head*", progress=False)
        >>> result = overlaps({"safety": head("safety"), "skill": head("scenarios/new-skill")})
        >>> bool(result.matrix[0, 0] > result.matrix[0, 1] > result.expected)
        True
    """
    check_sets(sets)
    check_rank(rank)
    check_draws(draws, 0)
    check_confidence(confidence)
    check_seed(seed)
    if len(sets) < 2:
        raise GeometryError(f"expected two sets or more to compare, found {len(sets)}; give e.g. a control set as well")
    check_enough(sample_counts(sets), _MIN_EXAMPLES)
    check_different_samples(sets, _MIN_EXAMPLES)
    # 1. Overlaps of every two examples, mean over parameters, and the place of every set among the examples.
    pairs, expected = _pair_overlaps(sets, rank, side)
    names, counts = tuple(sets), sample_counts(sets)
    places = pooled_places(counts)
    # 2. Mean overlap of two different examples: a block of the pairs for every set a, and for every two sets a and b.
    generator = np.random.default_rng(seed)
    means = {(a, b): mean_between(pairs[places[a], places[b]], a == b, confidence) for a in names for b in names}
    # 3. Contrast: mean of the block (a, a) minus mean of the block (a, b). Permutations of the labels also need (b, b).
    contrasts = {
        (a, b): within_between(
            pairs[places[a], places[a]],
            pairs[places[a], places[b]],
            pairs[places[b], places[b]],
            generator,
            draws,
            confidence,
        )
        for a, b in permutations(names, 2)
    }
    return Overlaps(
        side=side,
        rank=rank,
        names=names,
        counts=tuple(counts.values()),
        pairs=pairs,
        matrix=np.array([[means[a, b][0] for b in names] for a in names]),
        intervals={pair: interval for pair, (_, interval) in means.items()},
        contrasts=contrasts,
        expected=float(np.mean(list(expected.values()))),
        parameters=tuple(expected),
        confidence=confidence,
    )


def _pair_overlaps(sets: Mapping[str, GradientSet], rank: int, side: Side) -> tuple[np.ndarray, dict[str, float]]:
    """Return (N, N) overlaps of single examples, mean over parameters, and each parameter's expected overlap.

    The expected overlap is the overlap of uniformly random subspaces. Parameters in which an example has no gradient
    are left out.
    """
    examples = sum(sample_counts(sets).values())
    total, expected = np.zeros((examples, examples)), {}
    for name, gradients in pooled_gradients(sets).items():
        if is_matrix(gradients[0]):
            bases = to_common_basis(gradients, side).bases_of_gradients(rank)
            pairs, common_rank = common_rank_overlaps(bases, bases)
            if common_rank:
                total += pairs
                expected[name] = haar_overlap(common_rank, common_rank, space_dimension(gradients[0], side))
    if not expected:
        raise no_subspaces()
    return total / len(expected), expected
