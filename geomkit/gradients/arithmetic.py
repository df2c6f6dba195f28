"""Inner products between gradients of one parameter, whatever their forms, and the zero gradient.

A sum is taken apart, so that three forms remain: indexed, factored and dense. No gradient is formed as a dense matrix
if a thin product gives the same: an indexed gradient needs only the same rows of the other gradient, and two factored
gradients only T × T Gram matrices of their factors. Sums of gradients are in :mod:`geomkit.gradients.accumulator`.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from geomkit.errors import GeometryError
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.indexed import IndexedGradient
from geomkit.gradients.layer_gradient import LayerGradient, row_products
from geomkit.gradients.summed import SumGradient
from geomkit.utils.precision import no_autocast

_FP64_NUMBERS = 2**21
"""Number of values that are converted to fp64 at a time."""

_STRIP_NUMBERS = 2**23
"""Number of entries of all gradients that are formed at a time."""

_BLOCK_TOKENS = 1024
"""Number of tokens of a block: Gram matrices of tokens are computed in blocks of about this many rows and columns."""

_SYMMETRIC = 0.6
"""Share of the time of a product of tokens that a symmetric product takes."""

_MIN_STRIP_ROWS = 32
"""Smallest number of rows of a strip: with fewer rows, the factors would be read too often."""


def zero_gradient(shape: Sequence[int], device: torch.device | str | None = None) -> LayerGradient:
    """Return the gradient of a parameter that does not affect the loss: for a matrix, factors without any token.

    Args:
        shape: Shape of the parameter.
        device: Device of the gradient; the CPU when left out.

    Example:
        >>> zero = zero_gradient((5, 4))
        >>> zero.tokens, zero.floats, zero.norm
        (0, 0, 0.0)
    """
    if len(shape) == 2:
        return FactoredGradient(*(torch.zeros(0, size, dtype=torch.float32, device=device) for size in shape))
    return DenseGradient(torch.zeros(tuple(shape), dtype=torch.float32, device=device), tokens=0)


def inner(a: LayerGradient, b: LayerGradient) -> float:
    """Return the Frobenius inner product ⟨A, B⟩, accumulated in fp64; see :func:`gram`.

    Raises:
        GeometryError: If the gradients have different shapes.
    """
    return float(gram([a], [b])[0, 0])


def gram(
    rows: Sequence[LayerGradient], columns: Sequence[LayerGradient], *, products: torch.dtype = torch.float64
) -> Tensor:
    """Return the inner products between two lists of gradients of one parameter.

    With A = L_aᵀR_a and B = L_bᵀR_b, ⟨A, B⟩ = Σ_st (L_a L_bᵀ)_st (R_a R_bᵀ)_st, from two products of T × T numbers.

    Args:
        rows: N gradients.
        columns: M gradients of the same parameter.
        products: Dtype of the products within a block; blocks are added up in fp64. fp32 is three times as fast, with
            errors of about 1e-7 of the product of the norms, as fp32 gradients have themselves.

    Returns:
        (N, M) inner products, fp64.

    Raises:
        GeometryError: If the gradients have different shapes.

    Example:
        >>> a = FactoredGradient(torch.eye(2), torch.eye(2))
        >>> b = DenseGradient(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), tokens=2)
        >>> gram([a], [a, b])
        tensor([[2., 5.]], dtype=torch.float64)
    """
    _check_one_shape([*rows, *columns])
    total = torch.zeros(len(rows), len(columns), dtype=torch.float64, device=rows[0].device)
    symmetric = _same_objects(rows, columns)
    # 1. Every gradient is a sum of parts in one form each: A_i = Σ_k P_ik, where most have a single part.
    row_forms = parts_by_form(rows)
    column_forms = row_forms if symmetric else parts_by_form(columns)
    for place, (a_owners, a) in enumerate(row_forms):
        # 2. ⟨A_i, B_j⟩ = Σ_kl ⟨P_ik, Q_jl⟩: a block of one form by one form, added to the entries of the owners.
        for b_owners, b in column_forms[place:] if symmetric else column_forms:
            block = _block(a, b, products)
            total[a_owners[:, None], b_owners] += block
            if symmetric and a is not b:
                total[b_owners[:, None], a_owners] += block.T
    return total


def _check_one_shape(gradients: Sequence[LayerGradient]) -> None:
    shapes = {gradient.shape for gradient in gradients}
    if len(shapes) != 1:
        raise GeometryError(f"expected gradients of one shape, found {sorted(shapes)}; compare the same parameter")


def parts_of(gradient: LayerGradient) -> tuple[LayerGradient, ...]:
    """Return the parts of a sum, or the gradient as its only part."""
    return gradient.parts if isinstance(gradient, SumGradient) else (gradient,)


def parts_by_form(gradients: Sequence[LayerGradient]) -> list[tuple[Tensor, list[LayerGradient]]]:
    """Return the parts of all gradients, grouped by form: for each group the gradients' indices, and the parts."""
    groups: dict[tuple[type[LayerGradient], int], tuple[list[int], list[LayerGradient]]] = {}
    for index, gradient in enumerate(gradients):
        for nth, part in enumerate(parts_of(gradient)):
            # Parts of one gradient are in different groups: total[owners] += block needs distinct owners.
            owners, parts = groups.setdefault((type(part), nth), ([], []))
            owners.append(index)
            parts.append(part)
    return [(torch.tensor(owners), parts) for owners, parts in groups.values()]


def _block(rows: Sequence[LayerGradient], columns: Sequence[LayerGradient], dtype: torch.dtype) -> Tensor:
    """Return the inner products between two lists of gradients, each list in one form."""
    if (used := _used_rows(rows, columns)) is not None:
        return _gram_by_strips(rows, columns, used, dtype)
    if _token_grams_are_cheaper(rows, columns):
        return _gram_by_tokens(factored_of(rows), factored_of(columns), dtype)
    return _gram_by_strips(rows, columns, None, dtype)


def _used_rows(rows: Sequence[LayerGradient], columns: Sequence[LayerGradient]) -> Tensor | None:
    """Return the matrix rows outside which one side is zero, ascending; ``None`` if no side is indexed."""
    by_side = [
        torch.cat([part.indices for part in side if isinstance(part, IndexedGradient)]).unique()  # type: ignore[no-untyped-call]
        for side in (rows, columns)
        if isinstance(side[0], IndexedGradient)
    ]
    return min(by_side, key=len, default=None)


def factored_of(gradients: Iterable[LayerGradient]) -> list[FactoredGradient]:
    """Return the gradients that are factored, without the others."""
    return [gradient for gradient in gradients if isinstance(gradient, FactoredGradient)]


def _same_objects(rows: Sequence[object], columns: Sequence[object]) -> bool:
    return len(rows) == len(columns) and all(a is b for a, b in zip(rows, columns, strict=True))


def _token_grams_are_cheaper(rows: Sequence[LayerGradient], columns: Sequence[LayerGradient]) -> bool:
    """Return whether Gram matrices of tokens need fewer multiplications than forming the gradients, height × width."""
    if len(factored_of(rows)) < len(rows) or len(factored_of(columns)) < len(columns):
        return False
    height, width = rows[0].matrix_shape
    row_tokens, column_tokens = (sum(gradient.tokens for gradient in side) for side in (rows, columns))
    symmetric = _same_objects(rows, columns)
    formed_tokens = row_tokens if symmetric else row_tokens + column_tokens
    by_tokens = row_tokens * column_tokens * (height + width) * (_SYMMETRIC if symmetric else 1)
    by_forming = (formed_tokens + len(rows) * len(columns)) * height * width
    return by_tokens < by_forming


def _gram_by_tokens(rows: list[FactoredGradient], columns: list[FactoredGradient], dtype: torch.dtype) -> Tensor:
    """Return Σ (L_a L_bᵀ) ∘ (R_a R_bᵀ) for every pair, in blocks of about :data:`_BLOCK_TOKENS` tokens."""
    total = torch.zeros(len(rows), len(columns), dtype=torch.float64, device=rows[0].device)
    symmetric = _same_objects(rows, columns)
    for row_run in _token_runs(rows):
        for column_run in _token_runs(columns):
            if symmetric and column_run.start < row_run.start:
                total[row_run, column_run] = total[column_run, row_run].T
            else:
                total[row_run, column_run] = _token_block(rows[row_run], columns[column_run], dtype)
    return total


def _token_runs(gradients: Sequence[FactoredGradient]) -> list[slice]:
    """Return slices of consecutive gradients with about :data:`_BLOCK_TOKENS` tokens, at least one gradient each."""
    starts, tokens = [0], 0
    for index, gradient in enumerate(gradients):
        if tokens and tokens + gradient.tokens > _BLOCK_TOKENS:
            starts.append(index)
            tokens = 0
        tokens += gradient.tokens
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(gradients)], strict=True)]


def _token_block(rows: list[FactoredGradient], columns: list[FactoredGradient], dtype: torch.dtype) -> Tensor:
    # 1. For all tokens s of the rows and t of the columns: ⟨l_s, l_t⟩ · ⟨r_s, r_t⟩.
    products = _token_products([gradient.left for gradient in rows], [gradient.left for gradient in columns], dtype)
    products *= _token_products([gradient.right for gradient in rows], [gradient.right for gradient in columns], dtype)
    # 2. Summed over the tokens of each pair of gradients.
    by_row = _segment_sums(products, [gradient.tokens for gradient in rows])
    return _segment_sums(by_row.T, [gradient.tokens for gradient in columns]).T


def _token_products(rows: list[Tensor], columns: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the inner products between all rows of two lists of factors, fp64, a block of columns at a time."""
    height, width = (sum(map(len, factors)) for factors in (rows, columns))
    symmetric = _same_objects(rows, columns)
    total = torch.zeros(height, width, dtype=torch.float64, device=rows[0].device)
    step = max(1, _FP64_NUMBERS // max(height + width, 1))
    for start in range(0, rows[0].shape[1], step):
        a = torch.cat([factor[:, start : start + step] for factor in rows])
        b = a if symmetric else torch.cat([factor[:, start : start + step] for factor in columns])
        total += row_products(a, b, dtype)
    return total


def _segment_sums(values: Tensor, lengths: list[int]) -> Tensor:
    """Return the sums of consecutive rows: the first ``lengths[0]`` rows, then the next ``lengths[1]``, and so on."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(values.device)
    return values.new_zeros(len(lengths), values.shape[1]).index_add_(0, segment, values)


def _gram_by_strips(
    rows: Sequence[LayerGradient], columns: Sequence[LayerGradient], used: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return Σ_s ⟨A[s], B[s]⟩ for every pair, where all gradients are formed a strip s of matrix rows at a time.

    Args:
        rows: N gradients.
        columns: M gradients.
        used: The matrix rows to take; ``None`` for all.
        dtype: Dtype of the products within a strip.
    """
    total = torch.zeros(len(rows), len(columns), dtype=torch.float64, device=rows[0].device)
    height, width = rows[0].matrix_shape
    sides = (rows,) if _same_objects(rows, columns) else (rows, columns)
    step = max(_MIN_STRIP_ROWS, _STRIP_NUMBERS // (sum(map(len, sides)) * max(width, 1)))
    length = height if used is None else len(used)
    # Every strip takes the place of the last one, as fresh memory costs about as much as the products.
    flats = [total.new_empty(len(side) * min(step, length) * width, dtype=dtype) for side in sides]
    for start in range(0, length, step):
        stop = min(start + step, length)
        strip = slice(start, stop) if used is None else used[start:stop]
        size = (stop - start) * width
        filled = [_filled(flat[: len(side) * size], side, strip) for flat, side in zip(flats, sides, strict=True)]
        total += row_products(filled[0], filled[-1], dtype)
    return total


def _filled(flat: Tensor, gradients: Sequence[LayerGradient], strip: Tensor | slice) -> Tensor:
    """Return one strip of every gradient as a row, (N, rows · columns of the strip), written to the numbers of flat."""
    by_gradient = flat.view(len(gradients), -1)
    width = gradients[0].matrix_shape[1]
    taken = flat.dtype if isinstance(strip, Tensor) else torch.float32
    with no_autocast(flat.device):
        for row, gradient in zip(by_gradient, gradients, strict=True):
            if isinstance(gradient, FactoredGradient) and isinstance(strip, slice) and taken == flat.dtype:
                # Multiplied in its place, without a copy.
                torch.mm(gradient.left[:, strip].to(taken).T, gradient.right.to(taken), out=row.view(-1, width))
            else:
                row.copy_(gradient.take(strip, taken).flatten())
    return by_gradient
