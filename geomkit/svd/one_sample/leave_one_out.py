"""Jackknife intervals of the agreement between single examples and the mean gradients of all anchors but one.

The mean gradients consist of the same anchors that are compared with them, so another sample of anchors would change
all means: leaving out anchor j removes the value of anchor j and changes every other value as well. The jackknife
replicates therefore need the values of all examples against means without two anchors: the anchor at the example's
place, and anchor j.
"""

from dataclasses import dataclass

import numpy as np

from geomkit.stats.jackknife import Interval, interactions, leave_one_out_means, narrowed_interval


@dataclass(frozen=True, eq=False)
class GroupMean:
    """The mean of a measure over the examples of a group, and its contrast to the anchors' mean.

    Attributes:
        value: The mean over the group's examples.
        interval: Confidence interval of the mean, over other anchors and other examples of the group.
        contrast: The anchors' mean minus this mean; zero for the anchors themselves.
        contrast_interval: Confidence interval of the contrast.
    """

    value: float
    interval: Interval
    contrast: float = 0.0
    contrast_interval: Interval = (0.0, 0.0)

    def __str__(self) -> str:
        """Return the mean with its interval as text."""
        return f"{self.value:.3f} [{self.interval[0]:.3f}, {self.interval[1]:.3f}]"


@dataclass(frozen=True, eq=False)
class LeaveOneOut:
    """Values of M examples against the mean gradients of N anchors, for several measures at once.

    Example c belongs to the anchor at place c modulo N, and is compared with the mean without this anchor.

    Attributes:
        values: (M, …) value of each example against the mean without its own anchor.
        without_two: (M, N, …) value of each example against the mean without its own anchor and without anchor j. Where
            j is the example's own anchor, the entry is not used.
        has_interactions: Whether to subtract the variance of interactions, which the jackknife counts twice. Leading
            subspaces jump where gradients only turn: interactions are a large part of an overlap's variance, and within
            the error of a cosine's variance.
    """

    values: np.ndarray
    without_two: np.ndarray
    has_interactions: bool = False

    @property
    def matched(self) -> bool:
        """Whether there are as many examples as anchors, so that example i and anchor i are left out together."""
        return len(self.without_two) == len(self.without_two[0])

    @property
    def own_anchor(self) -> np.ndarray:
        """(M, N, 1, …) mask of the pairs of an example and the anchor at the example's place."""
        examples, anchors = self.without_two.shape[:2]
        mask: np.ndarray = np.arange(examples)[:, None] % anchors == np.arange(anchors)
        return mask.reshape(examples, anchors, *[1] * (self.without_two.ndim - 2))

    def replicates(self) -> tuple[np.ndarray, ...]:
        """Return the jackknife replicates of the mean value: without each anchor and, if unmatched, each example.

        If the group is as large as the set of anchors, example j is left out together with anchor j. This rule is valid
        for examples that belong to the anchors, and for independent examples as well.
        """
        examples, anchors = self.without_two.shape[:2]
        without_own = np.where(self.own_anchor, 0.0, self.without_two)
        # Matched: leaving out anchor j and example j leaves the examples i ≠ j against means without i and j.
        if self.matched:
            return (without_own.sum(0) / (examples - 1),)
        # Unmatched: an example whose own anchor is left out would be compared with the mean without another anchor.
        # That anchor is arbitrary, so the example counts with its average over all other anchors.
        average = without_own.sum(1, keepdims=True) / (anchors - 1)
        without_anchor = np.where(self.own_anchor, average, self.without_two).mean(0)
        return without_anchor, leave_one_out_means(self.values)

    def interactions(self) -> np.ndarray:
        """Return the (M, N, …) interaction of example i and anchor j.

        The interaction is the effect of leaving out anchor j on the value of example i, minus the row and column means
        of these effects; zero for all pairs if ``has_interactions`` is false.
        """
        if not self.has_interactions:
            return np.zeros_like(self.without_two)
        return interactions(self.without_two - self.values[:, None], self.own_anchor)


def group_means(anchors: LeaveOneOut, group: LeaveOneOut, confidence: float) -> list[GroupMean]:
    """Return the mean of a group and its contrast to the anchors' mean, for each measure.

    Args:
        anchors: Values of the safety examples.
        group: Values of a control, or ``anchors`` again.
        confidence: Nominal coverage of the intervals, between 0 and 1.

    Returns:
        One group mean per measure, the last axis of the values.
    """
    # 1. Mean over the group: the jackknife's interval, narrowed by the variance of interactions, because leaving out
    #    example i and leaving out anchor j both find the interaction of i and j.
    value, replicates, group_interactions = group.values.mean(0), group.replicates(), group.interactions()
    interval = narrowed_interval(value, replicates, _variance(group_interactions, group.matched), confidence)
    if group is anchors:
        return [
            GroupMean(float(mean), (float(low), float(high))) for mean, low, high in zip(value, *interval, strict=True)
        ]
    # 2. Contrast: replicates without the same anchor are subtracted, because both means lack it. Leaving out an example
    #    of an unmatched control changes the control's mean only.
    contrast = anchors.values.mean(0) - value
    (anchor_replicates,) = anchors.replicates()
    differences = anchor_replicates - replicates[0], *(-replicate for replicate in replicates[1:])
    # 3. Interactions of the contrast: of the differences where the rows are matched, of two independent groups else.
    anchor_interactions = anchors.interactions()
    counted_twice = (
        _variance(anchor_interactions - group_interactions, matched=True)
        if group.matched
        else _variance(anchor_interactions, matched=True) + _variance(group_interactions, matched=False)
    )
    contrast_interval = narrowed_interval(contrast, differences, counted_twice, confidence)
    return [
        GroupMean(
            float(mean), (float(low), float(high)), float(difference), (float(difference_low), float(difference_high))
        )
        for mean, low, high, difference, difference_low, difference_high in zip(
            value, *interval, contrast, *contrast_interval, strict=True
        )
    ]


def _variance(interactions: np.ndarray, matched: bool) -> np.ndarray:
    """Return the variance that (M, N, …) interactions add to the mean over examples.

    Unmatched, the interactions are independent terms: Σ_ij I_ij² / M². Matched, I_ij and I_ji belong to the same two
    rows and vary together: Σ_{i<j} (I_ij + I_ji)² / M².
    """
    if matched:
        return np.asarray(((interactions + interactions.swapaxes(0, 1)) ** 2).sum((0, 1)) / 2 / len(interactions) ** 2)
    return np.asarray((interactions**2).sum((0, 1)) / len(interactions) ** 2)


def leave_one_out_overlaps(overlaps: np.ndarray) -> LeaveOneOut:
    """Return the leave-one-out table of overlaps with the subspaces of mean gradients.

    The overlap with a mean that lacks two anchors is approximated by the overlap with the mean of all anchors, plus the
    changes from leaving out either anchor alone. The neglected part falls with the square of the number of anchors.

    Args:
        overlaps: (M, N + 1, …) overlaps of M examples with the mean without each anchor, then with the mean of all.
    """
    examples, anchors = overlaps.shape[0], overlaps.shape[1] - 1
    # With φ the overlap with the mean of all, φ_p without the own anchor p and φ_j without anchor j:
    # φ_pj ≈ φ + (φ_p − φ) + (φ_j − φ) = φ_p + φ_j − φ.
    values = overlaps[np.arange(examples), np.arange(examples) % anchors]
    without_two = values[:, None] + overlaps[:, :-1] - overlaps[:, -1:]
    return LeaveOneOut(values, without_two, has_interactions=True)


def leave_one_out_cosines(anchors: np.ndarray, across: np.ndarray, squared_norms: np.ndarray) -> LeaveOneOut:
    """Return the leave-one-out table of cosines between single gradients and mean gradients, exactly.

    Args:
        anchors: (N, N, …) inner products ⟨a_i, a_j⟩ between anchors.
        across: (N, M, …) inner products ⟨a_j, g_c⟩ between anchors and examples.
        squared_norms: (M, …) squared norms ‖g_c‖² of the examples.
    """
    count, examples = across.shape[:2]
    place = np.arange(examples) % count  # p, the example's own anchor
    # 1. Numerators, with the sum A of all anchors: ⟨g_c, A − a_p⟩, and ⟨g_c, A − a_p − a_j⟩ by subtracting ⟨g_c, a_j⟩.
    with_anchors = np.swapaxes(across, 0, 1)  # (M, N, …) ⟨g_c, a_j⟩
    inner = with_anchors.sum(1) - with_anchors[np.arange(examples), place]
    # 2. ‖A − a_p‖² = ‖A‖² − 2⟨A, a_p⟩ + ‖a_p‖², for every anchor.
    rows, diagonal = anchors.sum(1), np.moveaxis(anchors.diagonal(), -1, 0)
    squared = rows.sum(0) - 2 * rows + diagonal
    # 3. ‖A − a_p − a_j‖² = ‖A − a_p‖² − 2⟨a_j, A − a_p⟩ + ‖a_j‖², (M, N, …).
    anchor_with_mean = rows - anchors[:, place].swapaxes(0, 1)  # ⟨a_j, A − a_p⟩
    squared_without_two = squared[place][:, None] - 2 * anchor_with_mean + diagonal
    # 4. Cosines; the number of anchors in a mean cancels.
    return LeaveOneOut(
        _cosines(inner, squared_norms * squared[place]),
        _cosines(inner[:, None] - with_anchors, squared_norms[:, None] * squared_without_two),
    )


def _cosines(inner: np.ndarray, squared: np.ndarray) -> np.ndarray:
    """Return inner products divided by the root of the product of squared norms; NaN where this product is zero."""
    cosines: np.ndarray = np.full(inner.shape, np.nan)
    np.divide(inner, np.sqrt(squared.clip(0)), out=cosines, where=squared > 0)
    return cosines
