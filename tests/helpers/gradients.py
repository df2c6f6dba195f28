"""Random gradients of every form with known tokens, and the dense matrices for comparison."""

import numpy as np
import torch

from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.indexed import IndexedGradient, coalesce
from geomkit.gradients.layer_gradient import LayerGradient, as_matrix
from geomkit.gradients.summed import SumGradient


def gaussian(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def factored(tokens: int, rows: int, columns: int, seed: int = 0) -> FactoredGradient:
    return FactoredGradient(gaussian(tokens, rows, seed=seed), gaussian(tokens, columns, seed=seed + 1))


def indexed() -> IndexedGradient:
    return IndexedGradient(torch.tensor([1, 4, 6]), gaussian(3, 5), size=9, tokens=7)


def exact(gradient: LayerGradient) -> np.ndarray:
    if isinstance(gradient, SumGradient):
        return sum((exact(part) for part in gradient.parts), np.zeros(gradient.shape))
    if isinstance(gradient, FactoredGradient):
        return (gradient.left.double().T @ gradient.right.double()).numpy()
    return as_matrix(gradient).double().numpy()


def rotation(size: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(gaussian(size, size, seed=seed).double()).Q


def tied(tokens: int = 4, rows: int = 30, columns: int = 12) -> SumGradient:
    """What a tied embedding and head have: factors over the tokens, and rows that were looked up."""
    looked_up = coalesce(torch.tensor([3, 1, 3, 8]), gaussian(4, columns, seed=5), rows, 4)
    return SumGradient((factored(tokens, rows, columns), looked_up))


DEFICIENT = FactoredGradient(torch.ones(6, 10), gaussian(6, 20))


GRADIENTS = {
    "few tokens": factored(7, 40, 30),
    "one token": factored(1, 12, 9),
    "tokens between the sides": factored(20, 40, 16),
    "many tokens": factored(100, 12, 16),
    "rank deficient": DEFICIENT,
    "indexed": indexed(),
    "dense": DenseGradient(gaussian(14, 9), tokens=50),
    "experts": DenseGradient(gaussian(3, 4, 8), tokens=60),
    "tied, few tokens": tied(),
    "tied, many tokens": tied(tokens=40),
    "tied, wide": tied(rows=12, columns=30),
    "sum with a dense part": SumGradient((DenseGradient(gaussian(14, 9), tokens=50), factored(3, 14, 9))),
}
