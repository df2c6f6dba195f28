"""The subspaces that the leading singular vectors of a gradient span."""

import warnings
from collections.abc import Mapping
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
from geomkit.utils.arguments import check_rank
from geomkit.utils.display import counted, html_table
from geomkit.utils.saving import load, save, saveable
from geomkit.utils.seeding import parameter_generator

if TYPE_CHECKING:
    import pandas as pd

    from geomkit.gradients.provenance import Provenance

Method = Literal["exact", "randomized"]


@saveable
@dataclass(frozen=True, eq=False)
class LayerSubspace:
    """The leading singular vectors of one gradient.

    Attributes:
        basis: (d, k) orthonormal columns, fp32, on the gradient's device; d is the number of rows for the left side
            and of columns for the right side. For both sides it is the left one.
        singular_values: (k,) fp64, descending.
        energy: Share of the gradient's squared norm that lies in the subspace, ‖UᵀG‖² / ‖G‖² for a left basis U.
        numeric_rank: How many directions the gradient has at all, see
            :func:`geomkit.svd.singular_values.rank_tolerance`; of a
            randomized subspace, how many of the directions that were looked at.
        parameter: Name of the parameter.
        partner: (columns, k) the right vectors that belong to the left ones of ``basis``, G v_i = σ_i u_i, where both
            sides were asked for.
        residual: How far a randomized subspace is from being one of singular vectors, ‖GV − UΣ‖_F / ‖G‖_F; 0 where
            it is exact.
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
        """k, the dimension of the subspace."""
        return self.basis.shape[1]

    def on(self, side: Side) -> "LayerSubspace":
        """Return one side of two."""
        return replace(self, basis=self.basis if side == "left" or self.partner is None else self.partner, partner=None)


def layer_subspace(
    gradient: LayerGradient,
    *,
    rank: int | None = None,
    energy: float | None = None,
    side: Sides = "left",
    method: Method = "exact",
    seed: int = 0,
    parameter: str = "",
) -> LayerSubspace:
    """Return the leading singular vectors of one gradient; with few tokens it is never formed.

    Args:
        gradient: Gradient of a matrix; T tokens cost a QR of each thin factor and the SVD of a T × T matrix.
        rank: How many vectors, if the gradient has as many; never more than its numeric rank.
        energy: Or: as many as hold this share of the squared norm.
        side: ``"left"`` for the output space, ``"right"`` for the input space, or ``"both"``.
        method: ``"randomized"`` for gradients of many tokens whose exact SVD is too slow; look at the residual.
        seed: Seed of the random projections.
        parameter: Name to keep with the result.

    Returns:
        The subspace, of rank 0 for a zero gradient.

    Raises:
        GeometryError: If not exactly one of ``rank`` and ``energy`` is given, or it is out of range; or for a share
            of the energy from random projections, which needs all singular values.

    Example:
        >>> from geomkit.gradients.factored import FactoredGradient
        >>> found = layer_subspace(FactoredGradient(torch.eye(2, 5), torch.eye(2, 4)), rank=3)
        >>> found.basis.shape, found.rank, found.energy
        (torch.Size([5, 2]), 2, 1.0)
    """
    _check(rank, energy, side, method)
    if rank is not None and method == "randomized":
        vectors = randomized_vectors(gradient, rank, parameter_generator(seed, parameter))
    else:
        vectors = exact_vectors(gradient, side)
    values = vectors.values[: gradient.rank_bound]
    numeric_rank = int((values > rank_tolerance(values, gradient.matrix_shape)).sum())
    wanted = rank if energy is None else energy_rank(values, energy)
    kept = min(wanted or 0, numeric_rank)
    if method == "randomized":
        share, residual = _accuracy(gradient, vectors, kept, side)
    else:
        share, residual = float((values[:kept] ** 2).sum() / (values**2).sum()) if kept else 0.0, 0.0
    basis = vectors.right(kept) if side == "right" else vectors.left(kept)
    partner = vectors.right(kept).float().contiguous() if side == "both" else None
    found = values[:kept].copy()
    return LayerSubspace(basis.float().contiguous(), found, share, numeric_rank, parameter, partner, residual)


def _check(rank: int | None, energy: float | None, side: Sides, method: Method) -> None:
    if (rank is None) == (energy is None):
        raise GeometryError(f"expected exactly one of rank and energy, found rank={rank}, energy={energy}; give one")
    if rank is not None:
        check_rank(rank)
    if side not in get_args(Sides) or method not in get_args(Method):
        raise GeometryError(
            f"expected side= {', '.join(get_args(Sides))} and method= {', '.join(get_args(Method))}, found {side!r} "
            f"and {method!r}; give one of these"
        )
    if energy is not None and method == "randomized":
        raise GeometryError(
            f"expected rank= with random projections, found energy={energy}: a share of the energy needs all singular "
            "values; give rank=, or method='exact'"
        )


def _accuracy(gradient: LayerGradient, vectors: SingularVectors, kept: int, side: Sides) -> tuple[float, float]:
    """Return the share of the energy that is exactly in the subspace, and its residual."""
    if not kept:
        return 0.0, 0.0
    values = torch.from_numpy(vectors.values[:kept]).to(gradient.device)
    image = gradient.matmul(vectors.right(kept))
    residual = float(torch.linalg.vector_norm(image - vectors.left(kept) * values)) / gradient.norm
    # UᵀG is ΣVᵀ by construction, GV is not UΣ.
    inside = torch.linalg.vector_norm(image) if side == "right" else torch.linalg.vector_norm(values)
    return (float(inside) / gradient.norm) ** 2, residual


@saveable
@dataclass(frozen=True, eq=False)
class Subspace:
    """The leading singular subspace of every matrix gradient of a model.

    Attributes:
        side: Which singular vectors, ``"left"``, ``"right"`` or ``"both"``.
        layers: A subspace for each parameter.
        provenance: What the gradients were collected from.
    """

    side: Sides
    layers: Mapping[str, LayerSubspace]
    provenance: "Provenance | None" = field(default=None, repr=False)

    def on(self, side: Side) -> "Subspace":
        """Return the subspaces of one side alone.

        Raises:
            GeometryError: If they are those of the other side only.
        """
        if self.side == side:
            return self
        if self.side != "both":
            raise GeometryError(
                f"expected subspaces with a {side} side, found {self.side} ones only; build them with side='both'"
            )
        return Subspace(side, {name: layer.on(side) for name, layer in self.layers.items()}, self.provenance)

    def to_frame(self) -> "pd.DataFrame":
        """Return a row per parameter: ``rank`` of ``numeric_rank`` in ``dimension``, and the ``energy`` it holds.

        The dimension of both sides is that of the left one.
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
        """Say how many subspaces of which rank."""
        ranks = [layer.rank for layer in self.layers.values()]
        span = f"{min(ranks)} to {max(ranks)}" if len(set(ranks)) > 1 else f"{ranks[0]}" if ranks else "0"
        sides = {"both": "left and right"}.get(self.side, self.side)
        worst = max((layer.residual for layer in self.layers.values()), default=0.0)
        residual = f", residual at most {worst:.1e}" if worst else ""
        return f"{sides} subspaces of {counted(len(ranks), 'matrix', 'matrices')}, rank {span}{residual}"

    def save(self, folder: str | Path) -> Path:
        """Write it to a folder, from which :func:`geomkit.load_subspace` reads it without the model.

        Args:
            folder: Where to. A subspace saved there before is replaced in one step; other files are left alone.

        Returns:
            The folder.
        """
        return save("subspace", self, folder)

    def _repr_html_(self) -> str:
        return html_table(str(self), self.to_frame())


def subspace(
    gradients: Mapping[str, LayerGradient],
    *,
    rank: int | None = None,
    energy: float | None = None,
    side: Sides = "left",
    method: Method = "exact",
    seed: int = 0,
) -> Subspace:
    """Return the leading singular subspace of every matrix gradient.

    Args:
        gradients: Gradients by parameter, such as a :class:`~geomkit.gradients.gradient_set.GradientSet`; vectors are
            left out.
        rank: How many directions to take. A gradient of fewer gives what it has, with a warning: singular vectors
            beyond the numeric rank are rounding noise.
        energy: Or: as many as hold this share of the squared norm, which differs between parameters.
        side: ``"left"`` for the output space, ``"right"`` for the input space, or ``"both"`` with vectors in pairs.
        method: ``"exact"``, or ``"randomized"`` for large gradients of many tokens: eleven thin products each, and a
            ``residual`` that says how far from singular vectors the result is.
        seed: Seed of the random projections; a parameter's do not depend on which others there are.

    Returns:
        A subspace for each matrix parameter.

    Raises:
        GeometryError: If these are no gradients; if not exactly one of ``rank`` and ``energy`` is given, or it is out
            of range; or for a share of the energy from random projections.

    Warns:
        UserWarning: Once, if some gradients have a numeric rank below ``rank``.
    """
    check_gradients("given", gradients)
    layers = {
        name: layer_subspace(gradient, rank=rank, energy=energy, side=side, method=method, seed=seed, parameter=name)
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


def load_subspace(folder: str | Path, model: nn.Module | None = None) -> Subspace:
    """Load a subspace that :meth:`~geomkit.svd.subspaces.Subspace.save` wrote, bit for bit, on the CPU.

    Args:
        folder: Where it was saved.
        model: Refuse it unless its gradients were collected from this model with these weights.

    Returns:
        The subspace.

    Raises:
        DataError: As in :func:`load_gradients`.
    """
    subspace: Subspace = load("subspace", folder)
    if model is not None:
        bases = {name: (layer.basis, layer.partner) for name, layer in subspace.layers.items()}
        dimensions = {name: tuple(len(own) for own in pair if own is not None) for name, pair in bases.items()}
        own = {"left": _rows, "right": _columns, "both": _rows_and_columns}[subspace.side]
        check_model(model, subspace.provenance, f"the {subspace.side} subspaces in {folder}", dimensions, own)
    return subspace


def _rows(shape: torch.Size) -> Size:
    return (shape[:-1].numel(),)


def _columns(shape: torch.Size) -> Size:
    return tuple(shape[-1:])


def _rows_and_columns(shape: torch.Size) -> Size:
    return _rows(shape) + _columns(shape)
