"""Intervals of what single examples show against the means of all anchors but one.

The means are made of the same anchors, so another draw of anchors would move them all: leaving anchor j out changes
its own value and every mean. Values against means that lack two anchors, the one at the example's place and j, give the
jackknife of all that at once.
"""

from dataclasses import dataclass

import numpy as np

from geomkit.stats.jackknife import interactions, narrowed_interval

Interval = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Estimate:
    """The mean of a measure over the single examples of a group.

    Attributes:
        value: The mean.
        interval: Over other anchors and other examples of the group.
        contrast: By how much the anchors' mean is above this one; zero for the anchors themselves.
        contrast_interval: The interval of the contrast.
    """

    value: float
    interval: Interval
    contrast: float = 0.0
    contrast_interval: Interval = (0.0, 0.0)

    def __str__(self) -> str:
        """Say the mean with its interval."""
        return f"{self.value:.3f} [{self.interval[0]:.3f}, {self.interval[1]:.3f}]"


@dataclass(frozen=True, eq=False)
class LeaveOneOut:
    """What M examples show against the means of N anchors, for several measures at once.

    Example c belongs to the anchor at place c modulo N, and meets the mean without that one.

    Attributes:
        values: (M, …) against the mean without the anchor of its place.
        pairs: (M, N, …) against the mean without that anchor and without anchor j as well; where j is that anchor
            itself, the entry is not read.
        interacting: Whether the variance that the jackknife counts twice is taken off. Subspaces jump where gradients
            only turn: it is much of an overlap's, and within the error of a cosine's.
    """

    values: np.ndarray
    pairs: np.ndarray
    interacting: bool = False

    @property
    def matched(self) -> bool:
        """Whether the examples stand place by place beside the anchors."""
        return len(self.pairs) == len(self.pairs[0])

    @property
    def own(self) -> np.ndarray:
        """(M, N, 1, …) whether an anchor is that of the example's place."""
        examples, anchors = self.pairs.shape[:2]
        own: np.ndarray = np.arange(examples)[:, None] % anchors == np.arange(anchors)
        return own.reshape(examples, anchors, *[1] * (self.pairs.ndim - 2))

    def without(self) -> tuple[np.ndarray, ...]:
        """Return the mean value with each anchor left out and, if unmatched, with each example left out.

        Example j of a group as large as the anchors' leaves together with anchor j. That is right for rows that
        belong together, and for independent ones as well.
        """
        examples, anchors = self.pairs.shape[:2]
        others = np.where(self.own, 0.0, self.pairs)
        if self.matched:
            return (others.sum(0) / (examples - 1),)
        # An example whose anchor is left out would meet the mean without another one: whichever.
        whichever = others.sum(1, keepdims=True) / (anchors - 1)
        without_anchor = np.where(self.own, whichever, self.pairs).mean(0)
        without_example = (self.values.sum(0) - self.values) / (examples - 1)
        return without_anchor, without_example

    def interactions(self) -> np.ndarray:
        """(M, N, …) what an anchor does to an example's value beyond what it does to all and what all do to it."""
        if not self.interacting:
            return np.zeros_like(self.pairs)
        return interactions(self.pairs - self.values[:, None], self.own)


def estimates(anchors: LeaveOneOut, group: LeaveOneOut, confidence: float) -> list[Estimate]:
    """Return the mean of a group for each measure, and how far the anchors' mean is above it.

    Args:
        anchors: The safety examples.
        group: The safety examples again, or a control.
        confidence: Of the intervals.

    Returns:
        An estimate per measure, of the trailing dimension.
    """
    value, without, together = group.values.mean(0), group.without(), group.interactions()
    interval = narrowed_interval(value, without, _variance(together, group.matched), confidence)
    if group is anchors:
        return [
            Estimate(float(mean), (float(low), float(high))) for mean, low, high in zip(value, *interval, strict=True)
        ]
    contrast = anchors.values.mean(0) - value
    (safety,) = anchors.without()
    own = anchors.interactions()
    # What an example of an unmatched control leaves changes nothing on the anchors' side.
    replicates = safety - without[0], *(-part for part in without[1:])
    twice = _variance(own - together, True) if group.matched else _variance(own, True) + _variance(together, False)
    between = narrowed_interval(contrast, replicates, twice, confidence)
    return [
        Estimate(float(mean), (float(low), float(high)), float(above), (float(least), float(most)))
        for mean, low, high, above, least, most in zip(value, *interval, contrast, *between, strict=True)
    ]


def _variance(interactions: np.ndarray, matched: bool) -> np.ndarray:
    """Return what interactions add to the variance of a mean; with matched rows, (i, j) and (j, i) go together."""
    if matched:
        return np.asarray(((interactions + interactions.swapaxes(0, 1)) ** 2).sum((0, 1)) / 2 / len(interactions) ** 2)
    return np.asarray((interactions**2).sum((0, 1)) / len(interactions) ** 2)


def singles_of_overlaps(overlaps: np.ndarray) -> LeaveOneOut:
    """Return the values of overlaps with the mean subspaces that lack one anchor, or none.

    The overlap with a mean that lacks two anchors is taken as that with the mean of all plus what leaving out either
    adds to it. What is neglected falls with the square of the number of anchors.

    Args:
        overlaps: (M, N + 1, …) with the mean without each anchor, then with the mean of all.
    """
    examples, anchors = overlaps.shape[0], overlaps.shape[1] - 1
    values = overlaps[np.arange(examples), np.arange(examples) % anchors]
    return LeaveOneOut(values, values[:, None] + overlaps[:, :-1] - overlaps[:, -1:], interacting=True)


def singles_of_cosines(anchors: np.ndarray, across: np.ndarray, squared_norms: np.ndarray) -> LeaveOneOut:
    """Return the cosines of single gradients with the mean gradients, exactly.

    Args:
        anchors: (N, N, …) inner products between anchors.
        across: (N, M, …) those with the examples.
        squared_norms: (M, …) of the examples.
    """
    count, examples = across.shape[:2]
    place = np.arange(examples) % count
    rows, diagonal = anchors.sum(1), np.moveaxis(anchors.diagonal(), -1, 0)
    toward = np.swapaxes(across, 0, 1)
    inner = toward.sum(1) - toward[np.arange(examples), place]
    squared = rows.sum(0) - 2 * rows + diagonal  # of the sum without each anchor
    lost = rows - anchors[:, place].swapaxes(0, 1)  # (M, N, …): ⟨g_j, sum without the anchor of the place⟩
    lesser = squared[place][:, None] - 2 * lost + diagonal
    return LeaveOneOut(
        _ratio(inner, squared_norms * squared[place]),
        _ratio(inner[:, None] - toward, squared_norms[:, None] * lesser),
    )


def _ratio(inner: np.ndarray, squared: np.ndarray) -> np.ndarray:
    cosines: np.ndarray = np.full(inner.shape, np.nan)
    np.divide(inner, np.sqrt(squared.clip(0)), out=cosines, where=squared > 0)
    return cosines
