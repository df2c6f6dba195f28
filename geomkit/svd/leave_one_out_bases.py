"""Leading singular vectors of single gradients, and of their sum without one of them.

The sum without an example differs little from the sum of all, whose leading vectors are a good start: a step
of subspace iteration with a few directions to spare reaches the leading vectors without the example.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from geomkit.gradients.accumulator import add
from geomkit.gradients.layer_gradient import Factors, LayerGradient, thin_factors
from geomkit.svd.eigenpairs import largest_eigenpairs
from geomkit.svd.singular_values import gram_of_smaller_side, rank_tolerance
from geomkit.svd.singular_vectors import Side
from geomkit.utils.arguments import check_finite

_SPARE = 10
"""Directions of the iteration beyond the wanted rank; the error falls by (σ_{k+spare}/σ_k)² a step."""
_STEPS = 1
"""Steps of the iteration; tests/benchmarks/README.md tells what a second step would change."""
_CANCELLED = 1e-7
"""Singular value, relative to ‖L‖‖R‖, below which a gradient LᵀR of fp32 factors is rounding."""
_SMALL = 64
"""Largest smaller dimension at which the sums without each gradient are decomposed."""
_PADDING = 1.25
"""Largest ratio of the longest to the shortest factors of a batch."""
_NUMBERS = 2**24
"""Largest number of entries of the iterated bases of the sums that are in memory at a time."""


def example_bases(gradients: Sequence[LayerGradient], side: Side, rank: int) -> list[Tensor]:
    """Return the leading singular vectors of every gradient.

    Args:
        gradients: N gradients of one parameter.
        side: Side of the singular vectors.
        rank: Largest number of vectors; a basis has fewer if the numeric rank of the gradient is lower.

    Returns:
        N bases (d, k) with orthonormal columns, fp32.

    Raises:
        GeometryError: If a gradient is not finite.
    """
    bases: dict[int, Tensor] = {}
    shape = gradients[0].matrix_shape
    batch: list[tuple[int, Factors]] = []
    # Factors of one batch are padded to the longest, so a batch has factors of like length.
    for place in sorted(range(len(gradients)), key=lambda place: gradients[place].tokens):
        factors = thin_factors(gradients[place])
        if factors is None:
            bases[place] = _leading(gradients[place], side, rank).float()
            continue
        if batch and _is_full(batch, len(factors[0]), shape):
            bases |= _of_batch(batch, shape, rank)
            batch = []
        batch.append((place, factors if side == "left" else factors[::-1]))
    bases |= _of_batch(batch, shape, rank)
    return [bases[place] for place in range(len(gradients))]


def _is_full(batch: Sequence[tuple[int, Factors]], tokens: int, shape: tuple[int, int]) -> bool:
    """Return whether a batch has many numbers already, or would be padded much for further factors of some tokens."""
    return len(batch) * tokens * sum(shape) >= _NUMBERS // 4 or tokens > _PADDING * len(batch[0][1][0])


def leave_one_out_bases(gradients: Sequence[LayerGradient], side: Side, rank: int) -> list[Tensor]:
    """Return the leading singular vectors of the sum of N gradients without one of them, for every one in turn.

    Args:
        gradients: N gradients of one parameter.
        side: Side of the singular vectors.
        rank: Largest number of vectors; a basis has fewer if the numeric rank of the sum is lower.

    Returns:
        N + 1 bases (d, k) with orthonormal columns, fp32: without every gradient in turn, and of the whole sum.

    Raises:
        GeometryError: If a gradient is not finite.
    """
    total = add(gradients)
    shape, width = total.matrix_shape, rank + _SPARE
    # 1. The leading vectors of the whole sum on the other side are the start of every iteration.
    vectors, start = (basis.float() for basis in _both_sides(total, side, width))
    whole = vectors[:, :rank]
    if start.shape[1] < width or min(shape) <= _SMALL:
        # A sum of low rank has no direction to spare; it and a small one are cheap to decompose without each gradient.
        rests = (add([*gradients[:place], *gradients[place + 1 :]]) for place in range(len(gradients)))
        return [*(_leading(rest, side, rank).float() for rest in rests), whole]
    bases: list[Tensor] = []
    step = max(1, _NUMBERS // (max(shape) * width))
    for first in range(0, len(gradients), step):
        chunk = _Chunk(total, gradients[first : first + step])
        forward, backward = (chunk.times, chunk.transposed_times)[:: 1 if side == "left" else -1]
        blocks = start.expand(len(chunk.gradients), *start.shape)
        # 2. X ← orth((G − G_n)ᵀ (G − G_n) X) for all n of the chunk side by side.
        for _ in range(_STEPS):
            blocks = torch.linalg.qr(backward(forward(blocks))).Q
        # 3. The leading left singular vectors of (G − G_n) X.
        bases += _left_vectors(forward(blocks), rank, shape)
    return [*bases, whole]


class _Chunk:
    """The sums G − G_n of all gradients without one of B gradients, as operators on blocks of columns.

    Products with G are one product for all n; those with small factors G_n are one product of a batch.
    """

    def __init__(self, total: LayerGradient, gradients: Sequence[LayerGradient]) -> None:
        self._total, self.gradients = total, gradients
        factors = [pair for gradient in gradients if (pair := thin_factors(gradient)) is not None]
        self._factors: Factors | None = None
        longest = max((len(left) for left, _ in factors), default=0)
        if len(factors) == len(gradients) and len(factors) * longest * sum(total.matrix_shape) <= _NUMBERS // 2:
            left, right = (pad_sequence(list(side), batch_first=True).float() for side in zip(*factors, strict=True))
            self._factors = left, right

    def times(self, blocks: Tensor) -> Tensor:
        """Return the products (G − G_n) X_n, (B, rows, b), for blocks (B, columns, b)."""
        images = _columns_apart(self._total.matmul(_side_by_side(blocks)), len(blocks))
        if self._factors:
            left, right = self._factors
            return images - left.mT @ (right @ blocks)
        parts = (gradient.matmul(block) for gradient, block in zip(self.gradients, blocks, strict=True))
        return torch.stack([image - part for image, part in zip(images, parts, strict=True)])

    def transposed_times(self, blocks: Tensor) -> Tensor:
        """Return the products (G − G_n)ᵀ Y_n, (B, columns, b), for blocks (B, rows, b)."""
        images = _columns_apart(self._total.rmatmul(_side_by_side(blocks).T).T, len(blocks))
        if self._factors:
            left, right = self._factors
            return images - right.mT @ (left @ blocks)
        parts = (gradient.rmatmul(block.T).T for gradient, block in zip(self.gradients, blocks, strict=True))
        return torch.stack([image - part for image, part in zip(images, parts, strict=True)])


def _side_by_side(blocks: Tensor) -> Tensor:
    """Return (d, B · b) blocks (B, d, b) side by side."""
    return blocks.transpose(0, 1).flatten(1)


def _columns_apart(columns: Tensor, count: int) -> Tensor:
    """Return (B, d, b) blocks from (d, B · b) blocks side by side."""
    return columns.reshape(len(columns), count, -1).transpose(0, 1)


def _left_vectors(images: Tensor, rank: int, shape: tuple[int, int]) -> list[Tensor]:
    """Return the leading left singular vectors of B matrices (B, d, b) with few columns, fp32."""
    precise = images.double()
    squared, vectors = torch.linalg.eigh(precise.mT @ precise)
    values = squared.clamp(min=0).sqrt().flip(1)[:, :rank]
    counts = [int((row > rank_tolerance(row, shape)).sum()) for row in values.cpu().numpy()]
    scaled = (vectors.flip(2)[..., :rank] / values.clamp(min=torch.finfo(values.dtype).tiny)[:, None]).to(images.dtype)
    return [basis[:, :count] for basis, count in zip(images @ scaled, counts, strict=True)]


def _leading(gradient: LayerGradient, side: Side, rank: int) -> Tensor:
    """Return the leading singular vectors of one gradient on one side, fp64."""
    if factors := thin_factors(gradient):
        return _of_factors(factors, gradient.matrix_shape, side, rank)
    basis, values, smaller = _on_smaller_side(gradient, rank)
    return basis if side == smaller else _images(gradient, basis, smaller) / values


def _both_sides(gradient: LayerGradient, side: Side, rank: int) -> tuple[Tensor, Tensor]:
    """Return the leading singular vectors of one gradient on one side, and on the other, from one decomposition."""
    if factors := thin_factors(gradient):
        basis = _of_factors(factors, gradient.matrix_shape, side, rank)
        images = _images(gradient, basis, side)
        return basis, images / torch.linalg.vector_norm(images, dim=0)
    basis, values, smaller = _on_smaller_side(gradient, rank)
    images = _images(gradient, basis, smaller) / values
    return (basis, images) if side == smaller else (images, basis)


def _of_factors(factors: Factors, shape: tuple[int, int], side: Side, rank: int) -> Tensor:
    return _of_batch([(0, factors if side == "left" else factors[::-1])], shape, rank)[0].double()


def _on_smaller_side(gradient: LayerGradient, rank: int) -> tuple[Tensor, Tensor, Side]:
    """Return the leading singular vectors on the side of the smaller dimension, their singular values, and the side."""
    shape = gradient.matrix_shape
    gram = gram_of_smaller_side(gradient)
    check_finite(gram, f"a gradient of shape {shape}")
    squared, vectors = largest_eigenpairs(gram[None], rank)
    values = squared[0].clamp(min=0).sqrt()
    count = int((values > rank_tolerance(values.cpu().numpy(), shape)).sum())
    return vectors[0][:, :count], values[:count], "left" if shape[0] < shape[1] else "right"


def _images(gradient: LayerGradient, basis: Tensor, side: Side) -> Tensor:
    """Return the images of singular vectors of one side: vectors of the other side times their singular values."""
    return gradient.rmatmul(basis.T).T if side == "left" else gradient.matmul(basis)


def _of_batch(batch: Sequence[tuple[int, Factors]], shape: tuple[int, int], rank: int) -> dict[int, Tensor]:
    """Return the leading left singular vectors of LᵀR for several factors of few tokens, by place, fp32.

    Args:
        batch: Places, and factors L (T, p) and R (T, q).
        shape: Rows and columns of the parameter, for the tolerance of the rank.
        rank: Largest number of vectors.
    """
    if not batch:
        return {}
    places, factors = zip(*batch, strict=True)
    left, right = (pad_sequence(list(side), batch_first=True).double() for side in zip(*factors, strict=True))
    if not left.shape[1]:
        return {place: left.new_zeros(left.shape[2], 0).float() for place in places}
    # 1. RRᵀ = WWᵀ.
    inputs = right @ right.mT
    check_finite(inputs, f"a gradient of shape {shape}")
    roots = _roots(inputs)
    # 2. LᵀR (LᵀR)ᵀ = (WᵀL)ᵀ (WᵀL): with WᵀLLᵀW = E Λ Eᵀ, the left vectors are LᵀWE Λ^(-1/2).
    outputs = left @ left.mT
    gram = roots.mT @ outputs @ roots
    check_finite(gram, f"a gradient of shape {shape}")
    squared, vectors = torch.linalg.eigh(gram)
    values = squared.clamp(min=0).sqrt().flip(1)[:, :rank]
    combined = roots @ vectors.flip(2)[..., :rank]
    # Tokens that cancel up to the rounding of fp32 leave no direction.
    sizes = (_traces(inputs) * _traces(outputs)).sqrt()
    values = torch.where(values > _CANCELLED * sizes[:, None], values, 0.0)
    counts = [int((row > rank_tolerance(row, shape)).sum()) for row in values.cpu().numpy()]
    scaled = combined / values.clamp(min=torch.finfo(values.dtype).tiny)[:, None]
    bases = (left.mT @ scaled).float()
    return {place: basis[:, :count] for place, basis, count in zip(places, bases, counts, strict=True)}


def _traces(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2).sum(1)


def _roots(grams: Tensor) -> Tensor:
    """Return matrices W with WWᵀ = the given Gram matrices (B, T, T), up to 1e-14 of the largest entry.

    The small multiple of the identity keeps the Cholesky decomposition from failing where tokens repeat one another.
    """
    largest = grams.diagonal(dim1=1, dim2=2).amax(1)[:, None, None]
    nonzero = largest > 0
    identity = torch.eye(grams.shape[1], dtype=grams.dtype, device=grams.device)
    added = torch.where(nonzero, 1e-14 * grams.shape[1] * largest, 1.0)
    lower, failed = torch.linalg.cholesky_ex(grams + added * identity)
    if failed.any():
        squared, vectors = torch.linalg.eigh(grams)
        lower = vectors * squared.clamp(min=0).sqrt()[:, None]
    roots: Tensor = lower * nonzero
    return roots
