"""Inner products and norms of the gradients of a batch's examples, all examples together, in products of fp32.

:mod:`geomkit.gradients.arithmetic` computes the same numbers for any gradients, with products in fp64. Here a batch
costs one more product of the forward pass, since the factors of its examples are rows of one tensor.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from geomkit.gradients.arithmetic import factored_of, parts_by_form
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.indexed import IndexedGradient
from geomkit.gradients.layer_gradient import LayerGradient, as_matrix, plain_matmul
from geomkit.gradients.projections import common_rows

_MOST_NUMBERS = 2**22
"""Number of entries of padded factors or formed matrices that are held at a time."""


def products_with(gradients: Sequence[LayerGradient], matrix: Tensor) -> Tensor:
    """Return the inner product of each gradient with one matrix.

    For a factored gradient G = LᵀR it is ⟨G, M⟩ = Σ_t ⟨l_t M, r_t⟩, a thin product and a sum over tokens.

    Args:
        gradients: B gradients of one parameter.
        matrix: M, of :attr:`~geomkit.gradients.layer_gradient.LayerGradient.matrix_shape`, fp32 or fp64.

    Returns:
        (B,) fp64.

    Example:
        >>> gradients = [FactoredGradient(torch.eye(2), torch.eye(2)), FactoredGradient(torch.eye(2), 3 * torch.eye(2))]
        >>> products_with(gradients, torch.tensor([[1.0, 7.0], [7.0, 2.0]]))
        tensor([3., 9.], dtype=torch.float64)
    """
    total = torch.zeros(len(gradients), dtype=torch.float64, device=matrix.device)
    for owners, parts in parts_by_form(gradients):
        match parts[0]:
            case FactoredGradient():
                values = _factored_products(factored_of(parts), matrix)
            case IndexedGradient():
                values = _indexed_products([part for part in parts if isinstance(part, IndexedGradient)], matrix)
            case _:
                values = torch.stack([(as_matrix(part) * matrix).sum(dtype=torch.float64) for part in parts])
        total[owners.to(total.device)] += values
    return total


def squared_norms(gradients: Sequence[LayerGradient], basis: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the squared Frobenius norm of each gradient, and that of its part in a subspace of the output space.

    With few tokens both follow from T × T Gram matrices of the factors, ‖G‖² = Σ_st (LLᵀ)_st (RRᵀ)_st and
    ‖UᵀG‖² = Σ_st (LU(LU)ᵀ)_st (RRᵀ)_st; with many tokens the matrix is formed, one example at a time.

    Args:
        gradients: B gradients of one parameter.
        basis: U, (rows, k) orthonormal columns; the part in the subspace is zero without one.

    Returns:
        (B,) ‖G‖² and (B,) ‖UᵀG‖², fp64.

    Example:
        >>> gradient = FactoredGradient(torch.eye(2), torch.eye(2))
        >>> squares, inside = squared_norms([gradient], torch.tensor([[1.0], [0.0]]))
        >>> float(squares), float(inside)
        (2.0, 1.0)
    """
    factored = factored_of(gradients)
    if len(factored) == len(gradients):
        return _factored_norms(factored, basis)
    squares = torch.stack([_squared_norm(gradient) for gradient in gradients])
    if basis is None:
        return squares, torch.zeros_like(squares)
    inside = [gradient.rmatmul(basis.T).square().sum(dtype=torch.float64) for gradient in gradients]
    return squares, torch.stack(inside)


def _factored_products(parts: Sequence[FactoredGradient], matrix: Tensor) -> Tensor:
    lefts, left_rows = common_rows([part.left for part in parts])
    rights, right_rows = common_rows([part.right for part in parts])
    if left_rows != right_rows:  # one factor is shared with another layer, the other is not
        lefts, _ = _copied([part.left for part in parts])
        rights, left_rows = _copied([part.right for part in parts])
    # The thin product has as many columns as the narrower side.
    products, others = (
        (plain_matmul(lefts.to(matrix.dtype), matrix), rights)
        if matrix.shape[0] >= matrix.shape[1]
        else (plain_matmul(rights.to(matrix.dtype), matrix.T), lefts)
    )
    by_token = torch.einsum("td,td->t", products, others.to(matrix.dtype)).double()
    return torch.stack([by_token[rows].sum() for rows in left_rows])


def _copied(factors: Sequence[Tensor]) -> tuple[Tensor, list[slice]]:
    ends = torch.tensor([len(factor) for factor in factors]).cumsum(0).tolist()
    return torch.cat(list(factors)), [slice(end - len(factor), end) for end, factor in zip(ends, factors, strict=True)]


def _indexed_products(parts: Sequence[IndexedGradient], matrix: Tensor) -> Tensor:
    return torch.stack([(matrix[part.indices] * part.rows).sum(dtype=torch.float64) for part in parts])


def _squared_norm(gradient: LayerGradient) -> Tensor:
    match gradient:
        case DenseGradient(tensor=values) | IndexedGradient(rows=values):
            return values.square().sum(dtype=torch.float64)
    return torch.tensor(gradient.norm**2, dtype=torch.float64, device=gradient.device)


def _factored_norms(parts: Sequence[FactoredGradient], basis: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, columns = parts[0].matrix_shape
    squares, inside = [], []
    for start, stop in _runs([part.tokens for part in parts], rows + columns):
        run = parts[start:stop]
        longest = max(part.tokens for part in run)
        if longest * (rows + columns) < rows * columns:
            norms = _norms_by_tokens(run, basis)
        else:
            norms = _norms_by_forming(run, basis)
        squares.append(norms[0])
        inside.append(norms[1])
    return torch.cat(squares), torch.cat(inside)


def _runs(tokens: Sequence[int], width: int) -> list[tuple[int, int]]:
    """Return ranges of consecutive examples whose padded factors have at most :data:`_MOST_NUMBERS` numbers."""
    starts, longest = [0], 0
    for index, count in enumerate(tokens):
        longest = max(longest, count)
        if (index + 1 - starts[-1]) * longest * width > _MOST_NUMBERS and index > starts[-1]:
            starts.append(index)
            longest = count
    return list(zip(starts, [*starts[1:], len(tokens)], strict=True))


def _norms_by_tokens(parts: Sequence[FactoredGradient], basis: Tensor | None) -> tuple[Tensor, Tensor]:
    # Padding tokens are zero, so that they add nothing.
    lefts, rights = (pad_sequence([factor(part) for part in parts], batch_first=True) for factor in (_left, _right))
    right_gram = plain_matmul(rights, rights.mT)
    squares = (plain_matmul(lefts, lefts.mT) * right_gram).sum((1, 2), dtype=torch.float64)
    if basis is None:
        return squares, torch.zeros_like(squares)
    projected = plain_matmul(lefts, basis.to(lefts.dtype))
    return squares, (plain_matmul(projected, projected.mT) * right_gram).sum((1, 2), dtype=torch.float64)


def _left(part: FactoredGradient) -> Tensor:
    return part.left


def _right(part: FactoredGradient) -> Tensor:
    return part.right


def _norms_by_forming(parts: Sequence[FactoredGradient], basis: Tensor | None) -> tuple[Tensor, Tensor]:
    formed = [plain_matmul(part.left.T, part.right) for part in parts]
    squares = torch.stack([matrix.square().sum(dtype=torch.float64) for matrix in formed])
    if basis is None:
        return squares, torch.zeros_like(squares)
    inside = [plain_matmul(basis.T.to(matrix.dtype), matrix).square().sum(dtype=torch.float64) for matrix in formed]
    return squares, torch.stack(inside)
