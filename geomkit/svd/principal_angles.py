"""Principal angles between the subspaces of two models' gradients, beside what random subspaces would show."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from geomkit.errors import GeometryError
from geomkit.inputs.parameters import kind_of, layer_index
from geomkit.svd.nulls import haar_overlap, random_edge
from geomkit.svd.singular_vectors import Side
from geomkit.svd.subspaces import LayerSubspace, Subspace
from geomkit.utils.display import counted, html_table
from geomkit.utils.figures import draw

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class LayerAngles:
    """The principal angles between two subspaces of one parameter.

    Attributes:
        parameter: Name of the parameter.
        angles: (min(k_a, k_b),) radians, descending as in :func:`scipy.linalg.subspace_angles`.
        ranks: k_a and k_b.
        dimension: d of the space they lie in.
        control: Overlap of a control set's subspace with the second one, NaN without a control.
    """

    parameter: str
    angles: np.ndarray = field(repr=False)
    ranks: tuple[int, int]
    dimension: int
    control: float = float("nan")

    @cached_property
    def overlap(self) -> float:
        """Mean squared cosine, ‖UᵀV‖_F² / min(k_a, k_b): 1 if one contains the other, 0 if orthogonal."""
        return float(np.mean(np.cos(self.angles) ** 2)) if len(self.angles) else float("nan")

    @property
    def expected_overlap(self) -> float:
        """The overlap of two uniformly random subspaces, see :func:`geomkit.svd.nulls.haar_overlap`.

        Gradients of one layer share their inputs' covariance and overlap more than that without any common content:
        compare with an empirical null as well, :attr:`control`.
        """
        return haar_overlap(*self.ranks, self.dimension)

    @property
    def largest_cosine(self) -> float:
        """The cosine of the smallest angle."""
        return float(np.cos(self.angles[-1])) if len(self.angles) else float("nan")

    @property
    def random_edge(self) -> float:
        """The largest cosine between uniformly random subspaces, see :func:`geomkit.svd.nulls.random_edge`."""
        return random_edge(*self.ranks, self.dimension)


@dataclass(frozen=True, eq=False)
class Angles:
    """The principal angles between two subspaces of a model's gradients.

    Attributes:
        side: Which singular vectors span them.
        layers: The angles of each parameter.
    """

    side: Side
    layers: Mapping[str, LayerAngles]

    @property
    def mean_overlap(self) -> float:
        """Plain mean of the overlap over the parameters where both subspaces have a direction."""
        return _mean([layer.overlap for layer in self.layers.values() if len(layer.angles)])

    @property
    def mean_expected_overlap(self) -> float:
        """The same mean of what uniformly random subspaces would show."""
        return _mean([layer.expected_overlap for layer in self.layers.values() if len(layer.angles)])

    @property
    def mean_control(self) -> float:
        """The same mean of the control's overlap with the second subspace; NaN without a control."""
        return _mean([layer.control for layer in self.layers.values() if len(layer.angles)])

    def to_frame(self) -> "pd.DataFrame":
        """Return a row per parameter and statistic.

        ``null`` is what uniformly random subspaces would show: :attr:`LayerAngles.expected_overlap` beside the
        overlap, :attr:`LayerAngles.random_edge` beside the largest cosine, nothing beside the angles (in degrees).
        ``control``, beside the overlap, is the overlap of a control set's subspace with the second one.
        """
        import pandas as pd

        return pd.DataFrame([row for layer in self.layers.values() for row in _rows(layer)])

    def plot(self) -> "go.Figure":
        """Draw it, see :func:`geomkit.plots.principal_angles.plot_angles`."""
        return draw("plot_angles", self)

    def __str__(self) -> str:
        """Say the mean overlap beside that of random subspaces, and of the control."""
        control = "" if np.isnan(self.mean_control) else f"control {self.mean_control:.3g}, "
        return (
            f"principal angles of {self.side} subspaces of {counted(len(self.layers), 'matrix', 'matrices')}: "
            f"mean overlap "
            f"{self.mean_overlap:.3g} ({control}random subspaces {self.mean_expected_overlap:.3g})"
        )

    def _repr_html_(self) -> str:
        return html_table(str(self), self.to_frame())


def _mean(values: list[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _rows(layer: LayerAngles) -> list[dict[str, object]]:
    degrees = np.degrees(layer.angles) if len(layer.angles) else np.array([np.nan])
    measured = {
        "overlap": (layer.overlap, layer.expected_overlap),
        "largest_cosine": (layer.largest_cosine, layer.random_edge),
        "smallest_angle": (float(degrees[-1]), float("nan")),
        "largest_angle": (float(degrees[0]), float("nan")),
    }
    return [
        {
            "parameter": layer.parameter,
            "kind": kind_of(layer.parameter),
            "layer": layer_index(layer.parameter),
            "statistic": statistic,
            "value": value,
            "null": null,
            "control": layer.control if statistic == "overlap" else float("nan"),
            "rank_a": layer.ranks[0],
            "rank_b": layer.ranks[1],
            "dimension": layer.dimension,
        }
        for statistic, (value, null) in measured.items()
    ]


def basis_angles(a: Tensor, b: Tensor) -> np.ndarray:
    """Return the principal angles between the column spaces of two bases, radians, descending.

    By sine where the angle is small and by cosine where it is large (Björck and Golub 1973), in fp64: two bases 1e-8
    apart come out 1e-8 apart. (``subspace_angles`` of scipy 1.17 chooses between the two in reverse order, so that a
    tiny angle beside a large one is lost.) Bases rounded to fp32 differ by about 1e-7 themselves.

    Args:
        a: (d, k_a) independent columns.
        b: (d, k_b) independent columns.

    Example:
        >>> import torch
        >>> angle = basis_angles(torch.eye(3)[:, :1], torch.tensor([[1.0], [1e-8], [0.0]]))
        >>> print(f"{angle[0]:.2e}")
        1.00e-08
    """
    frames = (np.linalg.qr(basis.detach().cpu().double().numpy()).Q for basis in (a, b))
    small, large = sorted(frames, key=lambda frame: frame.shape[1])
    across = large.T @ small
    cosines = np.linalg.svd(across, compute_uv=False)[::-1]
    sines = np.linalg.svd(small - large @ across, compute_uv=False)
    return np.asarray(np.where(cosines**2 >= 0.5, np.arcsin(np.minimum(sines, 1)), np.arccos(np.minimum(cosines, 1))))


def principal_angles(a: Subspace, b: Subspace, control: Subspace | None = None) -> Angles:
    """Measure the principal angles between two subspaces, parameter by parameter.

    Args:
        a: Subspaces of one gradient, from :func:`geomkit.svd.subspaces.subspace`.
        b: Subspaces of another gradient of the same model and side.
        control: Subspaces of a set that shares with ``a`` what the overlap should not come from, such as benign
            requests with the same refusals: its overlap with ``b`` is the empirical null. In each parameter it is that
            of as many leading directions as ``a`` has; where the control has fewer, there is none.

    Returns:
        The angles, with overlaps, their expectation for uniformly random subspaces, and the control's.

    Raises:
        GeometryError: If sides, parameters or dimensions differ.
    """
    for other in (b, *([control] if control else [])):
        _check(a, other)
    if a.side == "both":
        raise GeometryError(
            "expected subspaces of one side, found those of both; compare a.on('left') and b.on('left')"
        )
    return Angles(
        a.side,
        {
            name: _layer_angles(name, layer, b.layers[name], control.layers[name] if control else None)
            for name, layer in a.layers.items()
        },
    )


def _check(a: Subspace, b: Subspace) -> None:
    if a.side != b.side:
        raise GeometryError(f"expected subspaces of one side, found {a.side} and {b.side}; build both with one side=")
    if difference := set(a.layers).symmetric_difference(b.layers):
        some = ", ".join(sorted(difference)[:4])
        raise GeometryError(
            f"expected subspaces of the same parameters, found {len(difference)} on one side only ({some}); "
            "collect both gradients with the same layers="
        )
    for name, layer in a.layers.items():
        if layer.basis.shape[0] != b.layers[name].basis.shape[0]:
            raise GeometryError(
                f"expected subspaces of one space for {name}, found dimensions {layer.basis.shape[0]} and "
                f"{b.layers[name].basis.shape[0]}; collect both gradients from the same model"
            )


def _layer_angles(name: str, a: LayerSubspace, b: LayerSubspace, control: LayerSubspace | None) -> LayerAngles:
    angles = basis_angles(a.basis, b.basis)
    measured = LayerAngles(name, angles, (a.rank, b.rank), a.basis.shape[0])
    # An overlap at another rank would not compare.
    if control is None or control.rank < a.rank:
        return measured
    beside = LayerAngles(name, basis_angles(control.basis[:, : a.rank], b.basis), measured.ranks, measured.dimension)
    return replace(measured, control=beside.overlap)
