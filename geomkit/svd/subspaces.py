"""Subspaces spanned by the leading singular vectors of gradients."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from geomkit.errors import GeometryError
from geomkit.gradients.checks import check_gradients
from geomkit.gradients.gradient_set import GradientSet
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.gradients.provenance import Size, check_model
from geomkit.inputs.parameters import kind_of, layer_index
from geomkit.svd.singular_values import energy_rank, rank_tolerance
from geomkit.svd.singular_vectors import Side, Sides, SingularVectors, exact_vectors, randomized_vectors
from geomkit.utils.arguments import check_rank, check_seed
from geomkit.utils.display import Result, counted
from geomkit.utils.options import check_option
from geomkit.utils.progress import with_bar
from geomkit.utils.saved_files import damaged
from geomkit.utils.saving import load, save, saveable
from geomkit.utils.seeding import parameter_generator

if TYPE_CHECKING:
    import pandas as pd

    from geomkit.gradients.provenance import Provenance

SvdMethod = Literal["exact", "randomized"]
"""Computation of singular vectors: by an SVD of small matrices, or from random projections."""


@saveable
@dataclass(frozen=True, eq=False)
class LayerSubspace:
    """The leading singular vectors of one gradient.

    Attributes:
        basis: (d, k) orthonormal columns, fp32, on the gradient's device; d is the number of rows for the left side
            and of columns for the right side. With both sides, the left basis.
        singular_values: (k,) fp64, descending.
        energy: Share of the gradient's squared norm in the subspace, ‖UᵀG‖² / ‖G‖² for a left basis U.
        numeric_rank: Number of singular values above rounding, see
            :func:`geomkit.svd.singular_values.rank_tolerance`; for a randomized subspace, among the computed values.
        parameter: Name of the parameter.
        partner: (columns, k) the right vectors v_i with G v_i = σ_i u_i for the left vectors u_i of ``basis``, if both
            sides were asked for.
        residual: Distance of a randomized subspace from singular vectors, ‖GV − UΣ‖_F / ‖G‖_F; 0 if it is exact.
    """

    basis: Tensor = field(repr=False)
    singular_values: np.ndarray = field(repr=False)
    energy: float
    numeric_rank: int
    parameter: str = ""
    partner: Tensor | None = field(default=None, repr=False)
    residual: float = 0.0

    @property
    def rank(self) -> int:
        """The dimension k of the subspace."""
        return self.basis.shape[1]

    def on(self, side: Side) -> "LayerSubspace":
        """Return the left or the right subspace of a result with both sides."""
        return replace(self, basis=self.basis if side == "left" or self.partner is None else self.partner, partner=None)


def layer_subspace(
    gradient: LayerGradient,
    *,
    rank: int | None = None,
    energy: float | None = None,
    side: Sides = "left",
    method: SvdMethod = "exact",
    seed: int = 0,
    parameter: str = "",
) -> LayerSubspace:
    """Return the subspace of the leading singular vectors of one gradient; a gradient of few tokens is not formed.

    Args:
        gradient: Gradient of a matrix; T tokens cost a QR of each thin factor and the SVD of a T × T matrix.
        rank: Number of vectors; fewer if the numeric rank of the gradient is lower.
        energy: Instead of a rank, the share of the squared norm that the subspace should hold.
        side: ``"left"`` for the output space, ``"right"`` for the input space, or ``"both"``.
        method: ``"randomized"`` for gradients of many tokens whose exact SVD is too slow; check the residual.
        seed: Seed of the random projections.
        parameter: Name of the parameter, for the result.

    Returns:
        The subspace, of rank 0 for a zero gradient.

    Raises:
        GeometryError: If not exactly one of ``rank`` and ``energy`` is given, the given one is out of range, or
            ``energy`` is combined with random projections, as a share of the energy needs all singular values.

    Example:
        >>> from geomkit.gradients.factored import FactoredGradient
        >>> layer = layer_subspace(FactoredGradient(torch.eye(2, 5), torch.eye(2, 4)), rank=3)
        >>> layer.basis.shape, layer.rank, layer.energy
        (torch.Size([5, 2]), 2, 1.0)
    """
    _check_options(rank, energy, side, method)
    if rank is not None and method == "randomized":
        vectors = randomized_vectors(gradient, rank, parameter_generator(seed, parameter))
    else:
        vectors = exact_vectors(gradient, side)
    values = vectors.values[: gradient.rank_bound]
    numeric_rank = int((values > rank_tolerance(values, gradient.matrix_shape)).sum())
    requested = rank if energy is None else energy_rank(values, energy)
    k = min(requested or 0, numeric_rank)
    if method == "randomized":
        share, residual = _accuracy(gradient, vectors, k, side)
    else:
        share, residual = float((values[:k] ** 2).sum() / (values**2).sum()) if k else 0.0, 0.0
    basis = vectors.right(k) if side == "right" else vectors.left(k)
    partner = vectors.right(k).float().contiguous() if side == "both" else None
    return LayerSubspace(
        basis.float().contiguous(), values[:k].copy(), share, numeric_rank, parameter, partner, residual
    )


def leading_subspace(
    parameter: str, values: np.ndarray, left: Callable[[int], Tensor], rank: int, shape: tuple[int, int]
) -> LayerSubspace:
    """Return the leading left subspace of a gradient that was decomposed already.

    Args:
        parameter: Name of the parameter.
        values: Singular values, descending.
        left: Function from k to the k leading left singular vectors.
        rank: Number of vectors; fewer if the numeric rank is lower.
        shape: Rows and columns of the parameter.
    """
    numeric_rank = int((values > rank_tolerance(values, shape)).sum())
    k = min(rank, numeric_rank)
    energy = float((values[:k] ** 2).sum() / (values**2).sum()) if k else 0.0
    return LayerSubspace(left(k).float().contiguous(), values[:k].copy(), energy, numeric_rank, parameter)


def _check_options(rank: int | None, energy: float | None, side: Sides, method: SvdMethod) -> None:
    if (rank is None) == (energy is None):
        raise GeometryError(f"expected exactly one of rank and energy, found rank={rank}, energy={energy}; give one")
    if rank is not None:
        check_rank(rank)
    if energy is not None:
        check_option("refresh_energy", energy, shown="energy", error=GeometryError)
    if side not in get_args(Sides) or method not in get_args(SvdMethod):
        raise GeometryError(
            f"expected side= {', '.join(get_args(Sides))} and method= {', '.join(get_args(SvdMethod))}, found {side!r} "
            f"and {method!r}; give one of these"
        )
    if energy is not None and method == "randomized":
        raise GeometryError(
            f"expected rank= with random projections, found energy={energy}: a share of the energy needs all singular "
            "values; give rank=, or method='exact'"
        )


def _accuracy(gradient: LayerGradient, vectors: SingularVectors, k: int, side: Sides) -> tuple[float, float]:
    """Return the exact share of the energy in the span of k randomized vectors, and their residual."""
    if not k:
        return 0.0, 0.0
    values = torch.from_numpy(vectors.values[:k]).to(gradient.device)
    image = gradient.matmul(vectors.right(k))
    residual = float(torch.linalg.vector_norm(image - vectors.left(k) * values)) / gradient.norm
    # Of randomized vectors UᵀG = ΣVᵀ holds by construction, so ‖UᵀG‖ = ‖Σ‖; GV = UΣ holds only approximately.
    inside = torch.linalg.vector_norm(image) if side == "right" else torch.linalg.vector_norm(values)
    return (float(inside) / gradient.norm) ** 2, residual


@saveable
@dataclass(frozen=True, eq=False)
class Subspace(Result):
    """The leading singular subspace of every matrix gradient of a model.

    Attributes:
        side: Side of the singular vectors, ``"left"``, ``"right"`` or ``"both"``.
        layers: The subspace of every parameter.
        provenance: Model and examples that the gradients were collected from.
    """

    side: Sides
    layers: Mapping[str, LayerSubspace]
    provenance: "Provenance | None" = field(default=None, repr=False)

    def on(self, side: Side) -> "Subspace":
        """Return the subspaces of one side.

        Raises:
            GeometryError: If only the other side was computed.
        """
        if self.side == side:
            return self
        if self.side != "both":
            raise GeometryError(
                f"expected subspaces with a {side} side, found {self.side} ones only; build them with side='both'"
            )
        return Subspace(side, {name: layer.on(side) for name, layer in self.layers.items()}, self.provenance)

    def to_frame(self) -> "pd.DataFrame":
        """Return a data frame with one row per parameter: the ranks, the ``dimension`` of the space and the ``energy``.

        With both sides, ``dimension`` belongs to the left side.
        """
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
                    "residual": layer.residual,
                }
                for name, layer in self.layers.items()
            ]
        )

    def __str__(self) -> str:
        """Return the number of subspaces, their ranks, and the largest residual of randomized subspaces."""
        ranks = [layer.rank for layer in self.layers.values()]
        span = f"{min(ranks)} to {max(ranks)}" if len(set(ranks)) > 1 else f"{ranks[0]}" if ranks else "0"
        sides = {"both": "left and right"}.get(self.side, self.side)
        worst = max((layer.residual for layer in self.layers.values()), default=0.0)
        residual = f", residual at most {worst:.1e}" if worst else ""
        return f"{sides} subspaces of {counted(len(ranks), 'matrix', 'matrices')}, rank {span}{residual}"

    def save(self, folder: str | Path) -> Path:
        """Save the subspaces in a folder; :func:`load_subspace` loads them, without the model.

        Args:
            folder: Folder to write to. Saved subspaces in it are replaced in one step; other files stay.

        Returns:
            The folder.
        """
        return save("subspace", self, folder)


def subspace(
    gradients: Mapping[str, LayerGradient],
    *,
    rank: int | None = None,
    energy: float | None = None,
    side: Sides = "left",
    method: SvdMethod = "exact",
    seed: int = 0,
    progress: bool = True,
) -> Subspace:
    """Return the leading singular subspace of every matrix gradient.

    Args:
        gradients: Gradients by parameter, such as a :class:`~geomkit.gradients.gradient_set.GradientSet`; vectors are
            left out.
        rank: Number of vectors. A subspace has fewer, with a warning, if the numeric rank of the gradient is lower:
            singular vectors beyond the numeric rank are rounding noise.
        energy: Instead of a rank, the share of the squared norm that each subspace should hold; the ranks then differ
            between parameters.
        side: ``"left"`` for the output space, ``"right"`` for the input space, or ``"both"`` with vectors in pairs.
        method: ``"exact"``, or ``"randomized"`` for large gradients of many tokens: eleven thin products per gradient,
            and a ``residual``, the distance of the result from singular vectors.
        seed: Seed of the random projections; the projections of a parameter do not depend on other parameters.
        progress: Show a bar, in parameters, once the work has taken five seconds.

    Returns:
        The subspace of every matrix parameter.

    Raises:
        GeometryError: If ``gradients`` holds something other than gradients, not exactly one of ``rank`` and
            ``energy`` is given, the given one is out of range, or ``energy`` is combined with random projections.

    Warns:
        UserWarning: Once, if some gradients have a numeric rank below ``rank``.
    """
    check_gradients("given", gradients)
    check_seed(seed)
    matrices = {name: gradient for name, gradient in gradients.items() if min(gradient.matrix_shape) > 1}
    layers = {
        name: layer_subspace(gradient, rank=rank, energy=energy, side=side, method=method, seed=seed, parameter=name)
        for name, gradient in with_bar(matrices.items(), "subspaces", "parameter", progress)
    }
    short = [layer for layer in layers.values() if rank is not None and layer.rank < rank]
    if short:
        worst = min(short, key=lambda layer: layer.rank)
        warnings.warn(
            f"expected rank {rank}, found less in {len(short)} of {len(layers)} gradients (lowest: {worst.rank} in "
            f"{worst.parameter}); used their numeric rank, lower rank= or use more tokens for equal ranks",
            UserWarning,
            stacklevel=2,
        )
    return Subspace(side, layers, gradients.provenance if isinstance(gradients, GradientSet) else None)


def load_subspace(folder: str | Path, model: nn.Module | None = None) -> Subspace:
    """Return the subspaces that :meth:`Subspace.save` wrote to a folder, bit for bit, on the CPU.

    Args:
        folder: Folder of the saved subspaces.
        model: Model to compare with: an error is raised unless the gradients were from this model with these weights.

    Returns:
        The subspaces.

    Raises:
        DataError: As in :func:`geomkit.gradients.storage.load_gradients`.
    """
    subspace = load("subspace", folder, Subspace)
    for name, layer in subspace.layers.items():
        if not _consistent(layer, subspace.side):
            raise damaged("subspace", Path(folder), f"bases of {name!r:.60} that do not fit together")
    if model is not None:
        bases = {name: (layer.basis, layer.partner) for name, layer in subspace.layers.items()}
        dimensions = {name: tuple(len(basis) for basis in pair if basis is not None) for name, pair in bases.items()}
        size = {"left": _rows, "right": _columns, "both": _rows_and_columns}[subspace.side]
        check_model(model, subspace.provenance, f"the {subspace.side} subspaces in {folder}", dimensions, size)
    return subspace


def _consistent(layer: LayerSubspace, side: Sides) -> bool:
    """Return whether the bases and singular values of a subspace have the shapes that its class describes."""
    bases = [layer.basis, *([] if layer.partner is None else [layer.partner])]
    return (
        len(bases) == (2 if side == "both" else 1)
        and all(basis.ndim == 2 and basis.is_floating_point() for basis in bases)
        and {basis.shape[1] for basis in bases} == {len(layer.singular_values)}
        and layer.singular_values.ndim == 1
    )


def _rows(shape: torch.Size) -> Size:
    return (shape[:-1].numel(),)


def _columns(shape: torch.Size) -> Size:
    return tuple(shape[-1:])


def _rows_and_columns(shape: torch.Size) -> Size:
    return _rows(shape) + _columns(shape)
