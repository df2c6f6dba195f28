"""The part of a gradient outside a pair of subspaces."""

import torch
from torch import Tensor

from geomkit.gradients.accumulator import add
from geomkit.gradients.arithmetic import parts_of
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.layer_gradient import LayerGradient, as_matrix
from geomkit.gradients.summed import SumGradient

_CANCELLATION = 0.1
"""A part below this fraction of the gradient's norm is computed entry by entry, since a difference loses its digits."""


def outside(gradient: LayerGradient, left: Tensor, right: Tensor | None = None) -> LayerGradient:
    """Return (I − UUᵀ) G (I − VVᵀ) of a gradient G, which is not copied unless little of it is outside.

    Args:
        gradient: G.
        left: U, (rows, k), orthonormal to fp32.
        right: V, (columns, k), orthonormal to fp32; ``None`` for the left subspace alone.
    """
    if len(gradient.shape) == 2:
        rest = _difference(gradient, left, right)
        if rest.norm > _CANCELLATION * gradient.norm:
            return rest
    return _by_entries(gradient, left, right)


def _difference(gradient: LayerGradient, left: Tensor, right: Tensor | None) -> SumGradient:
    """Return G − U C − D Vᵀ as a sum of G and thin parts."""
    # 1. C = (UᵀU)⁻¹ UᵀG, as UᵀU is the identity to fp32 only.
    basis = left.double()
    coordinates = torch.linalg.solve(basis.T @ basis, gradient.rmatmul(basis.T))
    parts = [FactoredGradient(-left.T, coordinates.to(left.dtype))]
    # 2. D = (G − U C) V (VᵀV)⁻¹.
    if right is not None:
        partner = right.double()
        images = gradient.matmul(partner) - basis @ (coordinates @ partner)
        columns = torch.linalg.solve(partner.T @ partner, images.T)
        parts.append(FactoredGradient(-columns.to(left.dtype), right.T.contiguous()))
    return SumGradient((*parts_of(gradient), *parts))


def _by_entries(gradient: LayerGradient, left: Tensor, right: Tensor | None) -> LayerGradient:
    """Return (I − UUᵀ) G (I − VVᵀ) in the form of the gradient G."""
    # G = LᵀR: (I − UUᵀ)Lᵀ and R(I − VVᵀ), factor by factor.
    if isinstance(gradient, FactoredGradient):
        return FactoredGradient(_rows_outside(gradient.left, left), _rows_outside(gradient.right, right))
    if isinstance(gradient, DenseGradient):
        matrix = _rows_outside(_rows_outside(as_matrix(gradient).T, left).T, right)
        return DenseGradient(matrix.reshape(gradient.shape), gradient.tokens)
    # G is a large table of which few rows were looked up: add −U(UᵀG) and −(GV)Vᵀ as factored parts, twice.
    rest = gradient
    for _ in range(2):
        rest = add([rest, FactoredGradient(-left.T, rest.rmatmul(left.T))], keep_factors=True)
        if right is not None:
            rest = add([rest, FactoredGradient(-rest.matmul(right).T, right.T)], keep_factors=True)
    return rest


def _rows_outside(rows: Tensor, basis: Tensor | None) -> Tensor:
    """Return rows X (I − BBᵀ), applied twice, as the columns of the basis B are orthonormal to fp32 only."""
    if basis is None:
        return rows
    for _ in range(2):
        rows = rows - (rows @ basis.to(rows.dtype)) @ basis.to(rows.dtype).T
    return rows
