"""How much of each example's gradient lies in a subspace, such as that of the mean safety gradient."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from geomkit.errors import GeometryError
from geomkit.gradients.checks import check_enough, check_sets
from geomkit.gradients.gradient_set import GradientSet, shared_layers
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.inputs.parameters import kind_of, layer_index
from geomkit.stats.jackknife import jackknife_interval, means_without_each
from geomkit.svd.singular_vectors import Sides
from geomkit.svd.subspaces import Subspace
from geomkit.utils.arguments import check_confidence
from geomkit.utils.display import html_table

if TYPE_CHECKING:
    import pandas as pd

_FEWEST = 2


@dataclass(frozen=True, eq=False)
class LayerEnergy:
    """Energies in one parameter.

    Attributes:
        rank: k, the dimension of the subspace.
        dimension: d, that of the space it lies in.
        inside: (N,) squared norm of each example's gradient within the subspace.
        whole: (N,) its whole squared norm.
    """

    rank: int
    dimension: int
    inside: np.ndarray
    whole: np.ndarray

    @property
    def expected(self) -> float:
        """k/d, what a gradient with no preferred direction has inside."""
        return self.rank / self.dimension


@dataclass(frozen=True, eq=False)
class SubspaceEnergy:
    """The share of each example's squared gradient norm that lies in a subspace.

    Attributes:
        layers: Energies of each parameter.
        control: The same of control examples, if there are some.
        confidence: Of the intervals.
    """

    layers: Mapping[str, LayerEnergy] = field(repr=False)
    control: Mapping[str, LayerEnergy] | None = field(default=None, repr=False)
    confidence: float = 0.95

    @property
    def shares(self) -> np.ndarray:
        """(N,) share of each example, over all parameters."""
        return _shares(self.layers)

    @property
    def control_shares(self) -> np.ndarray | None:
        """(M,) the same of each control example."""
        return None if self.control is None else _shares(self.control)

    @property
    def expected(self) -> float:
        """What gradients of these norms with no preferred direction would have inside, mean over examples."""
        within = np.sum([layer.expected * layer.whole for layer in self.layers.values()], axis=0)
        return float(np.mean(within / np.sum([layer.whole for layer in self.layers.values()], axis=0)))

    @property
    def interval(self) -> tuple[float, float]:
        """Interval of the mean share, over examples; the subspace is taken as given."""
        low, high = jackknife_interval(self.shares.mean(), means_without_each(self.shares), confidence=self.confidence)
        return float(low), float(high)

    @property
    def contrast(self) -> tuple[float, tuple[float, float]] | None:
        """Mean share minus that of the control, with its interval over the examples of both."""
        if self.control_shares is None:
            return None
        own, other = self.shares, self.control_shares
        value = own.mean() - other.mean()
        without = means_without_each(own) - other.mean(), own.mean() - means_without_each(other)
        low, high = jackknife_interval(value, *without, confidence=self.confidence)
        return float(value), (float(low), float(high))

    def to_frame(self) -> "pd.DataFrame":
        """Return a row per parameter: mean ``share`` of the examples with a gradient, ``expected``, and ``control``."""
        import pandas as pd

        rows = [
            {
                "parameter": name,
                "kind": kind_of(name),
                "layer": layer_index(name),
                "rank": layer.rank,
                "dimension": layer.dimension,
                "share": _mean_share(layer),
                "expected": layer.expected,
            }
            for name, layer in self.layers.items()
        ]
        frame = pd.DataFrame(rows)
        if self.control is None:
            return frame
        return frame.assign(control=[_mean_share(self.control[name]) for name in self.layers])

    def __str__(self) -> str:
        """Say the mean share beside what chance and the control have."""
        low, high = self.interval
        share = f"{self.shares.mean():.1%} [{low:.1%}, {high:.1%}]"
        said = f"share of the energy in the subspace {share}, by chance {self.expected:.1%}"
        if self.contrast is None:
            return said
        value, (first, last) = self.contrast
        return f"{said}; minus control {100 * value:+.1f} [{100 * first:+.1f}, {100 * last:+.1f}] points"

    def _repr_html_(self) -> str:
        return html_table(str(self), self.to_frame())


def subspace_energy(
    gradients: GradientSet, subspace: Subspace, control: GradientSet | None = None, *, confidence: float = 0.95
) -> SubspaceEnergy:
    """Measure how much of each example's gradient lies in a subspace: ‖UᵀG‖² / ‖G‖².

    Examples that the subspace was made of lie in it by construction: measure others, and compare with control
    examples of the same kind. Two sets with nothing in common still share the inputs' covariance, so the share that
    chance gives, k/d, is seldom the right comparison.

    Args:
        gradients: Collected with ``per_sample=True``, at least two examples.
        subspace: Of one side, from :func:`geomkit.subspace`; parameters without one are left out.
        control: Other examples, collected likewise.
        confidence: Of the intervals.

    Returns:
        The energies of every example.

    Raises:
        GeometryError: If a set has fewer than two per-sample gradients, lacks a parameter of the subspace or has
            another shape there, the subspace is of both sides, or the confidence is not between 0 and 1.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> safety, utility = (
        ...     gk.collect_gradients(model, tokenizer, gk.load_examples(name).select(range(4)), True, progress=False)
        ...     for name in ("safety", "scenarios/new-skill")
        ... )
        >>> found = subspace_energy(utility, gk.subspace(safety, rank=5))
        >>> found.shares.shape, found.shares.mean() > found.expected
        ((4,), np.True_)
    """
    check_sets({"first": gradients} | ({} if control is None else {"control": control}))
    check_confidence(confidence)
    if subspace.side == "both":
        raise GeometryError("expected a subspace of one side, found both; choose with subspace.on('left')")
    return SubspaceEnergy(
        _energies("first", gradients, subspace),
        None if control is None else _energies("control", control, subspace),
        confidence,
    )


def _energies(name: str, gradients: GradientSet, subspace: Subspace) -> dict[str, LayerEnergy]:
    check_enough({name: len(gradients.samples)}, _FEWEST)
    if missing := set(subspace.layers) - set(shared_layers(*gradients.samples)):
        raise GeometryError(
            f"expected gradients of every parameter of the subspace, found none of {', '.join(sorted(missing)[:4])}; "
            "collect both with the same layers="
        )
    for layer, found in subspace.layers.items():
        _check_dimension(layer, gradients.samples[0][layer], found.basis.shape[0], subspace.side)
    return {
        layer: _energy([sample[layer] for sample in gradients.samples], subspace, layer) for layer in subspace.layers
    }


def _check_dimension(name: str, gradient: LayerGradient, dimension: int, side: Sides) -> None:
    found = gradient.matrix_shape[0 if side == "left" else 1]
    if found != dimension:
        raise GeometryError(
            f"expected gradients in the space of the subspace of {name}, found dimensions {found} and {dimension}; "
            "collect both from the same model"
        )


def _energy(samples: Sequence[LayerGradient], subspace: Subspace, name: str) -> LayerEnergy:
    basis = subspace.layers[name].basis.double()
    inside = [
        (sample.rmatmul(basis.T) if subspace.side == "left" else sample.matmul(basis)).square().sum().item()
        for sample in samples
    ]
    dimension, rank = basis.shape
    return LayerEnergy(rank, dimension, np.array(inside), np.array([sample.norm**2 for sample in samples]))


def _shares(layers: Mapping[str, LayerEnergy]) -> np.ndarray:
    inside, whole = (
        np.sum(parts, axis=0) for parts in zip(*((x.inside, x.whole) for x in layers.values()), strict=True)
    )
    return np.asarray(inside / whole)


def _mean_share(layer: LayerEnergy) -> float:
    some = layer.whole > 0
    return float(np.mean(layer.inside[some] / layer.whole[some])) if some.any() else float("nan")
