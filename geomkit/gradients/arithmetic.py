"""What takes two gradients of one parameter or more: inner products, sums and running sums, whatever their forms.

A sum of forms is taken apart, so there are three to bring together. None of them is made dense where a thin product
does: rows that were looked up meet the same rows of the other side, and factors meet factors in T × T Grams.
"""

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor

from geomkit.errors import GeometryError
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.indexed import IndexedGradient
from geomkit.gradients.layer_gradient import LayerGradient, row_products
from geomkit.gradients.summed import SumGradient, product

_STRIP = 2**21
"""Numbers that are converted to fp64 at a time."""

_TOKENS = 1024
"""Token Grams are taken of about this many by as many tokens at a time."""

_FEWEST_ROWS = 32
"""Matrices are formed at least this many rows at a time."""

# ------------------------------------------------------------------------------------------------- other forms


def as_matrix(gradient: LayerGradient) -> Tensor:
    """Form the gradient as a matrix of :attr:`LayerGradient.matrix_shape`."""
    return gradient.dense().reshape(gradient.matrix_shape)


def zero_gradient(shape: Sequence[int], device: torch.device | str | None = None) -> LayerGradient:
    """Return the gradient of a parameter in which a loss has no share: no tokens, and no rows for a matrix.

    Example:
        >>> zero = zero_gradient((5, 4))
        >>> zero.tokens, zero.floats, zero.norm
        (0, 0, 0.0)
    """
    if len(shape) == 2:
        return FactoredGradient(*(torch.zeros(0, size, dtype=torch.float32, device=device) for size in shape))
    return DenseGradient(torch.zeros(tuple(shape), dtype=torch.float32, device=device), tokens=0)


def coalesce(indices: Tensor, rows: Tensor, size: int, tokens: int) -> IndexedGradient:
    """Sum rows that share an index.

    Args:
        indices: (T,) row numbers, repeated or not.
        rows: (T, columns) a gradient for each.
        size: Number of rows of the parameter.
        tokens: Number of positions that looked a row up.
    """
    distinct, place = indices.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    summed = rows.new_zeros(len(distinct), rows.shape[1]).index_add_(0, place, rows)
    return IndexedGradient(distinct, summed, size, tokens)


def _parts(gradient: LayerGradient) -> tuple[LayerGradient, ...]:
    return gradient.parts if isinstance(gradient, SumGradient) else (gradient,)


# ---------------------------------------------------------------------------------------------- inner products


def inner(a: LayerGradient, b: LayerGradient) -> float:
    """Return the Frobenius inner product ⟨A, B⟩, accumulated in fp64.

    Between factored gradients it is Σ (L_a L_bᵀ) ∘ (R_a R_bᵀ), from two T × T products; otherwise one thin product.

    Raises:
        GeometryError: If the two belong to parameters of different shape.
    """
    return float(gram([a], [b])[0, 0])


def gram(rows: Sequence[LayerGradient], columns: Sequence[LayerGradient]) -> Tensor:
    """Return every inner product between two lists of gradients of one parameter.

    Args:
        rows: N gradients.
        columns: M gradients of the same parameter.

    Returns:
        (N, M) inner products, fp64.

    Raises:
        GeometryError: If shapes differ.

    Example:
        >>> a = FactoredGradient(torch.eye(2), torch.eye(2))
        >>> b = DenseGradient(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), tokens=2)
        >>> gram([a], [a, b])
        tensor([[2., 5.]], dtype=torch.float64)
    """
    _check_one_shape([*rows, *columns])
    total = torch.zeros(len(rows), len(columns), dtype=torch.float64, device=rows[0].device)
    for a_owners, a in _by_form(rows):
        for b_owners, b in _by_form(columns):
            total[a_owners[:, None], b_owners] += _block(a, b)
    return total


def _check_one_shape(gradients: Sequence[LayerGradient]) -> None:
    shapes = {gradient.shape for gradient in gradients}
    if len(shapes) != 1:
        raise GeometryError(f"expected gradients of one shape, found {sorted(shapes)}; compare the same parameter")


def _by_form(gradients: Sequence[LayerGradient]) -> list[tuple[Tensor, list[LayerGradient]]]:
    """Take sums apart and group the parts by form, each group with the place of the gradient that a part is of."""
    groups: dict[tuple[type[LayerGradient], int], tuple[list[int], list[LayerGradient]]] = {}
    for place, gradient in enumerate(gradients):
        for nth, part in enumerate(_parts(gradient)):
            # Parts of one gradient are never in one group: a sum into places must meet each place once.
            owners, parts = groups.setdefault((type(part), nth), ([], []))
            owners.append(place)
            parts.append(part)
    return [(torch.tensor(owners), parts) for owners, parts in groups.values()]


def _block(rows: Sequence[LayerGradient], columns: Sequence[LayerGradient]) -> Tensor:
    """Return every inner product between two lists of one form each."""
    if any(isinstance(side[0], IndexedGradient) for side in (rows, columns)):
        products = [[product(a, b) for b in columns] for a in rows]
        return torch.tensor(products, dtype=torch.float64, device=rows[0].device)
    if _token_grams_are_cheaper(rows, columns):
        return _gram_by_tokens(_factored(rows), _factored(columns))
    return _gram_by_strips(rows, columns)


def _factored(gradients: Iterable[LayerGradient]) -> list[FactoredGradient]:
    return [gradient for gradient in gradients if isinstance(gradient, FactoredGradient)]


def _same(rows: Sequence[object], columns: Sequence[object]) -> bool:
    return len(rows) == len(columns) and all(a is b for a, b in zip(rows, columns, strict=True))


def _token_grams_are_cheaper(rows: Sequence[LayerGradient], columns: Sequence[LayerGradient]) -> bool:
    if len(_factored(rows)) < len(rows) or len(_factored(columns)) < len(columns):
        return False
    height, width = rows[0].matrix_shape
    row_tokens, column_tokens = (sum(gradient.tokens for gradient in side) for side in (rows, columns))
    formed = row_tokens if _same(rows, columns) else row_tokens + column_tokens
    by_tokens = row_tokens * column_tokens * (height + width)
    by_forming = (formed + len(rows) * len(columns)) * height * width
    return by_tokens < by_forming


def _gram_by_tokens(rows: list[FactoredGradient], columns: list[FactoredGradient]) -> Tensor:
    """Return Σ (L_a L_bᵀ) ∘ (R_a R_bᵀ) for every pair, a block of some tokens by some tokens at a time."""
    total = torch.zeros(len(rows), len(columns), dtype=torch.float64, device=rows[0].device)
    symmetric = _same(rows, columns)
    for own in _runs(rows):
        for other in _runs(columns):
            if symmetric and other.start < own.start:
                total[own, other] = total[other, own].T
            else:
                total[own, other] = _token_block(rows[own], columns[other])
    return total


def _runs(gradients: Sequence[FactoredGradient]) -> list[slice]:
    """Divide gradients into runs of about :data:`_TOKENS` tokens, at least one in each."""
    starts, held = [0], 0
    for place, gradient in enumerate(gradients):
        if held and held + gradient.tokens > _TOKENS:
            starts.append(place)
            held = 0
        held += gradient.tokens
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(gradients)], strict=True)]


def _token_block(rows: list[FactoredGradient], columns: list[FactoredGradient]) -> Tensor:
    products = _cross([g.left for g in rows], [g.left for g in columns])
    products *= _cross([g.right for g in rows], [g.right for g in columns])
    by_row = _sum_segments(products, [g.tokens for g in rows])
    return _sum_segments(by_row.T, [g.tokens for g in columns]).T


def _cross(rows: list[Tensor], columns: list[Tensor]) -> Tensor:
    """Return the inner products between the rows of some factors and of others, fp64."""
    height, width = (sum(map(len, factors)) for factors in (rows, columns))
    symmetric = _same(rows, columns)
    total = torch.zeros(height, width, dtype=torch.float64, device=rows[0].device)
    step = max(1, _STRIP // max(height + width, 1))
    for start in range(0, rows[0].shape[1], step):
        a = torch.cat([factor[:, start : start + step] for factor in rows])
        b = a if symmetric else torch.cat([factor[:, start : start + step] for factor in columns])
        total += row_products(a, b)
    return total


def _sum_segments(values: Tensor, lengths: list[int]) -> Tensor:
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(values.device)
    return values.new_zeros(len(lengths), values.shape[1]).index_add_(0, segment, values)


def _gram_by_strips(rows: Sequence[LayerGradient], columns: Sequence[LayerGradient]) -> Tensor:
    """Form all gradients, some rows of the matrix at a time."""
    total = torch.zeros(len(rows), len(columns), dtype=torch.float64, device=rows[0].device)
    height, width = rows[0].matrix_shape
    # Products of fewer rows than that would read the factors again and again.
    step = max(_FEWEST_ROWS, _STRIP // ((len(rows) + len(columns)) * max(width, 1)))
    symmetric = _same(rows, columns)
    for start in range(0, height, step):
        a = _flat(rows, slice(start, start + step))
        total += row_products(a, a if symmetric else _flat(columns, slice(start, start + step)))
    return total


def _flat(gradients: Sequence[LayerGradient], strip: slice) -> Tensor:
    pieces = (gradient.take(strip, torch.float32).flatten() for gradient in gradients)
    first = next(pieces)
    flat = first.new_empty(len(gradients), len(first), dtype=torch.float64)
    for row, piece in zip(flat, chain([first], pieces), strict=True):
        row.copy_(piece)
    return flat


# ------------------------------------------------------------------------------------------------------- sums


def add(parts: Sequence[LayerGradient], *, keep_factors: bool = False) -> LayerGradient:
    """Sum gradients of one parameter, in thin form while that is the smaller one.

    Args:
        parts: At least one gradient.
        keep_factors: Keep the factors even where the dense form is smaller; nulls need them.

    Returns:
        Their sum, in the form that :class:`Accumulator` gives it.

    Raises:
        GeometryError: If there is no part, or shapes differ.
    """
    running = Accumulator(keep_factors=keep_factors)
    for part in parts:
        running.add(part)
    return running.total()


class Accumulator:
    """A running sum of the gradients of one parameter, in thin form while that is the smaller one.

    Parts are only kept until their floats are more than the dense form's; then they are folded into one dense tensor
    that later parts are added to in place. No part is ever changed, and none but the parts kept is held.

    Args:
        keep_factors: Keep the factors even where the dense form is smaller, unless a part is dense itself.

    Example:
        >>> running = Accumulator()
        >>> for _ in range(3):
        ...     running.add(FactoredGradient(torch.ones(2, 9), torch.ones(2, 8)))
        >>> type(running.total(0.5)).__name__, running.floats
        ('DenseGradient', 72)
    """

    def __init__(self, keep_factors: bool = False) -> None:
        """Start with nothing."""
        self._keep_factors = keep_factors
        self._parts: list[LayerGradient] = []
        self._dense: Tensor | None = None
        self._shared = False  # whether a total was handed out that is the dense tensor itself
        self._tokens = 0
        self._shape: tuple[int, ...] | None = None

    @property
    def floats(self) -> int:
        """How many numbers are kept at the moment."""
        return sum(part.floats for part in self._parts) + (0 if self._dense is None else self._dense.numel())

    def add(self, part: LayerGradient) -> None:
        """Add a gradient.

        Raises:
            GeometryError: If it has another shape than those before it.
        """
        if self._shape is None:
            self._shape = part.shape
        if part.shape != self._shape:
            shapes = sorted({part.shape, self._shape})
            raise GeometryError(f"expected gradients of one shape, found {shapes}; add up the same parameter")
        self._tokens += part.tokens
        if self._dense is None:
            self._parts.extend(_parts(part))
            if self._must_fold():
                self._fold()
            return
        if self._shared:
            self._dense, self._shared = self._dense.clone(), False
        part.add_to(self._dense, 1.0)

    def total(self, scale: float = 1.0) -> LayerGradient:
        """Return ``scale`` times the sum so far.

        Factors are concatenated and rows that share an index are summed; where there are both, a
        :class:`~geomkit.gradients.summed.SumGradient` has the two.

        Raises:
            GeometryError: If nothing was added.
        """
        if self._dense is not None:
            self._shared = self._shared or scale == 1.0
            return DenseGradient(self._dense if scale == 1.0 else self._dense * scale, self._tokens)
        if not self._parts:
            raise GeometryError("expected at least one gradient to sum, found none; add one first")
        self._parts = _merged(self._parts)
        whole = self._parts[0] if len(self._parts) == 1 else SumGradient(tuple(self._parts))
        return whole if scale == 1.0 else whole.scaled(scale)

    def _must_fold(self) -> bool:
        if any(isinstance(part, DenseGradient) for part in self._parts):
            return len(self._parts) > 1
        entries = torch.Size(self._parts[0].shape).numel()
        if self.floats <= entries:
            return False
        if sum(isinstance(part, IndexedGradient) for part in self._parts) > 1:
            self._parts = _merged(self._parts)
        return not self._keep_factors and self.floats > entries

    def _fold(self) -> None:
        parts, self._parts = self._parts, []
        dtype = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
        self._dense = torch.zeros(parts[0].shape, dtype=dtype, device=parts[0].device)
        for part in parts:
            part.add_to(self._dense, 1.0)


def _merged(parts: Sequence[LayerGradient]) -> list[LayerGradient]:
    """Bring parts of one form together: at most one factored, one indexed, and a dense one if it is alone."""
    if len(parts) == 1:
        return list(parts)
    kept = [part for part in parts if part.floats] or list(parts[:1])
    factored, indexed = _factored(kept), [part for part in kept if isinstance(part, IndexedGradient)]
    merged: list[LayerGradient] = []
    if factored:
        left, right = torch.cat([part.left for part in factored]), torch.cat([part.right for part in factored])
        merged.append(factored[0] if len(factored) == 1 else FactoredGradient(left, right))
    if indexed:
        merged.append(_coalesced(indexed))
    return merged


def _coalesced(parts: Sequence[IndexedGradient]) -> IndexedGradient:
    if len(parts) == 1:
        return parts[0]
    indices, rows = torch.cat([part.indices for part in parts]), torch.cat([part.rows for part in parts])
    return coalesce(indices, rows, parts[0].size, sum(part.tokens for part in parts))
