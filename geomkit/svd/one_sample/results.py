"""Results of a study of single examples: overlaps and cosines with the mean safety gradient, by group and parameter."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from geomkit.inputs.parameters import ALL_PARAMETERS, kind_of, layer_index
from geomkit.stats.jackknife import Interval
from geomkit.svd.nulls import haar_overlap
from geomkit.svd.one_sample.leave_one_out import GroupMean
from geomkit.svd.singular_vectors import Side
from geomkit.utils.display import signed
from geomkit.utils.figures import DrawnResult, draw

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class Group:
    """Agreement of the single examples of one set with the mean safety gradient.

    Attributes:
        overlaps: (M,) overlap ‖UᵀV‖_F²/k of each example's leading subspace with the leading subspace of the mean of
            the other anchors.
        cosines: (M,) cosine of each example's gradient with the mean gradient of the other anchors.
        overlap: Mean of ``overlaps``, and its contrast to the anchors' mean overlap.
        cosine: Mean of ``cosines``, and its contrast to the anchors' mean cosine.
    """

    overlaps: np.ndarray = field(repr=False)
    cosines: np.ndarray = field(repr=False)
    overlap: GroupMean
    cosine: GroupMean


@dataclass(frozen=True, eq=False)
class LayerOneSample:
    """Agreement of single examples with the mean safety gradient in one parameter.

    Attributes:
        parameter: Name of the parameter.
        rank: k, the same for every subspace of this parameter, so that all overlaps compare.
        dimension: d, the dimension of the space of the singular vectors.
        groups: The anchors as ``"safety"``, then the controls.
    """

    parameter: str
    rank: int
    dimension: int
    groups: Mapping[str, Group]

    @property
    def expected(self) -> float:
        """Expected overlap of uniformly random subspaces, k/d."""
        return haar_overlap(self.rank, self.rank, self.dimension)


@dataclass(frozen=True, eq=False)
class OneSample(DrawnResult):
    """Agreement of single examples with the mean safety gradient.

    Attributes:
        side: Side whose singular vectors span the subspaces, ``"left"`` or ``"right"``.
        rank: The requested rank; each of ``layers`` has the rank that its parameter allowed.
        groups: The anchors as ``"safety"``, then the controls, with overlaps as means over parameters and cosines of
            the whole gradients.
        layers: The agreement in each parameter.
        confidence: Nominal coverage of all intervals.
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
        """(N,) overlap of each anchor, mean over parameters."""
        return self.groups["safety"].overlaps

    @property
    def overlap(self) -> float:
        """Mean overlap of the anchors."""
        return self.groups["safety"].overlap.value

    @property
    def interval(self) -> Interval:
        """Confidence interval of the anchors' mean overlap."""
        return self.groups["safety"].overlap.interval

    @property
    def control_overlaps(self) -> np.ndarray:
        """(M,) overlap of each example of the first control, mean over parameters."""
        return self._first_control.overlaps

    @property
    def control_overlap(self) -> float:
        """Mean overlap of the first control."""
        return self._first_control.overlap.value

    @property
    def control_interval(self) -> Interval:
        """Confidence interval of the first control's mean overlap."""
        return self._first_control.overlap.interval

    @property
    def contrast(self) -> float:
        """The anchors' mean overlap minus the first control's."""
        return self._first_control.overlap.contrast

    @property
    def contrast_interval(self) -> Interval:
        """Confidence interval of the contrast to the first control."""
        return self._first_control.overlap.contrast_interval

    @property
    def expected(self) -> float:
        """Expected overlap of uniformly random subspaces, mean over parameters."""
        return float(np.mean([layer.expected for layer in self.layers.values()]))

    @property
    def _first_control(self) -> Group:
        return next(iter(self.controls.values()))

    def to_frame(self) -> "pd.DataFrame":
        """Return a data frame with one row per parameter, group and statistic, first for all parameters together.

        ``value`` has the interval ``low`` to ``high``, ``contrast`` (safety − group) the interval ``contrast_low`` to
        ``contrast_high``, and ``null`` is the expected value of uniformly random subspaces or gradients.
        """
        import pandas as pd

        rows = _rows(ALL_PARAMETERS, self.groups, self.expected)
        for name, layer in self.layers.items():
            rows += [
                {**row, "rank": layer.rank, "dimension": layer.dimension}
                for row in _rows(name, layer.groups, layer.expected)
            ]
        return pd.DataFrame(rows)

    def shown_frame(self) -> "pd.DataFrame":
        """Return the rows of the data frame for all parameters together, without the safety set's own contrast."""
        frame = self.to_frame()
        rows = frame[frame["parameter"] == ALL_PARAMETERS].drop(columns=["parameter", "kind", "layer"])
        contrast = ["contrast", "contrast_low", "contrast_high"]
        return rows.assign(**{name: rows[name].where(rows["group"] != "safety") for name in contrast})

    def plot(self) -> "go.Figure":
        """Draw the overlaps, see :func:`geomkit.plots.one_sample.plot_one_sample`."""
        return draw("plot_one_sample", self)

    def __str__(self) -> str:
        """Return the overlaps of anchors and controls with contrasts, and the cosines of anchors and first control."""
        first = next(iter(self.controls))
        return (
            f"one of {len(self.overlaps)} anchors against the mean of the others, {self.side}-{self.rank}: overlap "
            f"{self._text('overlap', list(self.controls))}; random subspaces {self.expected:.3f}; cosine "
            f"{self._text('cosine', [first])}"
        )

    def _text(self, statistic: str, controls: list[str]) -> str:
        """Return the anchors' estimate of a statistic and the estimates of controls, with contrasts, as text."""
        estimates: dict[str, GroupMean] = {name: getattr(group, statistic) for name, group in self.groups.items()}
        parts = [str(estimates["safety"])]
        for name in controls:
            estimate = estimates[name]
            contrast = f"contrast {estimate.contrast:+.3f} {signed(estimate.contrast_interval)}"
            parts.append(f"{name} {estimate}, {contrast}")
        return "; ".join(parts)


def _rows(parameter: str, groups: Mapping[str, Group], expected: float) -> list[dict[str, object]]:
    return [
        {
            "parameter": parameter,
            "kind": "all" if parameter == ALL_PARAMETERS else kind_of(parameter),
            "layer": layer_index(parameter),
            "group": name,
            "statistic": statistic,
            "value": estimate.value,
            "low": estimate.interval[0],
            "high": estimate.interval[1],
            "contrast": estimate.contrast,
            "contrast_low": estimate.contrast_interval[0],
            "contrast_high": estimate.contrast_interval[1],
            "null": null,
        }
        for name, group in groups.items()
        for statistic, estimate, null in (("overlap", group.overlap, expected), ("cosine", group.cosine, 0.0))
    ]
