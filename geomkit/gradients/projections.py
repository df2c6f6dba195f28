"""Two-sided projections A G B of several gradients of one parameter, such as those of the examples of a batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from geomkit.gradients.arithmetic import parts_by_form
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.layer_gradient import LayerGradient, as_matrix, plain_matmul

_MOST_ROWS = 2.0
"""How many times more rows than those of the views a common tensor may have, to be used instead of a copy."""


def projections(gradients: Sequence[LayerGradient], left: Tensor | None, right: Tensor | None) -> Tensor:
    """Return A G_i B for each gradient.

    For factored gradients this is (L_i Aᵀ)ᵀ (R_i B). The factors of a batch's examples are rows of one tensor, so that
    L_i Aᵀ and R_i B of all examples together are two products.

    Args:
        gradients: N gradients of one parameter, a matrix of m × n.
        left: A, (p, m) fp32; the identity when ``None``.
        right: B, (n, q) fp32; the identity when ``None``.

    Returns:
        (N, p, q) fp32, with p = m or q = n on a side without a factor.

    Example:
        >>> gradients = [FactoredGradient(torch.eye(2), torch.eye(2)), FactoredGradient(torch.eye(2), 3 * torch.eye(2))]
        >>> projections(gradients, torch.ones(1, 2), None)
        tensor([[[1., 1.]],
                [[3., 3.]]])
    """
    height, width = gradients[0].matrix_shape
    p, q = height if left is None else len(left), width if right is None else right.shape[1]
    total = torch.zeros(len(gradients), p, q, device=gradients[0].device)
    for owners, parts in parts_by_form(gradients):
        factored = [part for part in parts if isinstance(part, FactoredGradient)]
        if len(factored) == len(parts):
            lefts = _row_products([part.left for part in factored], None if left is None else left.T)
            rights = _row_products([part.right for part in factored], right)
            products = [plain_matmul(a.T, b) for a, b in zip(lefts, rights, strict=True)]
        else:
            products = [_projection(part, left, right) for part in parts]
        for owner, product in zip(owners.tolist(), products, strict=True):
            total[owner] += product
    return total


def _projection(gradient: LayerGradient, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Return A G B, fp32; the left side first, because most rows of an embedding's gradient are zero."""
    if left is not None:
        product = gradient.rmatmul(left)
        return product if right is None else plain_matmul(product, right)
    if right is not None:
        return gradient.matmul(right)
    return as_matrix(gradient).float()


def _row_products(factors: Sequence[Tensor], operand: Tensor | None) -> list[Tensor]:
    """Return X_i B for each factor X_i, or X_i if B is ``None``, fp32."""
    if operand is None:
        return [factor.float() for factor in factors]
    rows, slices = common_rows(factors)
    products = plain_matmul(rows.float(), operand)
    return [products[own] for own in slices]


def common_rows(views: Sequence[Tensor]) -> tuple[Tensor, list[slice]]:
    """Return a tensor that holds the rows of all matrices, and the rows of each matrix in it.

    The tensor shares the memory of the matrices if these are rows of one tensor without large gaps; else it is a copy.

    Args:
        views: (T_i, d) matrices of one dtype.

    Example:
        >>> whole = torch.arange(12.0).view(6, 2)
        >>> rows, slices = common_rows([whole[:2], whole[3:]])
        >>> len(rows), slices, rows.data_ptr() == whole.data_ptr()
        (6, [slice(0, 2, None), slice(3, 6, None)], True)
    """
    lengths = [view.shape[0] for view in views]
    first = next((view for view in views if view.shape[0]), views[0])
    strides, size, base = first.stride(), first.element_size(), first.storage_offset()
    offsets = [view.storage_offset() - base if length else 0 for view, length in zip(views, lengths, strict=True)]
    starts = [offset // strides[0] if strides[0] else 0 for offset in offsets]
    end = max(start + length for start, length in zip(starts, lengths, strict=True))
    # Two views share their memory if the same number of bytes lies before the first number of both.
    memory = first.data_ptr()
    shared = all(
        not length
        or (
            view.data_ptr() - memory == offset * size and view.stride() == strides and offset == start * strides[0] >= 0
        )
        for view, length, offset, start in zip(views, lengths, offsets, starts, strict=True)
    )
    if not shared or end > _MOST_ROWS * sum(lengths):
        ends = torch.tensor(lengths).cumsum(0).tolist()
        return torch.cat(list(views)), [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    rows = first.as_strided((end, first.shape[1]), first.stride())
    return rows, [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]
