"""Nulls: gradients and subspaces that share the trivial causes of a measure and nothing else.

Everything here is a pure function of gradients and numbers with an explicit generator; nothing knows a model.
"""

import numpy as np
import torch
from torch import Tensor

from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.indexed import IndexedGradient
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.gradients.summed import SumGradient


def random_factor_null(gradient: LayerGradient, generator: torch.Generator) -> LayerGradient:
    """Draw a gradient that shares the trivial causes of low rank and nothing else.

    What is kept depends on what the form still knows:

    - factored LᵀR: the T right rows (the layer's inputs, hence their covariance) and the norm of each left row; the
      *directions* of the left rows are drawn uniformly. A spectrum steeper than this null is not explained by the
      token count, the inputs, or how the loss weighs its tokens.
    - indexed: the rows that were looked up and the norm of each; their directions are drawn uniformly.
    - a sum: what each of its parts keeps.
    - dense: only T and the shape. The null is LᵀR with independent standard Gaussian factors, which knows nothing of
      the inputs' covariance and is therefore a weaker control.

    Args:
        gradient: The gradient to match.
        generator: Source of randomness, on the CPU.

    Returns:
        A gradient of the same shape, the same number of tokens and no higher rank bound.

    Example:
        >>> drawn = random_factor_null(FactoredGradient(torch.ones(2, 3), torch.ones(2, 4)), torch.Generator())
        >>> drawn.tokens, drawn.shape, bool(torch.equal(drawn.right, torch.ones(2, 4)))
        (2, (3, 4), True)
    """
    if isinstance(gradient, FactoredGradient):
        return FactoredGradient(_turned(gradient.left, generator), gradient.right)
    if isinstance(gradient, IndexedGradient):
        rows = _turned(gradient.rows, generator)
        return IndexedGradient(gradient.indices, rows, gradient.size, gradient.tokens)
    if isinstance(gradient, SumGradient):
        return SumGradient(tuple(random_factor_null(part, generator) for part in gradient.parts))
    height, width = gradient.matrix_shape
    tensor = _gaussian_product(height, width, gradient.tokens, generator).reshape(gradient.shape)
    return DenseGradient(tensor.to(gradient.device, torch.float32), gradient.tokens)


def _turned(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Give each row a uniformly random direction and keep its norm."""
    drawn = torch.randn(rows.shape, generator=generator, dtype=torch.float64).to(rows.device)
    norms = torch.linalg.vector_norm(rows.double(), dim=1, keepdim=True)
    turned: Tensor = drawn * (norms / torch.linalg.vector_norm(drawn, dim=1, keepdim=True))
    return turned.to(rows.dtype)


def _gaussian_product(height: int, width: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Draw LᵀR of Gaussian factors; with many tokens without drawing the factors.

    For T ≥ columns, R = QS with S from the Bartlett decomposition of a Wishart matrix (Bartlett 1933), and LᵀQ is
    Gaussian again, so the cost does not grow with T.
    """
    if tokens < width:
        left, right = (torch.randn(tokens, size, generator=generator, dtype=torch.float64) for size in (height, width))
        return left.T @ right
    upper = torch.randn(width, width, generator=generator, dtype=torch.float64).triu(1)
    # A sum of T - i squared normals: torch offers a generator for normals only, numpy for chi-squares.
    seed = int(torch.randint(2**62, (1,), generator=generator))
    freedom = tokens - np.arange(width)
    diagonal = torch.from_numpy(np.sqrt(np.random.default_rng(seed).chisquare(freedom)))
    turned = torch.randn(height, width, generator=generator, dtype=torch.float64)
    return turned @ (upper + torch.diag(diagonal))


# ------------------------------------------------------------------------------------------- random subspaces


def haar_overlap(rank_a: int, rank_b: int, dimension: int) -> float:
    """Return the expected overlap ‖UᵀV‖_F² / min(k_a, k_b) of two uniformly random subspaces: max(k_a, k_b) / d.

    Example:
        >>> round(haar_overlap(20, 20, 4096), 4)
        0.0049
    """
    return max(rank_a, rank_b) / dimension


def random_edge(rank_a: int, rank_b: int, dimension: int) -> float:
    """Return the largest cosine to be expected between two uniformly random subspaces of high dimension.

    With a = k_a/d and b = k_b/d it is √(a(1−b)) + √(b(1−a)) (Wachter 1980), and 1 where a + b ≥ 1: the two must meet.

    Example:
        >>> round(random_edge(20, 20, 4096), 3), random_edge(3, 3, 4)
        (0.139, 1.0)
    """
    a, b = rank_a / dimension, rank_b / dimension
    if a + b >= 1:
        return 1.0
    return float((a * (1 - b)) ** 0.5 + (b * (1 - a)) ** 0.5)
