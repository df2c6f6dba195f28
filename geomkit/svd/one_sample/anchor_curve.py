"""Overlap of the mean gradient of n anchors with the mean gradient of other examples, as a function of n.

Half of the safety examples are set aside as the reference; the mean gradient of one, two, four … of the other examples,
the anchors, is compared with the mean gradient of the reference. With as many anchors as the reference has examples,
the overlap is the split-half reliability: no number of anchors can be expected to have a larger overlap with a
reference of that size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from geomkit.errors import GeometryError
from geomkit.gradients.checks import check_enough, sample_counts, with_controls
from geomkit.gradients.copies import check_different_samples
from geomkit.gradients.gradient_set import GradientSet
from geomkit.inputs.parameters import ALL_PARAMETERS, kind_of, layer_index
from geomkit.svd.common_basis import CommonBasis, to_common_basis
from geomkit.svd.nulls import haar_overlap
from geomkit.svd.one_sample.pooled import is_matrix, no_subspaces, pooled_gradients, space_dimension
from geomkit.svd.singular_vectors import Side
from geomkit.utils.arguments import check_draws, check_rank, check_seed, is_whole
from geomkit.utils.figures import DrawnResult, draw
from geomkit.utils.progress import with_bar

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_MIN_EXAMPLES = 4  # two in the reference and two anchors
_BAND = (0.05, 0.95)  # quantiles: the central 90 % of the draws


@dataclass(frozen=True, eq=False)
class LayerAnchorCurve:
    """Overlaps of means of anchors with the reference's mean in one parameter.

    Attributes:
        parameter: Name of the parameter.
        rank: k, the same for every subspace of this parameter.
        dimension: d, the dimension of the space of the singular vectors.
        draws: (draws, counts) overlaps with the reference of the same draw, by group.
    """

    parameter: str
    rank: int
    dimension: int
    draws: Mapping[str, np.ndarray] = field(repr=False)

    @property
    def expected(self) -> float:
        """Expected overlap of uniformly random subspaces, k/d."""
        return haar_overlap(self.rank, self.rank, self.dimension)


@dataclass(frozen=True, eq=False)
class AnchorCurve(DrawnResult):
    """Overlap of the mean gradient of n anchors with the mean gradient of a disjoint reference, over random splits.

    The spread over draws is the spread over splits of *these* examples; another set of examples may lie outside.

    Attributes:
        side: Side whose singular vectors span the subspaces, ``"left"`` or ``"right"``.
        rank: The requested rank; each of ``layers`` has the rank that its parameter allowed.
        counts: Numbers of anchors n, ascending; the last is the size of the reference.
        draws: (draws, counts) overlaps, mean over parameters, by group; the anchors come first, as ``"safety"``.
        layers: The overlaps in each parameter.
    """

    side: Side
    rank: int
    counts: tuple[int, ...]
    draws: Mapping[str, np.ndarray] = field(repr=False)
    layers: Mapping[str, LayerAnchorCurve] = field(repr=False)

    @property
    def reference(self) -> int:
        """Number of examples in the reference."""
        return self.counts[-1]

    @property
    def ceiling(self) -> float:
        """Split-half reliability: mean overlap with as many anchors as the reference has examples."""
        return float(self.means("safety")[-1])

    @property
    def expected(self) -> float:
        """Expected overlap of uniformly random subspaces, mean over parameters."""
        return float(np.mean([layer.expected for layer in self.layers.values()]))

    def means(self, group: str = "safety") -> np.ndarray:
        """Return the mean overlap of a group over draws, for each number of anchors."""
        return np.asarray(self.draws[group].mean(0))

    def band(self, group: str = "safety") -> tuple[np.ndarray, np.ndarray]:
        """Return the 5 % and the 95 % quantile of a group's overlaps over draws, for each number of anchors."""
        low, high = np.quantile(self.draws[group], _BAND, axis=0)
        return low, high

    def needed(self, overlap: float) -> int | None:
        """Return the smallest number of anchors whose mean overlap reaches a value, or ``None`` if no number does."""
        reached = self.means("safety") >= overlap
        return self.counts[int(np.argmax(reached))] if reached.any() else None

    def to_frame(self) -> "pd.DataFrame":
        """Return a data frame with one row per parameter, group and number of anchors; first, all parameters together.

        ``value`` is the mean over draws, ``low`` to ``high`` contains the central 90 % of the draws, and ``null`` is
        the expected overlap of uniformly random subspaces.
        """
        import pandas as pd

        rows = [*self._rows(ALL_PARAMETERS, self.draws, self.expected)]
        for name, layer in self.layers.items():
            rows += self._rows(name, layer.draws, layer.expected)
        return pd.DataFrame(rows)

    def _rows(self, parameter: str, draws: Mapping[str, np.ndarray], expected: float) -> list[dict[str, object]]:
        return [
            {
                "parameter": parameter,
                "kind": "all" if parameter == ALL_PARAMETERS else kind_of(parameter),
                "layer": layer_index(parameter),
                "group": group,
                "anchors": count,
                "value": float(values.mean()),
                "low": float(np.quantile(values, _BAND[0])),
                "high": float(np.quantile(values, _BAND[1])),
                "null": expected,
            }
            for group, overlaps in draws.items()
            for count, values in zip(self.counts, overlaps.T, strict=True)
        ]

    def shown_frame(self) -> "pd.DataFrame":
        """Return the rows of the data frame for all parameters together."""
        frame = self.to_frame()
        return frame[frame["parameter"] == ALL_PARAMETERS].drop(columns=["parameter", "kind", "layer"])

    def plot(self) -> "go.Figure":
        """Draw the curve, see :func:`geomkit.plots.one_sample.plot_anchor_curve`."""
        return draw("plot_anchor_curve", self)

    def __str__(self) -> str:
        """Return the overlaps with the fewest and the most anchors, and how many reach half and 90 % of the last."""
        means, half = self.means(), self.ceiling / 2
        others = "".join(
            f", {name} {self.means(name)[0]:.3f} to {self.means(name)[-1]:.3f}"
            for name in self.draws
            if name != "safety"
        )
        return (
            f"{self.side}-{self.rank} overlap with the mean of {self.reference} other examples: "
            f"with {self.counts[0]} {means[0]:.3f}, with {self.reference} {self.ceiling:.3f}{others}; half of that "
            f"takes {self.needed(half)}, 90 % {self.needed(0.9 * self.ceiling)}; random subspaces {self.expected:.3f}"
        )


def anchor_curve(
    safety: GradientSet,
    control: GradientSet | Mapping[str, GradientSet] | None = None,
    *,
    counts: Sequence[int] | None = None,
    rank: int = 10,
    side: Side = "left",
    draws: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> AnchorCurve:
    """Measure how the mean gradient of n anchors approaches the mean gradient of a disjoint reference as n grows.

    Each draw splits the safety examples at random into a reference, half of the examples, and the anchors, of which the
    first n are averaged for every n. Controls are compared with the same references. If a control has as many examples
    as the safety set, only the control's examples at the anchors' places are averaged, so that no prompt is compared
    with another wording of itself.

    Args:
        safety: N ≥ 4 examples, collected with ``per_sample=True``.
        control: At least N/2 other examples, collected with ``per_sample=True``, or several such sets by name.
        counts: Numbers of anchors between 1 and N/2; 1, 2, 4 … when left out. N/2 is always included.
        rank: Largest number of directions to compare; the same for all subspaces of a parameter, and at most the rank
            that every single example has in this parameter.
        side: ``"left"`` for the output space, ``"right"`` for the input space.
        draws: Number of random splits.
        seed: Seed of the splits.
        progress: Show a bar, in parameters, once the work has taken five seconds.

    Returns:
        The overlaps of every draw, by group and number of anchors.

    Raises:
        GeometryError: If a set lacks per-sample gradients, is too small, covers other parameters or has a value that
            is not finite; if a control is called ``"safety"``; if a count is out of range, or ``rank`` or ``draws``
            below 1; or if no parameter has a gradient in every example.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> rows = gk.load_examples("safety").select(range(8))
        >>> safety = gk.collect_gradients(model, tokenizer, rows, per_sample=True, layers="lm_head*", progress=False)
        >>> curve = anchor_curve(safety, draws=4)
        >>> curve.counts, curve.needed(2.0)
        ((1, 2, 4), None)
    """
    sets = with_controls(safety, control)
    check_rank(rank)
    check_draws(draws, 1)
    check_seed(seed)
    half = len(safety.samples) // 2
    check_enough({"safety": len(safety.samples)}, _MIN_EXAMPLES)
    check_different_samples({"safety": safety}, _MIN_EXAMPLES)
    check_enough(sample_counts(sets), half)
    steps = _anchor_counts(counts, half)
    # 1. Random splits, the same for all parameters.
    generator = np.random.default_rng(seed)
    splits = [_split(sets, half, generator) for _ in range(draws)]
    # 2. Overlaps of every draw in every matrix in which all examples have a gradient.
    layers = {}
    for name, gradients in with_bar(pooled_gradients(sets).items(), "anchor curve", "parameter", progress):
        if is_matrix(gradients[0]):
            layer_rank, overlaps = _layer_overlaps(to_common_basis(gradients, side), splits, steps, rank)
            if layer_rank:
                layers[name] = LayerAnchorCurve(name, layer_rank, space_dimension(gradients[0], side), overlaps)
    if not layers:
        raise no_subspaces()
    # 3. Means over parameters.
    whole = {name: np.mean([layer.draws[name] for layer in layers.values()], axis=0) for name in sets}
    return AnchorCurve(side, rank, steps, whole, layers)


def _anchor_counts(counts: Sequence[int] | None, half: int) -> tuple[int, ...]:
    """Return the numbers of anchors, ascending: the given ones or powers of two, and half of the examples."""
    powers_of_two = [2**power for power in range(half.bit_length()) if 2**power <= half]
    requested = powers_of_two if counts is None else list(counts)
    if not all(is_whole(count, 1) and count <= half for count in requested):
        raise GeometryError(
            f"expected counts of anchors between 1 and {half}, half of the examples, found {requested}; collect more "
            "examples or ask for fewer anchors"
        )
    return tuple(sorted({*requested, half}))


_Split = tuple[list[int], dict[str, list[int]]]


def _split(sets: Mapping[str, GradientSet], half: int, generator: np.random.Generator) -> _Split:
    """Return the places of a reference, and by group the places of its anchors in the order in which they are averaged.

    Args:
        sets: The safety set and the controls; places count their examples set after set.
        half: Number of examples in the reference.
        generator: Source of randomness.
    """
    order = generator.permutation(len(sets["safety"].samples))
    start, groups = 0, {}
    for name, gradients in sets.items():
        size = len(gradients.samples)
        places = order[half:] if size == len(order) else generator.permutation(size)
        groups[name] = (start + places).tolist()
        start += size
    return order[:half].tolist(), groups


def _layer_overlaps(
    common: CommonBasis, splits: Sequence[_Split], counts: Sequence[int], rank: int
) -> tuple[int, dict[str, np.ndarray]]:
    """Return the rank that all examples of one parameter have, and by group (draws, counts) overlaps at this rank."""
    # 1. Subspaces of single examples, cut to the rank that all examples have.
    single = common.bases_of_gradients(rank)
    common_rank = min(basis.shape[1] for basis in single)
    if not common_rank:
        return 0, {}
    # 2. Subspaces of the references' sums; a mean has the subspace of the sum.
    references = common.bases_of_sums([reference for reference, _ in splits], common_rank)
    overlaps = {}
    for name in splits[0][1]:
        # 3. Subspaces of the sums of the first n anchors, for all draws in one call. For n = 1 the subspace was
        #    computed in step 1.
        sums = [groups[name][:count] for _, groups in splits for count in counts if count > 1]
        sum_bases = iter(common.bases_of_sums(sums, common_rank))
        # 4. Overlaps with the reference of the same draw.
        rows = []
        for reference, (_, groups) in zip(references, splits, strict=True):
            bases = [single[groups[name][0]] if count == 1 else next(sum_bases) for count in counts]
            rows.append(_overlaps(reference, bases, common_rank))
        overlaps[name] = np.array(rows)
    return common_rank, overlaps


def _overlaps(reference: Tensor, bases: Sequence[Tensor], rank: int) -> np.ndarray:
    """Return the overlap ‖UᵀV‖_F²/rank of each basis with the reference; sums that cancel may have fewer columns."""
    return np.array([float((reference[:, :rank].T @ basis[:, :rank]).square().sum()) / rank for basis in bases])
