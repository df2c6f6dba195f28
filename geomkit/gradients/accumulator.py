"""Sums of gradients of one parameter, in thin form as long as this form has fewer numbers than the parameter."""

from collections.abc import Sequence

import torch
from torch import Tensor

from geomkit.errors import GeometryError
from geomkit.gradients.arithmetic import factored_of, parts_of
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.indexed import IndexedGradient, coalesce
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.gradients.summed import SumGradient


def add(parts: Sequence[LayerGradient], *, keep_factors: bool = False) -> LayerGradient:
    """Return the sum of gradients of one parameter, in thin form if this form has fewer numbers than the parameter.

    Args:
        parts: At least one gradient.
        keep_factors: Return factors even if the dense form is smaller, as null models need them.

    Returns:
        The sum, in the form that :meth:`Accumulator.total` gives it.

    Raises:
        GeometryError: If there is no gradient, or the shapes differ.
    """
    if keep_factors and len(parts) == 1:  # the usual case for an example's gradient, whose parameter is used once
        return parts[0]
    running = Accumulator(keep_factors=keep_factors)
    for part in parts:
        running.add(part)
    return running.total()


class Accumulator:
    """Running sum of gradients of one parameter, in thin form as long as it has fewer numbers than the parameter.

    Added gradients are stored as they are until together they have more numbers than the parameter. Then they are added
    up in one dense tensor, and later gradients are added to this tensor in place. The added gradients do not change.

    Args:
        keep_factors: Keep factors even if the dense form is smaller, unless a dense gradient is added.

    Example:
        >>> running = Accumulator()
        >>> for _ in range(3):
        ...     running.add(FactoredGradient(torch.ones(2, 9), torch.ones(2, 8)))
        >>> type(running.total(0.5)).__name__, running.floats
        ('DenseGradient', 72)
    """

    def __init__(self, keep_factors: bool = False) -> None:
        """Start an empty sum."""
        self._keep_factors = keep_factors
        self._parts: list[LayerGradient] = []
        self._dense: Tensor | None = None
        self._dense_is_shared = False  # whether a total was returned that has the dense tensor itself
        self._tokens = 0
        self._shape: tuple[int, ...] | None = None

    @property
    def floats(self) -> int:
        """Number of floating-point numbers that are stored at the moment."""
        return sum(part.floats for part in self._parts) + (0 if self._dense is None else self._dense.numel())

    def add(self, part: LayerGradient) -> None:
        """Add a gradient to the sum.

        Raises:
            GeometryError: If its shape differs from the shape of the gradients before.
        """
        if self._shape is None:
            self._shape = part.shape
        if part.shape != self._shape:
            shapes = sorted({part.shape, self._shape})
            raise GeometryError(f"expected gradients of one shape, found {shapes}; add up the same parameter")
        self._tokens += part.tokens
        # 1. As long as the sum is thin: store the parts, and make the sum dense once the dense form is smaller.
        if self._dense is None:
            self._parts.extend(parts_of(part))
            if self._must_become_dense():
                self._become_dense()
            return
        # 2. Afterwards: add in place, to a copy if the tensor was returned before.
        if self._dense_is_shared:
            self._dense, self._dense_is_shared = self._dense.clone(), False
        part.add_to(self._dense, 1.0)

    def total(self, scale: float = 1.0) -> LayerGradient:
        """Return ``scale`` times the sum so far.

        Factors are concatenated, and rows with the same index are added up. A sum with both forms is a
        :class:`~geomkit.gradients.summed.SumGradient`.

        Raises:
            GeometryError: If no gradient was added.
        """
        if self._dense is not None:
            self._dense_is_shared = self._dense_is_shared or scale == 1.0
            return DenseGradient(self._dense if scale == 1.0 else self._dense * scale, self._tokens)
        if not self._parts:
            raise GeometryError("expected at least one gradient to sum, found none; add one first")
        self._parts = _merged(self._parts)
        total = self._parts[0] if len(self._parts) == 1 else SumGradient(tuple(self._parts))
        return total if scale == 1.0 else total.scaled(scale)

    def _must_become_dense(self) -> bool:
        if any(isinstance(part, DenseGradient) for part in self._parts):
            return len(self._parts) > 1
        entries = torch.Size(self._parts[0].shape).numel()
        if self.floats <= entries:
            return False
        # Rows with the same index may make the thin form small again.
        if sum(isinstance(part, IndexedGradient) for part in self._parts) > 1:
            self._parts = _merged(self._parts)
        return not self._keep_factors and self.floats > entries

    def _become_dense(self) -> None:
        parts, self._parts = self._parts, []
        dtype = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
        self._dense = torch.zeros(parts[0].shape, dtype=dtype, device=parts[0].device)
        for part in parts:
            part.add_to(self._dense, 1.0)


def _merged(parts: Sequence[LayerGradient]) -> list[LayerGradient]:
    """Return the parts with all factored parts merged, and all indexed parts; a dense part is the only part."""
    if len(parts) == 1:
        return list(parts)
    parts = [part for part in parts if part.floats] or list(parts[:1])
    factored, indexed = factored_of(parts), [part for part in parts if isinstance(part, IndexedGradient)]
    merged: list[LayerGradient] = []
    if factored:
        # Σ_k L_kᵀ R_k = LᵀR, where L stacks all L_k and R stacks all R_k.
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
