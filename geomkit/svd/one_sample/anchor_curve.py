"""How many anchors it takes to find the leading safety directions.

Half of the examples are set aside as the reference; the mean of one, two, four … of the others is compared with the
reference's mean. As many anchors as the reference has is the split-half reliability: no number of anchors can be
expected to do better against a reference of that size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from geomkit.errors import GeometryError
from geomkit.gradients.checks import check_enough, counts_of, with_controls
from geomkit.gradients.gradient_set import GradientSet, shared_layers
from geomkit.inputs.parameters import kind_of, layer_index
from geomkit.svd.common_basis import CommonBasis, to_common_basis
from geomkit.svd.nulls import haar_overlap
from geomkit.svd.singular_vectors import Side
from geomkit.utils.arguments import check_draws, check_rank, is_whole
from geomkit.utils.display import html_table
from geomkit.utils.figures import draw

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_FEWEST = 4  # two on either side
_BAND = (0.05, 0.95)
_ALL = "all parameters"


@dataclass(frozen=True, eq=False)
class LayerAnchorCurve:
    """The overlaps in one parameter.

    Attributes:
        parameter: Name of the parameter.
        rank: k, the same for every subspace.
        dimension: d of the space.
        draws: By group, (draws, counts) overlaps with the reference of the same draw.
    """

    parameter: str
    rank: int
    dimension: int
    draws: Mapping[str, np.ndarray] = field(repr=False)

    @property
    def expected(self) -> float:
        """The overlap of uniformly random subspaces, k/d."""
        return haar_overlap(self.rank, self.rank, self.dimension)


@dataclass(frozen=True, eq=False)
class AnchorCurve:
    """Overlap of the mean gradient of n anchors with that of a disjoint reference, over random splits.

    The spread over draws is that of splitting *these* examples; another set of examples may lie outside of it.

    Attributes:
        side: Which singular vectors span the subspaces.
        rank: The rank asked for; ``layers`` has the one each parameter allowed.
        counts: n, ascending; the last is the size of the reference.
        draws: By group, the anchors as ``"safety"`` first, (draws, counts) overlaps, mean over parameters.
        layers: The same for each parameter.
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
        """The split-half reliability: mean overlap of as many anchors as the reference has."""
        return float(self.means("safety")[-1])

    @property
    def expected(self) -> float:
        """Mean over parameters of what uniformly random subspaces would show."""
        return float(np.mean([layer.expected for layer in self.layers.values()]))

    def means(self, group: str = "safety") -> np.ndarray:
        """Return the mean overlap over draws at each count."""
        return np.asarray(self.draws[group].mean(0))

    def band(self, group: str = "safety") -> tuple[np.ndarray, np.ndarray]:
        """Return where the central 90 % of the draws lie at each count."""
        low, high = np.quantile(self.draws[group], _BAND, axis=0)
        return low, high

    def needed(self, overlap: float) -> int | None:
        """Return the smallest count of anchors whose mean overlap reaches a value, or ``None`` if none does."""
        reached = self.means("safety") >= overlap
        return self.counts[int(np.argmax(reached))] if reached.any() else None

    def to_frame(self) -> "pd.DataFrame":
        """Return a row per parameter, group and count, those of all parameters together first.

        ``value`` is the mean over draws, ``low`` to ``high`` holds the central 90 % of them, and ``null`` is what
        uniformly random subspaces would show.
        """
        import pandas as pd

        rows = [*self._rows(_ALL, self.draws, self.expected)]
        for name, layer in self.layers.items():
            rows += self._rows(name, layer.draws, layer.expected)
        return pd.DataFrame(rows)

    def _rows(self, parameter: str, draws: Mapping[str, np.ndarray], expected: float) -> list[dict[str, object]]:
        return [
            {
                "parameter": parameter,
                "kind": "all" if parameter == _ALL else kind_of(parameter),
                "layer": layer_index(parameter),
                "group": group,
                "anchors": count,
                "value": float(values.mean()),
                "low": float(np.quantile(values, _BAND[0])),
                "high": float(np.quantile(values, _BAND[1])),
                "null": expected,
            }
            for group, found in draws.items()
            for count, values in zip(self.counts, found.T, strict=True)
        ]

    def plot(self) -> "go.Figure":
        """Draw it, see :func:`geomkit.plots.one_sample.plot_anchor_curve`."""
        return draw("plot_anchor_curve", self)

    def __str__(self) -> str:
        """Say the overlap of one anchor and of as many as the reference has, and how many reach half of that."""
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

    def _repr_html_(self) -> str:
        return html_table(str(self), self.to_frame())


def anchor_curve(
    safety: GradientSet,
    control: GradientSet | Mapping[str, GradientSet] | None = None,
    *,
    counts: Sequence[int] | None = None,
    rank: int = 10,
    side: Side = "left",
    draws: int = 20,
    seed: int = 0,
) -> AnchorCurve:
    """Measure how the mean gradient of n anchors approaches that of a disjoint reference as n grows.

    Each draw splits the safety examples at random into a reference of half of them and the anchors, whose first n are
    taken for every count. Controls are compared with the same references; a control with as many examples as there are
    safety examples is taken from the anchors' places, so that no prompt meets itself in another wording.

    Args:
        safety: N ≥ 4 examples, collected with ``per_sample=True``.
        control: Other examples, at least N/2, collected with ``per_sample=True``, or several such sets by name.
        counts: Numbers of anchors between 1 and N/2; 1, 2, 4 … when left out. N/2 is always among them.
        rank: How many directions to compare, at most; the same for all subspaces of a parameter, and no more than any
            single example has there.
        side: ``"left"`` for the output space, ``"right"`` for the input space.
        draws: Number of random splits.
        seed: Seed of the splits.

    Returns:
        The overlaps of every draw.

    Raises:
        GeometryError: If a set lacks per-sample gradients or is too small, a control is called ``"safety"``, a count is
            out of range, ``rank`` or ``draws`` is below 1, they cover other parameters, one is not finite, or no
            parameter has a gradient in every example.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> rows = gk.load_examples("safety").select(range(8))
        >>> safety = gk.collect_gradients(model, tokenizer, rows, per_sample=True, kinds="head", progress=False)
        >>> curve = anchor_curve(safety, draws=4)
        >>> curve.counts, curve.needed(2.0)
        ((1, 2, 4), None)
    """
    sets = with_controls(safety, control)
    check_rank(rank)
    check_draws(draws, 1)
    half = len(safety.samples) // 2
    check_enough({"safety": len(safety.samples)}, _FEWEST)
    check_enough(counts_of(sets), half)
    steps = _checked(counts, half)
    generator = np.random.default_rng(seed)
    splits = [_split(sets, half, generator) for _ in range(draws)]
    samples = [sample for found in sets.values() for sample in found.samples]
    layers = {}
    for name in shared_layers(*samples):
        shape = samples[0][name].matrix_shape
        if min(shape) > 1:
            stack = to_common_basis([sample[name] for sample in samples], side)
            rank_there, found = _curve(stack, splits, steps, rank)
            if rank_there:
                layers[name] = LayerAnchorCurve(name, rank_there, shape[0 if side == "left" else 1], found)
    if not layers:
        raise GeometryError("expected a matrix with a gradient in every example, found none; check the loss masks")
    whole = {name: np.mean([layer.draws[name] for layer in layers.values()], axis=0) for name in sets}
    return AnchorCurve(side, rank, steps, whole, layers)


def _checked(counts: Sequence[int] | None, half: int) -> tuple[int, ...]:
    wanted = [2**power for power in range(half.bit_length()) if 2**power <= half] if counts is None else list(counts)
    if not all(is_whole(count, 1) and count <= half for count in wanted):
        raise GeometryError(
            f"expected counts of anchors between 1 and {half}, half of the examples, found {wanted}; collect more "
            "examples or ask for fewer anchors"
        )
    return tuple(sorted({*wanted, half}))


_Split = tuple[list[int], dict[str, list[int]]]


def _split(sets: Mapping[str, GradientSet], half: int, generator: np.random.Generator) -> _Split:
    """Return the places of a reference and, by group, those of the anchors, in the order they are added in."""
    order = generator.permutation(len(sets["safety"].samples))
    start, groups = 0, {}
    for name, found in sets.items():
        size = len(found.samples)
        places = order[half:] if size == len(order) else generator.permutation(size)
        groups[name] = (start + places).tolist()
        start += size
    return order[:half].tolist(), groups


def _curve(
    stack: CommonBasis, splits: Sequence[_Split], counts: Sequence[int], rank: int
) -> tuple[int, dict[str, np.ndarray]]:
    """Return the rank that all examples of one parameter allow, and the overlaps of every draw at that rank."""
    single = stack.bases(rank)
    kept = min(basis.shape[1] for basis in single)
    if not kept:
        return 0, {}
    references = stack.bases_of([reference for reference, _ in splits], kept)
    found = {}
    for name in splits[0][1]:
        # One anchor is no sum, and there are far fewer examples than draws of one.
        sums = [groups[name][:count] for _, groups in splits for count in counts if count > 1]
        several = iter(stack.bases_of(sums, kept))
        found[name] = np.array(
            [
                _overlaps(fixed, [single[groups[name][0]] if count == 1 else next(several) for count in counts], kept)
                for fixed, (_, groups) in zip(references, splits, strict=True)
            ]
        )
    return kept, found


def _overlaps(reference: Tensor, bases: Sequence[Tensor], rank: int) -> np.ndarray:
    """Return the overlap of each basis with the reference; sums that cancel may have fewer directions than that."""
    return np.array([float((reference[:, :rank].T @ basis[:, :rank]).square().sum()) / rank for basis in bases])
