"""Inner products and norms of the gradients of a batch's examples, all examples together, in products of fp32.

:mod:`geomkit.gradients.arithmetic` computes the same numbers for any gradients, with products in fp64. Here a batch
costs one more product of the forward pass, since the factors of its examples are rows of one tensor.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from geomkit.gradients.arithmetic import factored_of, parts_by_form
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.indexed import IndexedGradient
from geomkit.gradients.layer_gradient import LayerGradient, as_matrix, plain_matmul
from geomkit.gradients.projections import common_rows

_MOST_NUMBERS = 2**22
"""Number of entries of padded factors that are held at a time."""

_FORMED_NUMBERS = 2**18
"""Number of entries of formed matrices that are held at a time: few, so that they are read from a CPU's cache."""


def products_and_norms(
    gradients: Sequence[LayerGradient], matrices: Sequence[Tensor], basis: Tensor | None = None
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return what :func:`products_with` returns for each matrix, and what :func:`squared_norms` returns.

    Long examples have their matrices formed, for all of these numbers at once: that takes one product of the forward
    pass, however many matrices there are.

    Args:
        gradients: B gradients of one parameter.
        matrices: Matrices of :attr:`~geomkit.gradients.layer_gradient.LayerGradient.matrix_shape`, of one dtype.
        basis: U, (rows, k) orthonormal columns.

    Returns:
        For each matrix M, (B,) ⟨G, M⟩; (B,) ‖G‖²; (B,) ‖UᵀG‖², zero without a basis. All fp64.

    Example:
        >>> gradient = FactoredGradient(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]))
        >>> matrix = torch.tensor([[1.0, 7.0], [7.0, 2.0]])
        >>> products, squares, inside = products_and_norms([gradient], [matrix, 2 * matrix])
        >>> [float(product) for product in products], float(squares), float(inside)
        ([31.0, 62.0], 25.0, 0.0)
    """
    factored = factored_of(gradients)
    if len(factored) == len(gradients) and _forming_is_cheaper(factored, len(matrices)):
        return _by_forming(factored, matrices, basis)
    return [products_with(gradients, matrix) for matrix in matrices], *squared_norms(gradients, basis)


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
    factored = factored_of(gradients)
    if len(factored) == len(gradients):
        return _factored_products(factored, matrix)
    total = torch.zeros(len(gradients), dtype=torch.float64, device=matrix.device)
    for owners, parts in parts_by_form(gradients):
        match parts[0]:
            case FactoredGradient():
                values = _factored_products(factored_of(parts), matrix)
            case IndexedGradient():
                values = _indexed_products([part for part in parts if isinstance(part, IndexedGradient)], matrix)
            case _:
                values = torch.stack([as_matrix(part).flatten() for part in parts]).double() @ matrix.flatten().double()
        total[owners.to(total.device)] += values
    return total


def squared_norms(gradients: Sequence[LayerGradient], basis: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the squared Frobenius norm of each gradient, and that of its part in a subspace of the output space.

    With few tokens both follow from T × T Gram matrices of the factors, ‖G‖² = Σ_st (LLᵀ)_st (RRᵀ)_st and
    ‖UᵀG‖² = Σ_st (LU(LU)ᵀ)_st (RRᵀ)_st; with many tokens the matrix is formed.

    Args:
        gradients: B gradients of one parameter.
        basis: U, (rows, k) orthonormal columns; the part in the subspace is zero without one.

    Returns:
        (B,) ‖G‖² and (B,) ‖UᵀG‖², fp64.

    Example:
        >>> gradient = FactoredGradient(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]))
        >>> squares, inside = squared_norms([gradient], torch.tensor([[1.0], [0.0]]))
        >>> float(squares), float(inside)
        (25.0, 9.0)
    """
    factored = factored_of(gradients)
    if len(factored) == len(gradients):
        return _factored_norms(factored, basis)
    dense = [gradient.tensor.flatten() for gradient in gradients if isinstance(gradient, DenseGradient)]
    if len(dense) == len(gradients):
        squares = torch.stack(dense).square().sum(1, dtype=torch.float64)
    else:
        squares = torch.stack([_squared_norm(gradient) for gradient in gradients])
    if basis is None:
        return squares, torch.zeros_like(squares)
    inside = [gradient.rmatmul(basis.T).square().sum(dtype=torch.float64) for gradient in gradients]
    return squares, torch.stack(inside)


def _factored_products(parts: Sequence[FactoredGradient], matrix: Tensor) -> Tensor:
    lefts, rights, runs = _common_factors(parts)
    # The thin product has as many columns as the narrower side.
    products, others = (
        (plain_matmul(lefts.to(matrix.dtype), matrix), rights)
        if matrix.shape[0] >= matrix.shape[1]
        else (plain_matmul(rights.to(matrix.dtype), matrix.T), lefts)
    )
    by_token = torch.einsum("td,td->t", products, others.to(matrix.dtype))
    # Sums over runs of tokens, as differences of running sums.
    running = torch.nn.functional.pad(by_token.double().cumsum(0), (1, 0))
    starts, stops = (torch.tensor(ends, device=running.device) for ends in zip(*_ends(runs), strict=True))
    return running[stops] - running[starts]


def _common_factors(parts: Sequence[FactoredGradient]) -> tuple[Tensor, Tensor, list[slice]]:
    """Return the rows of all left and all right factors, and the rows of each gradient, the same in both."""
    lefts, left_rows = common_rows([part.left for part in parts])
    rights, right_rows = common_rows([part.right for part in parts])
    if left_rows != right_rows:  # only one factor is made of rows of one tensor
        lefts, rights = (
            torch.cat(factors) for factors in zip(*((part.left, part.right) for part in parts), strict=True)
        )
        ends = torch.tensor([part.tokens for part in parts]).cumsum(0).tolist()
        left_rows = [slice(end - part.tokens, end) for end, part in zip(ends, parts, strict=True)]
    return lefts, rights, left_rows


def _ends(runs: Sequence[slice]) -> list[tuple[int, int]]:
    return [(run.start, run.stop) for run in runs]


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
        norms = _by_forming(run, (), basis)[1:] if _forming_is_cheaper(run, 0) else _norms_by_tokens(run, basis)
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
    lefts, rights, runs = _common_factors(parts)
    tokens = torch.tensor([part.tokens for part in parts], device=lefts.device)
    places = torch.arange(int(tokens.max()), device=lefts.device)
    starts = torch.tensor([run.start for run in runs], device=lefts.device)
    # (B, T) rows of each example. Rows of padding are other rows, whose entries of the product are not summed.
    padded = (starts[:, None] + places).clamp_(max=max(len(lefts) - 1, 0))
    if not padded.numel():
        zeros = torch.zeros(len(parts), dtype=torch.float64, device=lefts.device)
        return zeros, zeros.clone()
    is_token = places < tokens[:, None]
    left, right = lefts[padded], rights[padded]
    grams = plain_matmul(right, right.mT) * (is_token[:, :, None] & is_token[:, None])
    squares = _summed_product(plain_matmul(left, left.mT), grams)
    if basis is None:
        return squares, torch.zeros_like(squares)
    projected = _projected(lefts, basis)[padded]
    return squares, _summed_product(plain_matmul(projected, projected.mT), grams)


def _summed_product(a: Tensor, b: Tensor) -> Tensor:
    """Return Σ_st a_st b_st of each pair of matrices, (B,) fp64."""
    return torch.einsum("bst,bst->b", a, b).double()


def _forming_is_cheaper(parts: Sequence[FactoredGradient], products: int) -> bool:
    """Return whether the matrices of examples are cheaper to form than to avoid, for their norms and some products.

    Costs are in multiplications of one large matrix product, from measurements on a CPU at widths of 128 to 1,408: a
    thin product takes T · rows · columns, as forming does; a pair of Gram matrices 5/4 of T² (rows + columns), and
    padding and masks as long as 50 multiplications a number; writing a formed matrix as long as 20 tokens, and each
    time that it is read as long as 6.
    """
    (rows, columns), tokens = parts[0].matrix_shape, max(part.tokens for part in parts)
    by_tokens = products * tokens * rows * columns + (1.25 * tokens + 50) * tokens * (rows + columns)
    return (tokens + 20 + 6 * (1 + products)) * rows * columns < by_tokens


def _by_forming(
    parts: Sequence[FactoredGradient], matrices: Sequence[Tensor], basis: Tensor | None
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return inner products with matrices, ‖G‖² and ‖UᵀG‖², from strips of the formed matrices of a few examples."""
    lefts, rights, runs = _common_factors(parts)
    if matrices:
        lefts, rights = lefts.to(matrices[0].dtype), rights.to(matrices[0].dtype)
    rows, columns = parts[0].matrix_shape
    together, height = max(1, _FORMED_NUMBERS // (rows * columns)), max(1, _FORMED_NUMBERS // columns)
    strips = [slice(start, start + height) for start in range(0, rows, height)]
    projected = None if basis is None else _projected(lefts, basis)
    total = torch.zeros(len(matrices) + 2, len(parts), dtype=torch.float64, device=lefts.device)
    for start in range(0, len(parts), together):
        run = runs[start : start + together]
        left, right = _windows(lefts, run, zero=True), _windows(rights, run)
        sums = total[:, start : start + together]
        for strip in strips:
            formed = plain_matmul(left[..., strip].mT, right).flatten(1)
            for place, matrix in enumerate(matrices):
                sums[place] += plain_matmul(formed, matrix[strip].flatten())
            sums[-2] += torch.linalg.vector_norm(formed, dim=1).double().square()
        if projected is not None:
            inside = plain_matmul(_windows(projected, run, zero=True).mT, right).flatten(1)
            sums[-1] += torch.linalg.vector_norm(inside, dim=1).double().square()
    return list(total[:-2]), total[-2], total[-1]


def _projected(lefts: Tensor, basis: Tensor) -> Tensor:
    """Return L U, computed as (Uᵀ Lᵀ)ᵀ: a product with few columns is several times slower than one with few rows."""
    return plain_matmul(basis.T.to(lefts.dtype), lefts.T).T


def _windows(values: Tensor, runs: Sequence[slice], *, zero: bool = False) -> Tensor:
    """Return (b, T, d) rows of b examples, each with further rows up to the longest, which are zero if asked for.

    Args:
        values: (N, d) rows.
        runs: The rows of each example.
        zero: Whether the further rows are zero; otherwise they are any other rows.
    """
    starts, tokens = [run.start for run in runs], [run.stop - run.start for run in runs]
    longest, steps = max(tokens), {after - before for before, after in pairwise(starts)}
    if len(steps) <= 1 and starts[-1] + longest <= len(values) and min(steps, default=1) > 0:
        stride, step = values.stride(), min(steps, default=longest)
        offset = values.storage_offset() + starts[0] * stride[0]
        windows = values.as_strided((len(runs), longest, values.shape[1]), (step * stride[0], *stride), offset)
    else:
        places = torch.tensor(starts)[:, None] + torch.arange(longest)
        windows = values[places.clamp_(max=max(len(values) - 1, 0)).to(values.device)]
    if not zero or min(tokens) == longest:
        return windows
    is_token = torch.arange(longest) < torch.tensor(tokens)[:, None]
    return windows * is_token.to(values.device)[..., None]
