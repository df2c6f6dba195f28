"""The leading subspace of the mean of all gradients but one, for each in turn."""

from collections.abc import Sequence

import torch
from torch import Tensor

from geomkit.algebra import add
from geomkit.forms import IndexedGradient
from geomkit.layer_gradient import Factors, LayerGradient, thin_factors
from geomkit.subspaces import Side, layer_subspace
from geomkit.svd import rank_tolerance


def bases_without_each(gradients: Sequence[LayerGradient], rank: int, side: Side) -> list[Tensor]:
    """Return, for each gradient, the leading singular vectors of the sum of the others.

    While all tokens together are fewer than either dimension, one QR serves all sums: they differ in a T × T middle
    only, of which a Gram matrix gives the leading vectors (squaring loses nothing above the fp32 tolerance).

    Args:
        gradients: N gradients of one parameter.
        rank: How many vectors, at most; never beyond the numeric rank.
        side: Which singular vectors.

    Returns:
        N bases of shape (d, k_i) with orthonormal columns, fp32.
    """
    # Rows that were looked up are few among many: their sums are cheaper than one frame of one-hot factors.
    if not any(isinstance(gradient, IndexedGradient) for gradient in gradients):
        thin = [factors for gradient in gradients if (factors := thin_factors(gradient)) is not None]
        tokens = sum(len(left) for left, _ in thin)
        if len(thin) == len(gradients) and tokens < min(gradients[0].matrix_shape):
            return _by_one_frame(thin, rank, side)
    sums = (add([*gradients[:place], *gradients[place + 1 :]]) for place in range(len(gradients)))
    return [layer_subspace(total, rank=rank, side=side).basis for total in sums]


def _by_one_frame(gradients: Sequence[Factors], rank: int, side: Side) -> list[Tensor]:
    left, right = (torch.cat(parts).double() for parts in zip(*gradients, strict=True))
    shape = left.shape[1], right.shape[1]
    own, other = (left, right) if side == "left" else (right, left)
    frame, own_triangle = torch.linalg.qr(own.T)
    other_triangle = torch.linalg.qr(other.T, mode="r").R
    frame = frame.contiguous()  # products of its columns with few vectors are 14 times slower in QR's own layout
    lengths = [len(part) for part, _ in gradients]
    whole = own_triangle @ other_triangle.T
    cores = (
        whole - mine @ theirs.T
        for mine, theirs in zip(own_triangle.split(lengths, 1), other_triangle.split(lengths, 1), strict=True)
    )
    return [(frame @ _leading(core, rank, shape)).float() for core in cores]


def _leading(core: Tensor, rank: int, shape: tuple[int, int]) -> Tensor:
    squared, vectors = torch.linalg.eigh(core @ core.T)
    leading: Tensor = vectors.flip(1)
    values = squared.clamp(min=0).sqrt().flip(0)
    numeric_rank = int((values > rank_tolerance(values.cpu().numpy(), shape)).sum())
    return leading[:, : min(rank, numeric_rank)]
