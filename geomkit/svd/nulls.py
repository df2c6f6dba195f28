"""Nulls: random gradients and random subspaces that have only the trivial causes of a measure in common with real ones.

Every function here is a pure function of gradients and numbers, with an explicit generator.
"""

import numpy as np
import torch
from torch import Tensor

from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.indexed import IndexedGradient
from geomkit.gradients.layer_gradient import LayerGradient, row_products
from geomkit.gradients.summed import SumGradient
from geomkit.svd.singular_values import singular_values, singular_values_of_gram
from geomkit.utils.arguments import check_finite


def random_factor_null(gradient: LayerGradient, generator: torch.Generator) -> LayerGradient:
    """Return a random gradient that shares only the trivial causes of low rank with the given gradient.

    The causes that are kept depend on the form of the gradient:

    - factored LᵀR: the T right rows (the layer's inputs, hence their covariance) and the norm of every left row; the
      *directions* of the left rows are uniformly random. A spectrum steeper than this null is not explained by the
      token count, the inputs, or the weights of the tokens in the loss.
    - indexed: the rows that were looked up and the norm of every row; the directions are uniformly random.
    - a sum: the causes that its parts keep.
    - dense: only T and the shape. The null is LᵀR with independent standard Gaussian factors, which knows nothing of
      the covariance of the inputs and is therefore a weaker control.

    Args:
        gradient: The gradient to match.
        generator: Source of randomness, on the CPU.

    Returns:
        A gradient of the same shape, with the same number of tokens and no higher rank bound.

    Example:
        >>> null = random_factor_null(FactoredGradient(torch.ones(2, 3), torch.ones(2, 4)), torch.Generator())
        >>> null.tokens, null.shape, bool(torch.equal(null.right, torch.ones(2, 4)))
        (2, (3, 4), True)
    """
    if isinstance(gradient, FactoredGradient):
        return FactoredGradient(_random_directions(gradient.left, generator), gradient.right)
    if isinstance(gradient, IndexedGradient):
        rows = _random_directions(gradient.rows, generator)
        return IndexedGradient(gradient.indices, rows, gradient.size, gradient.tokens)
    if isinstance(gradient, SumGradient):
        return SumGradient(tuple(random_factor_null(part, generator) for part in gradient.parts))
    height, width = gradient.matrix_shape
    tensor = _gaussian_product(height, width, gradient.tokens, generator).reshape(gradient.shape)
    return DenseGradient(tensor.to(gradient.device, torch.float32), gradient.tokens)


class NullDraws:
    """Draws from the nulls of gradients; factored gradients of as many tokens have the same random directions.

    The gradients have the distribution of :func:`random_factor_null`. Those of a factored gradient cost less: singular
    values do not change when the output space is rotated, so that of T ≤ rows random rows only their coordinates in an
    orthonormal basis of their span are drawn, a triangle (Bartlett 1933).
    """

    def __init__(self, draws: int, generator: torch.Generator) -> None:
        """Take the number of draws for every gradient, and a source of randomness on the CPU."""
        self.draws, self._generator = draws, generator
        self._directions: dict[tuple[int, int], list[Tensor]] = {}

    def singular_values(self, gradient: LayerGradient, inputs: Tensor | None = None) -> list[np.ndarray]:
        """Return the singular values of several gradients from the null of a gradient.

        Args:
            gradient: The gradient to match, of T tokens.
            inputs: (T, T) fp64 inner products RRᵀ of the inputs of a factored gradient LᵀR with T below rows and
                columns; computed when left out.

        Returns:
            (rank bound,) fp64 singular values for each draw, descending, exact to 1e-6 of the largest value.
        """
        if not isinstance(gradient, FactoredGradient) or not gradient.tokens:
            drawn = (random_factor_null(gradient, self._generator) for _ in range(self.draws))
            return [singular_values(null) for null in drawn]
        # 1. Shared by all draws: RRᵀ if the T × T Gram matrices are the smallest, otherwise R itself.
        thin = gradient.tokens < min(gradient.shape)
        if not thin:
            inputs = gradient.right
        elif inputs is None:
            inputs = row_products(gradient.right, gradient.right)
        norms = torch.linalg.vector_norm(gradient.left, dim=1, keepdim=True, dtype=torch.float64).to(inputs.dtype)
        spectra = []
        for directions in self._directions_of(gradient):
            # 2. Coordinates C of the random left rows, with the norms of the given rows.
            coordinates = directions.to(norms.device, norms.dtype) * norms
            # 3. CᵀR has the singular values of a draw: CᵀRRᵀC if T is small, otherwise the square of the smaller side.
            if thin:
                squares = coordinates.T @ (inputs @ coordinates)
            else:
                matrix = coordinates.T @ inputs
                smaller = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
                squares = row_products(smaller, smaller)
            check_finite(squares, f"a gradient of shape {gradient.shape}")
            spectra.append(singular_values_of_gram(squares).cpu().numpy()[: gradient.rank_bound])
        return spectra

    def _directions_of(self, gradient: FactoredGradient) -> list[Tensor]:
        """Return the random directions of a gradient's left rows, which are drawn once for each number of tokens."""
        tokens, rows = gradient.left.shape
        if (tokens, rows) not in self._directions:
            self._directions[tokens, rows] = [
                _uniform_directions(tokens, rows, min(tokens, rows), self._generator) for _ in range(self.draws)
            ]
        return self._directions[tokens, rows]


def enough_draws(rank_bound: int, largest: int) -> int:
    """Return how many draws of the null of a spectrum are enough, as the spectra of large random matrices hardly vary.

    Effective ranks of draws differ by 2 to 5 % (standard deviation) at a rank bound of 128, by 1 to 2 % at 576
    (tests/benchmarks/README.md), and the mean over parameters averages over the draws of all parameters. Above a rank
    bound of about 170 one draw is enough, of which the null of a single parameter knows no spread.

    Args:
        rank_bound: Largest possible rank of the gradient.
        largest: Number of draws up to a rank bound of 32.

    Returns:
        ``largest`` · 32 / ``rank_bound``, but at least 1 and at most ``largest``.

    Example:
        >>> [enough_draws(rank_bound, 8) for rank_bound in (30, 128, 576)]
        [8, 2, 1]
    """
    return min(largest, max(1, round(largest * 32 / max(rank_bound, 1))))


def _uniform_directions(count: int, size: int, coordinates: int, generator: torch.Generator) -> Tensor:
    """Return uniformly random directions in a space, in coordinates that keep their inner products.

    Args:
        count: T, number of directions.
        size: Dimension of the space.
        coordinates: min(T, size); with T of them, a triangle.
        generator: Source of randomness.

    Returns:
        (T, coordinates) rows of norm 1, fp32.
    """
    # A Gaussian vector, divided by its norm, is uniform on the sphere.
    drawn = torch.randn(count, coordinates, generator=generator)
    if count <= size:
        # The triangle S of a Gaussian matrix SQ: normals below the diagonal, χ with size − i degrees of freedom on it.
        seed = int(torch.randint(2**62, (1,), generator=generator))
        freedom = size - np.arange(count)
        diagonal = np.sqrt(np.random.default_rng(seed).chisquare(freedom))
        drawn = drawn.tril(-1) + torch.diag(torch.from_numpy(diagonal).float())
    directions: Tensor = drawn / torch.linalg.vector_norm(drawn, dim=1, keepdim=True)
    return directions


def _random_directions(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Return rows in uniformly random directions, with the norms of the given rows."""
    # A Gaussian vector, divided by its norm, is uniform on the sphere.
    directions = torch.randn(rows.shape, generator=generator, dtype=torch.float64).to(rows.device)
    norms = torch.linalg.vector_norm(rows.double(), dim=1, keepdim=True)
    scaled: Tensor = directions * (norms / torch.linalg.vector_norm(directions, dim=1, keepdim=True))
    return scaled.to(rows.dtype)


def _gaussian_product(height: int, width: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Return a random LᵀR of Gaussian factors L (T, height) and R (T, width), at a cost that T does not raise."""
    if tokens < width:
        left, right = (torch.randn(tokens, size, generator=generator, dtype=torch.float64) for size in (height, width))
        return left.T @ right
    # 1. R = QS with orthonormal Q. S is the upper triangle of the Bartlett decomposition of the Wishart matrix RᵀR
    #    (Bartlett 1933): standard normals above the diagonal, and χ with T − i degrees of freedom on it.
    upper = torch.randn(width, width, generator=generator, dtype=torch.float64).triu(1)
    # torch offers a generator for normals only, numpy for chi-squares.
    seed = int(torch.randint(2**62, (1,), generator=generator))
    freedom = tokens - np.arange(width)
    diagonal = torch.from_numpy(np.sqrt(np.random.default_rng(seed).chisquare(freedom)))
    # 2. LᵀQ is Gaussian, as L is and Q is independent of it.
    left_q = torch.randn(height, width, generator=generator, dtype=torch.float64)
    # 3. LᵀR = (LᵀQ) S.
    return left_q @ (upper + torch.diag(diagonal))


def haar_overlap(rank_a: int, rank_b: int, dimension: int) -> float:
    """Return the expected overlap ‖UᵀV‖_F² / min(k_a, k_b) of two uniformly random subspaces, max(k_a, k_b) / d.

    Args:
        rank_a: Dimension k_a of the first subspace.
        rank_b: Dimension k_b of the second subspace.
        dimension: Dimension d of the space.

    Example:
        >>> round(haar_overlap(20, 20, 4096), 4)
        0.0049
    """
    return max(rank_a, rank_b) / dimension


def random_edge(rank_a: int, rank_b: int, dimension: int) -> float:
    """Return the largest cosine to be expected between two uniformly random subspaces of a space of high dimension.

    With a = k_a/d and b = k_b/d the cosine is √(a(1−b)) + √(b(1−a)) (Wachter 1980), and 1 where a + b ≥ 1, as the two
    subspaces then intersect.

    Args:
        rank_a: Dimension k_a of the first subspace.
        rank_b: Dimension k_b of the second subspace.
        dimension: Dimension d of the space.

    Example:
        >>> round(random_edge(20, 20, 4096), 3), random_edge(3, 3, 4)
        (0.139, 1.0)
    """
    a, b = rank_a / dimension, rank_b / dimension
    if a + b >= 1:
        return 1.0
    return float((a * (1 - b)) ** 0.5 + (b * (1 - a)) ** 0.5)
