"""Whether one safety example is enough to estimate the dominant safety directions.

Each anchor's subspace is compared with that of the mean gradient of the *other* anchors; with itself in the mean,
the overlap of an anchor would be high by construction. The null is what control examples show against the same means.
Which controls, decides what the comparison says: against unrelated examples, an overlap may come from the refusal's
wording alone; against benign requests answered with the same refusal, what is left is due to the forbidden request.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from geomkit._display import html_table
from geomkit._leave_one_out import bases_without_each
from geomkit.controls import haar_overlap
from geomkit.errors import GeometryError
from geomkit.gradients import GradientSet, shared_layers
from geomkit.layer_gradient import LayerGradient
from geomkit.names import kind_of, layer_index
from geomkit.resampling import bootstrap_interval
from geomkit.subspaces import Side, layer_subspace

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_LOGGER = logging.getLogger(__name__)
_FEWEST = 3  # the mean of the others must be a mean


@dataclass(frozen=True, eq=False)
class LayerOneSample:
    """Overlaps of single examples with the mean safety gradient in one parameter.

    Attributes:
        parameter: Name of the parameter.
        rank: k, the same for every subspace of this parameter so that all overlaps compare.
        dimension: d of the space.
        overlaps: (N,) ‖UᵀV‖_F²/k of each anchor with the mean of the others.
        null: (M,) the same of each control.
    """

    parameter: str
    rank: int
    dimension: int
    overlaps: np.ndarray = field(repr=False)
    null: np.ndarray = field(repr=False)

    @property
    def expected(self) -> float:
        """The overlap of uniformly random subspaces, k/d."""
        return haar_overlap(self.rank, self.rank, self.dimension)


@dataclass(frozen=True, eq=False)
class OneSample:
    """How much of the mean safety subspace single examples find.

    Attributes:
        side: Which singular vectors span the subspaces.
        rank: The rank asked for; ``layers`` has the one each parameter allowed.
        overlaps: (N,) one per anchor, mean over parameters.
        interval: Bootstrap interval of their mean, over anchors.
        null: (M,) one per control, against the same safety means.
        null_interval: Bootstrap interval of the mean of the null, over controls.
        layers: The same for each parameter.
        confidence: Of both intervals.
    """

    side: Side
    rank: int
    overlaps: np.ndarray = field(repr=False)
    interval: tuple[float, float]
    null: np.ndarray = field(repr=False)
    null_interval: tuple[float, float]
    layers: Mapping[str, LayerOneSample] = field(repr=False)
    confidence: float = 0.95

    @property
    def overlap(self) -> float:
        """Mean overlap of the anchors."""
        return float(self.overlaps.mean())

    @property
    def null_mean(self) -> float:
        """Mean overlap of the controls."""
        return float(self.null.mean())

    @property
    def expected(self) -> float:
        """Mean over parameters of what uniformly random subspaces would show."""
        return float(np.mean([layer.expected for layer in self.layers.values()]))

    def to_frame(self) -> "pd.DataFrame":
        """Return a row per parameter: its rank, mean overlap, its spread over anchors, and both nulls."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "parameter": name,
                    "kind": kind_of(name),
                    "layer": layer_index(name),
                    "rank": layer.rank,
                    "dimension": layer.dimension,
                    "overlap": float(layer.overlaps.mean()),
                    "lowest": float(layer.overlaps.min()),
                    "highest": float(layer.overlaps.max()),
                    "null": float(layer.null.mean()),
                    "expected": layer.expected,
                }
                for name, layer in self.layers.items()
            ]
        )

    def plot(self) -> "go.Figure":
        """Draw it, see :func:`geomkit.plots.plot_one_sample`."""
        from geomkit.plots import plot_one_sample

        return plot_one_sample(self)

    def __str__(self) -> str:
        """Say the mean overlap beside both nulls."""
        (low, high), (null_low, null_high) = self.interval, self.null_interval
        return (
            f"one of {len(self.overlaps)} anchors against the mean of the others, {self.side}-{self.rank}: overlap "
            f"{self.overlap:.3f} [{low:.3f}, {high:.3f}], controls {self.null_mean:.3f} "
            f"[{null_low:.3f}, {null_high:.3f}], random subspaces {self.expected:.3f}"
        )

    def _repr_html_(self) -> str:
        return html_table(str(self), self.to_frame())


def one_sample_study(
    safety: GradientSet,
    control: GradientSet,
    *,
    rank: int = 10,
    side: Side = "left",
    seed: int = 0,
    confidence: float = 0.95,
) -> OneSample:
    """Compare the subspace of every single safety example with that of the mean of the others.

    The rank of a parameter is the smallest of ``rank`` and the numeric ranks of all its gradients here, and the same
    for anchors, means and controls: overlaps at different ranks do not compare. Controls should be
    of similar length; see :func:`geomkit.token_matching.subsample_tokens`. A parameter in which some example has no
    gradient is left out.

    Args:
        safety: N ≥ 3 anchors, collected with ``per_sample=True``.
        control: M ≥ 3 other examples, collected with ``per_sample=True``; each meets one of the same N means. Benign
            requests with the same refusals (:func:`geomkit.control_sets.with_responses`) are the strict choice.
        rank: How many directions to compare, at most.
        side: ``"left"`` for the output space, ``"right"`` for the input space.
        seed: Seed of the bootstrap.
        confidence: Of both intervals. They speak of other single examples against these means: the means are taken
            as given, though the overlaps share them.

    Returns:
        The overlaps, one for each anchor and each control.

    Raises:
        GeometryError: If a set lacks per-sample gradients, has fewer than three, covers other parameters, or no
            parameter has a gradient in every example.
    """
    for name, found in (("safety", safety), ("control", control)):
        if len(found.samples) < _FEWEST:
            raise GeometryError(
                f"expected at least {_FEWEST} per-sample gradients in the {name} set, found {len(found.samples)}; "
                "collect more, with per_sample=True"
            )
    names = shared_layers(*safety.samples, *control.samples)
    layers = {}
    for name in (name for name in names if min(safety.samples[0][name].matrix_shape) > 1):
        anchors, others = ([sample[name] for sample in found.samples] for found in (safety, control))
        if measured := _study_layer(name, anchors, others, rank, side):
            layers[name] = measured
        else:
            _LOGGER.warning("left %s out of the one-sample study: an example has no gradient there", name)
    if not layers:
        raise GeometryError("expected a matrix with a gradient in every example, found none; check the loss masks")
    overlaps = np.mean([layer.overlaps for layer in layers.values()], axis=0)
    null = np.mean([layer.null for layer in layers.values()], axis=0)
    generator = np.random.default_rng(seed)
    intervals = [bootstrap_interval(values, generator, confidence) for values in (overlaps, null)]
    return OneSample(side, rank, overlaps, intervals[0], null, intervals[1], layers, confidence)


def _study_layer(
    name: str, anchors: Sequence[LayerGradient], controls: Sequence[LayerGradient], rank: int, side: Side
) -> LayerOneSample | None:
    mean = bases_without_each(anchors, rank, side)
    single, other = (
        [layer_subspace(part, rank=rank, side=side).basis for part in parts] for parts in (anchors, controls)
    )
    kept = min(basis.shape[1] for basis in (*mean, *single, *other))
    if not kept:
        return None
    return LayerOneSample(
        parameter=name,
        rank=kept,
        dimension=mean[0].shape[0],
        overlaps=np.array([_overlap(a, b, kept) for a, b in zip(single, mean, strict=True)]),
        null=np.array([_overlap(basis, mean[place % len(mean)], kept) for place, basis in enumerate(other)]),
    )


def _overlap(a: Tensor, b: Tensor, rank: int) -> float:
    return float((a[:, :rank].double().T @ b[:, :rank].double()).square().sum()) / rank
