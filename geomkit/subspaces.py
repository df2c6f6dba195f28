"""The subspaces that the leading singular vectors of a gradient span."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from geomkit._display import html_table
from geomkit.errors import GeometryError
from geomkit.forms import IndexedGradient
from geomkit.gradients import GradientSet
from geomkit.layer_gradient import LayerGradient, thin_factors
from geomkit.names import kind_of, layer_index
from geomkit.svd import energy_rank, rank_tolerance

if TYPE_CHECKING:
    import pandas as pd

    from geomkit.provenance import Provenance

Side = Literal["left", "right"]
"""Left vectors live in the layer's output space, right vectors in its input space."""

Leading = Callable[[int], Tensor]

_STRIP = 4096
"""Rows of a tall matrix that are decomposed at a time."""


@dataclass(frozen=True, eq=False)
class LayerSubspace:
    """The leading singular vectors of one gradient.

    Attributes:
        basis: (d, k) orthonormal columns, fp32, on the gradient's device; d is the number of rows for the left side
            and of columns for the right side.
        singular_values: (k,) fp64, descending.
        energy: Share of the gradient's squared norm that lies in the subspace.
        numeric_rank: How many directions the gradient has at all, see :func:`geomkit.svd.rank_tolerance`.
        parameter: Name of the parameter.
    """

    basis: Tensor = field(repr=False)
    singular_values: np.ndarray = field(repr=False)
    energy: float
    numeric_rank: int
    parameter: str = ""

    @property
    def rank(self) -> int:
        """k, the dimension of the subspace."""
        return self.basis.shape[1]


def layer_subspace(
    gradient: LayerGradient,
    *,
    rank: int | None = None,
    energy: float | None = None,
    side: Side = "left",
    parameter: str = "",
) -> LayerSubspace:
    """Return the leading singular vectors of one gradient; with few tokens it is never formed.

    Args:
        gradient: Gradient of a matrix; T tokens cost a QR of each thin factor and the SVD of a T × T matrix.
        rank: How many vectors, if the gradient has as many; never more than its numeric rank.
        energy: Or: as many as hold this share of the squared norm.
        side: ``"left"`` for the output space, ``"right"`` for the input space.
        parameter: Name to keep with the result.

    Returns:
        The subspace, of rank 0 for a zero gradient.

    Raises:
        GeometryError: If not exactly one of ``rank`` and ``energy`` is given, or it is out of range.

    Example:
        >>> from geomkit.forms import FactoredGradient
        >>> found = layer_subspace(FactoredGradient(torch.eye(2, 5), torch.eye(2, 4)), rank=3)
        >>> found.basis.shape, found.rank, found.energy
        (torch.Size([5, 2]), 2, 1.0)
    """
    if (rank is None) == (energy is None):
        raise GeometryError(f"expected exactly one of rank and energy, found rank={rank}, energy={energy}; give one")
    if rank is not None and rank < 1:
        raise GeometryError(f"expected a rank of at least 1, found {rank}; give e.g. 10")
    values, leading = _decomposed(gradient, side)
    values = values[: gradient.rank_bound]
    numeric_rank = int((values > rank_tolerance(values, gradient.matrix_shape)).sum())
    wanted = rank if energy is None else energy_rank(values, energy)
    kept = min(wanted or 0, numeric_rank)
    share = float((values[:kept] ** 2).sum() / (values**2).sum()) if kept else 0.0
    return LayerSubspace(leading(kept).float().contiguous(), values[:kept].copy(), share, numeric_rank, parameter)


def _decomposed(gradient: LayerGradient, side: Side) -> tuple[np.ndarray, Leading]:
    """Return the singular values, and a function from k to the first k vectors of one side, columns in fp64."""
    if isinstance(gradient, IndexedGradient):
        return _from_rows(gradient, side)
    if factors := thin_factors(gradient):
        return _from_factors(*(factors if side == "left" else factors[::-1]))
    rows, columns = gradient.matrix_shape
    if rows > 2 * columns:
        return _from_strips(gradient, side)
    matrix = gradient.take(slice(None))
    vectors, values = _from_matrix(matrix if side == "left" else matrix.T)
    return values, lambda k: vectors[:, :k]


def _from_rows(gradient: IndexedGradient, side: Side) -> tuple[np.ndarray, Leading]:
    rows = gradient.rows.double()
    vectors, values = _from_matrix(rows if side == "left" else rows.T)
    if side == "right":
        return values, lambda k: vectors[:, :k]
    return values, lambda k: vectors.new_zeros(gradient.size, k).index_copy_(0, gradient.indices, vectors[:, :k])


def _from_factors(own: Tensor, other: Tensor) -> tuple[np.ndarray, Leading]:
    frame, triangle = torch.linalg.qr(own.double().T)
    vectors, values = _from_matrix(triangle @ torch.linalg.qr(other.double().T, mode="r").R.T)
    return values, lambda k: frame @ vectors[:, :k]


def _from_strips(gradient: LayerGradient, side: Side) -> tuple[np.ndarray, Leading]:
    """Decompose a tall matrix from the triangle of its QR, which needs some of its rows at a time only."""
    rows, columns = gradient.matrix_shape
    triangle = torch.zeros(0, columns, dtype=torch.float64, device=gradient.device)
    step = max(_STRIP, columns)
    for start in range(0, rows, step):
        strip = torch.cat([triangle, gradient.take(slice(start, start + step))])
        triangle = torch.linalg.qr(strip, mode="r").R
    vectors, values = _from_matrix(triangle.T)
    if side == "right":
        return values, lambda k: vectors[:, :k]
    return values, lambda k: gradient.matmul(vectors[:, :k]) / torch.from_numpy(values[:k]).to(gradient.device)


def _from_matrix(matrix: Tensor) -> tuple[Tensor, np.ndarray]:
    vectors, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return vectors, values.cpu().numpy()


@dataclass(frozen=True, eq=False)
class Subspace:
    """The leading singular subspace of every matrix gradient of a model.

    Attributes:
        side: Which singular vectors, ``"left"`` or ``"right"``.
        layers: A subspace for each parameter.
        provenance: What the gradients were collected from.
    """

    side: Side
    layers: Mapping[str, LayerSubspace]
    provenance: "Provenance | None" = field(default=None, repr=False)

    def to_frame(self) -> "pd.DataFrame":
        """Return a row per parameter: ``rank`` of ``numeric_rank`` in ``dimension``, and the ``energy`` it holds."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "parameter": name,
                    "kind": kind_of(name),
                    "layer": layer_index(name),
                    "side": self.side,
                    "dimension": layer.basis.shape[0],
                    "rank": layer.rank,
                    "numeric_rank": layer.numeric_rank,
                    "energy": layer.energy,
                }
                for name, layer in self.layers.items()
            ]
        )

    def __str__(self) -> str:
        """Say how many subspaces of which rank."""
        ranks = [layer.rank for layer in self.layers.values()]
        span = f"{min(ranks)} to {max(ranks)}" if len(set(ranks)) > 1 else f"{ranks[0]}" if ranks else "0"
        return f"{self.side} subspaces of {len(ranks)} matrices, rank {span}"

    def save(self, folder: str | Path) -> Path:
        """Write it to a folder, from which :func:`geomkit.load_subspace` reads it without the model.

        Args:
            folder: Where to. A subspace saved there before is replaced in one step; other files are left alone.

        Returns:
            The folder.
        """
        from geomkit.storage import save_subspace

        return save_subspace(self, folder)

    def _repr_html_(self) -> str:
        return html_table(str(self), self.to_frame())


def subspace(
    gradients: Mapping[str, LayerGradient],
    *,
    rank: int | None = None,
    energy: float | None = None,
    side: Side = "left",
) -> Subspace:
    """Return the leading singular subspace of every matrix gradient.

    Args:
        gradients: Gradients by parameter, such as a :class:`~geomkit.gradients.GradientSet`; vectors are left out.
        rank: How many directions to take. A gradient of fewer gives what it has, with a warning: singular vectors
            beyond the numeric rank are rounding noise.
        energy: Or: as many as hold this share of the squared norm, which differs between parameters.
        side: ``"left"`` for the output space, ``"right"`` for the input space.

    Returns:
        A subspace for each matrix parameter.

    Raises:
        GeometryError: If not exactly one of ``rank`` and ``energy`` is given, or it is out of range.

    Warns:
        UserWarning: Once, if some gradients have a numeric rank below ``rank``.
    """
    layers = {
        name: layer_subspace(gradient, rank=rank, energy=energy, side=side, parameter=name)
        for name, gradient in gradients.items()
        if min(gradient.matrix_shape) > 1
    }
    short = [layer for layer in layers.values() if rank is not None and layer.rank < rank]
    if short:
        worst = min(short, key=lambda layer: layer.rank)
        warnings.warn(
            f"expected rank {rank}, found less in {len(short)} of {len(layers)} gradients (lowest: {worst.rank} in "
            f"{worst.parameter}); took what they have, lower rank= or use more tokens for equal ranks",
            UserWarning,
            stacklevel=2,
        )
    return Subspace(side, layers, gradients.provenance if isinstance(gradients, GradientSet) else None)
