"""Principal angles between the subspaces of two sets of gradients, with their values for random subspaces."""

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
from geomkit.utils.display import counted
from geomkit.utils.figures import DrawnResult, draw

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class LayerAngles:
    """The principal angles between two subspaces of one parameter.

    Attributes:
        parameter: Name of the parameter.
        angles: (min(k_a, k_b),) radians, descending as in :func:`scipy.linalg.subspace_angles`.
        ranks: The dimensions k_a and k_b of the subspaces.
        dimension: d, the dimension of the space around them.
        control: Overlap of a control set's subspace with the second subspace; NaN without a control.
    """

    parameter: str
    angles: np.ndarray = field(repr=False)
    ranks: tuple[int, int]
    dimension: int
    control: float = float("nan")

    @cached_property
    def overlap(self) -> float:
        """Mean squared cosine ‖UᵀV‖_F² / min(k_a, k_b): 1 if one subspace contains the other, 0 if orthogonal."""
        return float(np.mean(np.cos(self.angles) ** 2)) if len(self.angles) else float("nan")

    @property
    def expected_overlap(self) -> float:
        """Expected overlap of two uniformly random subspaces, see :func:`geomkit.svd.nulls.haar_overlap`.

        Gradients of one layer share their inputs' covariance and overlap more than random subspaces without any common
        content: compare with the empirical null :attr:`control` as well.
        """
        return haar_overlap(*self.ranks, self.dimension)

    @property
    def largest_cosine(self) -> float:
        """Cosine of the smallest angle."""
        return float(np.cos(self.angles[-1])) if len(self.angles) else float("nan")

    @property
    def random_edge(self) -> float:
        """Largest cosine between uniformly random subspaces, see :func:`geomkit.svd.nulls.random_edge`."""
        return random_edge(*self.ranks, self.dimension)


@dataclass(frozen=True, eq=False)
class Angles(DrawnResult):
    """The principal angles between two subspaces of every parameter of a model.

    Attributes:
        side: Side of the singular vectors that span the subspaces.
        layers: The angles of every parameter.
    """

    side: Side
    layers: Mapping[str, LayerAngles]

    @property
    def mean_overlap(self) -> float:
        """Unweighted mean of the overlap over the parameters where both subspaces have a dimension of at least 1."""
        return _mean([layer.overlap for layer in self.layers.values() if len(layer.angles)])

    @property
    def mean_expected_overlap(self) -> float:
        """Mean expected overlap of uniformly random subspaces, over the parameters of :attr:`mean_overlap`."""
        return _mean([layer.expected_overlap for layer in self.layers.values() if len(layer.angles)])

    @property
    def mean_control(self) -> float:
        """Mean overlap of the control with the second subspace, over the same parameters; NaN without a control."""
        return _mean([layer.control for layer in self.layers.values() if len(layer.angles)])

    def to_frame(self) -> "pd.DataFrame":
        """Return a data frame with one row per parameter and statistic.

        ``null`` is the value for uniformly random subspaces: :attr:`LayerAngles.expected_overlap` for the overlap,
        :attr:`LayerAngles.random_edge` for the largest cosine, NaN for the angles (in degrees). ``control`` is, for the
        overlap, the overlap of a control set's subspace with the second subspace.
        """
        import pandas as pd

        return pd.DataFrame([row for layer in self.layers.values() for row in _rows(layer)])

    def shown_frame(self) -> "pd.DataFrame":
        """Return a data frame with one row per statistic: the means over parameters."""
        means = self.to_frame().groupby("statistic", sort=False)[["value", "null", "control"]].mean()
        return means.rename_axis("mean over parameters of").reset_index()

    def plot(self) -> "go.Figure":
        """Draw the angles and overlaps, see :func:`geomkit.plots.principal_angles.plot_angles`."""
        return draw("plot_angles", self)

    def __str__(self) -> str:
        """Return the mean overlap, with its values for the control and for random subspaces."""
        control = "" if np.isnan(self.mean_control) else f"control {self.mean_control:.3g}, "
        return (
            f"principal angles of {self.side} subspaces of {counted(len(self.layers), 'matrix', 'matrices')}: "
            f"mean overlap {self.mean_overlap:.3g} ({control}random subspaces {self.mean_expected_overlap:.3g})"
        )


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

    Small angles are computed from their sines, large angles from their cosines (Björck and Golub 1973), in fp64: an
    angle of 1e-8 is exact. (``subspace_angles`` of scipy 1.17 pairs the two in reverse order, so that a tiny angle
    is lost if there is a large angle.) Bases rounded to fp32 are about 1e-7 off.

    Args:
        a: (d, k_a) independent columns.
        b: (d, k_b) independent columns.

    Returns:
        (min(k_a, k_b),) fp64.

    Example:
        >>> import torch
        >>> angle = basis_angles(torch.eye(3)[:, :1], torch.tensor([[1.0], [1e-8], [0.0]]))
        >>> print(f"{angle[0]:.2e}")
        1.00e-08
    """
    bases = (np.linalg.qr(basis.detach().cpu().double().numpy()).Q for basis in (a, b))
    small, large = sorted(bases, key=lambda basis: basis.shape[1])
    # 1. Cosines: the singular values of LᵀS, with the larger basis L and the smaller S; ascending, so that the angles
    #    descend.
    projection = large.T @ small
    cosines = np.linalg.svd(projection, compute_uv=False)[::-1]
    # 2. Sines: the singular values of the part of S outside of L, S − LLᵀS, descending.
    sines = np.linalg.svd(small - large @ projection, compute_uv=False)
    # 3. Below 45° the sine changes more with the angle, above 45° the cosine.
    return np.asarray(np.where(cosines**2 >= 0.5, np.arcsin(np.minimum(sines, 1)), np.arccos(np.minimum(cosines, 1))))


def principal_angles(a: Subspace, b: Subspace, control: Subspace | None = None) -> Angles:
    """Measure the principal angles between two subspaces, parameter by parameter.

    Args:
        a: Subspaces of one gradient set, from :func:`geomkit.svd.subspaces.subspace`.
        b: Subspaces of another gradient set, of the same model and side.
        control: Subspaces of a set that shares with ``a`` the trivial causes of an overlap, such as benign requests
            with the same refusals: the control's overlap with ``b`` is the empirical null. It is taken at the rank of
            ``a``, parameter by parameter, and is NaN where the control has a lower rank.

    Returns:
        The angles and overlaps of every parameter, with the overlaps of uniformly random subspaces and of the control.

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
    """Raise GeometryError unless the subspaces have the same side, parameters and dimensions."""
    if a.side != b.side:
        raise GeometryError(f"expected subspaces of one side, found {a.side} and {b.side}; build both with one side=")
    if difference := set(a.layers).symmetric_difference(b.layers):
        names = ", ".join(sorted(difference)[:4])
        raise GeometryError(
            f"expected subspaces of the same parameters, found {len(difference)} on one side only ({names}); "
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
    layer = LayerAngles(name, angles, (a.rank, b.rank), a.basis.shape[0])
    # Overlaps at different ranks do not compare.
    if control is None or control.rank < a.rank:
        return layer
    control_angles = basis_angles(control.basis[:, : a.rank], b.basis)
    return replace(layer, control=LayerAngles(name, control_angles, layer.ranks, layer.dimension).overlap)
