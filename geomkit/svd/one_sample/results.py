"""What a study of single examples found: groups of examples against the mean safety gradient, and how they differ."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from geomkit.inputs.parameters import kind_of, layer_index
from geomkit.svd.nulls import haar_overlap
from geomkit.svd.one_sample.leave_one_out import Estimate, Interval
from geomkit.svd.singular_vectors import Side
from geomkit.utils.display import html_table, signed
from geomkit.utils.figures import draw

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_ALL = "all parameters"


@dataclass(frozen=True, eq=False)
class Group:
    """What the single examples of one set find of the mean safety gradient.

    Attributes:
        overlaps: (M,) of each example's subspace with that of a mean, ‖UᵀV‖_F²/k.
        cosines: (M,) of each example's gradient with that mean.
        overlap: Their mean over examples, and by how much the anchors' is above it.
        cosine: The same of the cosines.
    """

    overlaps: np.ndarray = field(repr=False)
    cosines: np.ndarray = field(repr=False)
    overlap: Estimate
    cosine: Estimate


@dataclass(frozen=True, eq=False)
class LayerOneSample:
    """Single examples against the mean safety gradient in one parameter.

    Attributes:
        parameter: Name of the parameter.
        rank: k, the same for every subspace of this parameter so that all overlaps compare.
        dimension: d of the space.
        groups: The anchors as ``"safety"``, then the controls.
    """

    parameter: str
    rank: int
    dimension: int
    groups: Mapping[str, Group]

    @property
    def expected(self) -> float:
        """The overlap of uniformly random subspaces, k/d."""
        return haar_overlap(self.rank, self.rank, self.dimension)


@dataclass(frozen=True, eq=False)
class OneSample:
    """How much of the mean safety gradient single examples find.

    Attributes:
        side: Which singular vectors span the subspaces.
        rank: The rank asked for; ``layers`` has the one each parameter allowed.
        groups: The anchors as ``"safety"``, then the controls: overlaps as means over parameters, cosines of the whole
            gradients.
        layers: The same for each parameter.
        confidence: Of all intervals.
    """

    side: Side
    rank: int
    groups: Mapping[str, Group] = field(repr=False)
    layers: Mapping[str, LayerOneSample] = field(repr=False)
    confidence: float = 0.95

    @property
    def controls(self) -> dict[str, Group]:
        """The groups that are not the anchors."""
        return {name: group for name, group in self.groups.items() if name != "safety"}

    @property
    def overlaps(self) -> np.ndarray:
        """(N,) overlaps, one per anchor, mean over parameters."""
        return self.groups["safety"].overlaps

    @property
    def overlap(self) -> float:
        """Mean overlap of the anchors."""
        return self.groups["safety"].overlap.value

    @property
    def interval(self) -> Interval:
        """Interval of the anchors' mean overlap."""
        return self.groups["safety"].overlap.interval

    @property
    def null(self) -> np.ndarray:
        """(M,) overlaps of the first control, one per example."""
        return self._first.overlaps

    @property
    def null_mean(self) -> float:
        """Mean overlap of the first control."""
        return self._first.overlap.value

    @property
    def null_interval(self) -> Interval:
        """Interval of the first control's mean overlap."""
        return self._first.overlap.interval

    @property
    def contrast(self) -> float:
        """By how much the anchors' mean overlap is above the first control's."""
        return self._first.overlap.contrast

    @property
    def contrast_interval(self) -> Interval:
        """Interval of that contrast."""
        return self._first.overlap.contrast_interval

    @property
    def expected(self) -> float:
        """Mean over parameters of what uniformly random subspaces would show."""
        return float(np.mean([layer.expected for layer in self.layers.values()]))

    @property
    def _first(self) -> Group:
        return next(iter(self.controls.values()))

    def to_frame(self) -> "pd.DataFrame":
        """Return a row per parameter, group and statistic, those of all parameters together first.

        ``value`` with its interval ``low`` to ``high``, ``contrast`` (safety − group) with ``contrast_low`` to
        ``contrast_high``, and ``null``: what uniformly random subspaces or gradients would show.
        """
        import pandas as pd

        rows = _rows(_ALL, self.groups, self.expected)
        for name, layer in self.layers.items():
            rows += [
                {**row, "rank": layer.rank, "dimension": layer.dimension}
                for row in _rows(name, layer.groups, layer.expected)
            ]
        return pd.DataFrame(rows)

    def plot(self) -> "go.Figure":
        """Draw it, see :func:`geomkit.plots.principal_angles.plot_one_sample`."""
        return draw("plot_one_sample", self)

    def __str__(self) -> str:
        """Say the mean overlap beside that of each control with the contrasts, and the cosine beside the first's."""
        first = next(iter(self.controls))
        return (
            f"one of {len(self.overlaps)} anchors against the mean of the others, {self.side}-{self.rank}: overlap "
            f"{self._said('overlap', list(self.controls))}; random subspaces {self.expected:.3f}; cosine "
            f"{self._said('cosine', [first])}"
        )

    def _said(self, statistic: str, controls: list[str]) -> str:
        found: dict[str, Estimate] = {name: getattr(group, statistic) for name, group in self.groups.items()}
        beside = [
            f"{name} {found[name]}, contrast {found[name].contrast:+.3f} {signed(found[name].contrast_interval)}"
            for name in controls
        ]
        return "; ".join([str(found["safety"]), *beside])

    def _repr_html_(self) -> str:
        return html_table(str(self), self.to_frame())


def _rows(parameter: str, groups: Mapping[str, Group], expected: float) -> list[dict[str, object]]:
    return [
        {
            "parameter": parameter,
            "kind": "all" if parameter == _ALL else kind_of(parameter),
            "layer": layer_index(parameter),
            "group": name,
            "statistic": statistic,
            "value": found.value,
            "low": found.interval[0],
            "high": found.interval[1],
            "contrast": found.contrast,
            "contrast_low": found.contrast_interval[0],
            "contrast_high": found.contrast_interval[1],
            "null": null,
        }
        for name, group in groups.items()
        for statistic, found, null in (("overlap", group.overlap, expected), ("cosine", group.cosine, 0.0))
    ]
