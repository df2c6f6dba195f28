"""Nulls and intervals: what a measure would show if there were nothing to find, and how far it is from certain.

Everything here is a pure function of numbers and gradients with an explicit generator; nothing knows a model.
"""

import logging
from collections.abc import Mapping, Sequence
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from geomkit.errors import GeometryError
from geomkit.forms import DenseGradient, FactoredGradient, IndexedGradient, SumGradient
from geomkit.layer_gradient import LayerGradient

_LOGGER = logging.getLogger(__name__)

# --------------------------------------------------------------------------------------------- null gradients


def parameter_generator(seed: int, parameter: str) -> torch.Generator:
    """Return a generator for the draws of one parameter, the same whichever other parameters are measured."""
    # torch's CPU generator reads the low 32 bits of a seed only, so the two are mixed rather than packed.
    mixed = np.random.SeedSequence([seed, crc32(parameter.encode())]).generate_state(1)[0]
    return torch.Generator().manual_seed(int(mixed))


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


def subsample_tokens(
    gradients: Mapping[str, LayerGradient], tokens: Mapping[str, int] | int, generator: torch.Generator
) -> dict[str, LayerGradient]:
    """Keep a random subset of the tokens of each gradient, so that spectra are compared at equal T.

    The kept tokens are not reweighted: spectra, subspaces and cosines do not depend on the scale.

    Args:
        gradients: Factored gradients by parameter; see ``keep_factors`` of :func:`geomkit.algebra.add`.
        tokens: How many tokens to keep: one number, or one for each parameter.
        generator: Source of randomness, on the CPU.

    Returns:
        Factored gradients with that many tokens, by parameter.

    Raises:
        GeometryError: If a gradient is not factored, has fewer tokens, or has no count given.
    """
    counts = dict.fromkeys(gradients, tokens) if isinstance(tokens, int) else tokens
    if missing := [name for name in gradients if name not in counts]:
        raise GeometryError(f"expected a token count for every parameter, found none for {missing[:4]}; add them")
    return {name: _subsampled(name, gradient, counts[name], generator) for name, gradient in gradients.items()}


def _subsampled(name: str, gradient: LayerGradient, tokens: int, generator: torch.Generator) -> FactoredGradient:
    if not isinstance(gradient, FactoredGradient):
        found = type(gradient).__name__
        raise GeometryError(f"expected a factored gradient of {name}, found {found}; leave it out or keep its factors")
    if not 0 < tokens <= gradient.tokens:
        raise GeometryError(
            f"expected 1 to {gradient.tokens} tokens of {name}, found {tokens}; subsample the side with more tokens"
        )
    kept = torch.randperm(gradient.tokens, generator=generator)[:tokens].sort().values.to(gradient.left.device)
    return FactoredGradient(gradient.left[kept], gradient.right[kept])


def match_tokens(
    first: Mapping[str, LayerGradient], second: Mapping[str, LayerGradient], *, seed: int = 0
) -> tuple[dict[str, LayerGradient], dict[str, LayerGradient]]:
    """Bring two gradients to the same number of tokens, parameter by parameter, so that their spectra compare.

    Where one side has more tokens, a random subset of them is kept. Only factored gradients can be thinned out: the
    linear layers of sets collected with ``form="factored"``; all others are left out. So is, with a logged warning, a
    layer whose gradient is zero on a side, as that of LoRA's ``lora_A`` is before the first step.

    Args:
        first: Gradients by parameter.
        second: Gradients of the same parameters.
        seed: Seed of the subsets; one parameter's does not depend on which others there are.

    Returns:
        Both sides, with the parameters that are factored on both.

    Raises:
        GeometryError: If there is no such parameter.
    """
    both = [name for name in first if name in second]
    factored = [name for name in both if all(isinstance(side[name], FactoredGradient) for side in (first, second))]
    tokens = {name: min(first[name].tokens, second[name].tokens) for name in factored}
    names = [name for name in factored if tokens[name] > 0]
    if not names:
        raise GeometryError(_nothing_to_match([*first.values(), *second.values()], both, factored))
    if zero := [name for name in factored if tokens[name] == 0]:
        _LOGGER.warning("left %d of %d layers out, whose gradient is zero: %s", len(zero), len(factored), zero[:4])

    def thinned(side: Mapping[str, LayerGradient], place: int) -> dict[str, LayerGradient]:
        generators = {name: parameter_generator(2 * seed + place, name) for name in names}
        return {name: _subsampled(name, side[name], tokens[name], generators[name]) for name in names}

    return thinned(first, 0), thinned(second, 1)


def _nothing_to_match(gradients: Sequence[LayerGradient], both: Sequence[str], factored: Sequence[str]) -> str:
    if factored:
        return f"expected a gradient that is not zero on either side, found none in {factored[:4]}; train these first"
    if not both:
        return "expected gradients of the same parameters, found none in common; collect both with the same layers="
    if any(
        isinstance(gradient, FactoredGradient) or len(gradient.shape) == 2
        for gradient in gradients
        if not isinstance(gradient, IndexedGradient)
    ):
        return 'expected factored gradients on both sides, found none; collect both with form="factored"'
    return f"expected the weight of a linear layer, found none among {both[:4]}; choose others with layers="


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


# --------------------------------------------------------------------------------------- resampling of examples


def bootstrap_weights(examples: int, draws: int, generator: np.random.Generator) -> np.ndarray:
    """Draw examples with replacement, as weights.

    Args:
        examples: N, how many there are.
        draws: How often to resample.
        generator: Source of randomness.

    Returns:
        (draws, N) weights, each row summing to one: a resampled mean is a product with the values.
    """
    return np.asarray(generator.multinomial(examples, np.full(examples, 1 / examples), size=draws) / examples)


def permuted_labels(first: int, second: int, draws: int, generator: np.random.Generator) -> np.ndarray:
    """Deal pooled examples into two groups of the given sizes at random.

    Args:
        first: Size of the first group.
        second: Size of the second group.
        draws: How often to deal.
        generator: Source of randomness.

    Returns:
        (draws, first + second) booleans: whether an example is in the first group.
    """
    order = generator.permuted(np.tile(np.arange(first + second), (draws, 1)), axis=1)
    return np.asarray(order < first)


def percentile_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Return the central interval that holds a share ``confidence`` of the values.

    Example:
        >>> low, high = percentile_interval(np.arange(101.0), 0.9)
        >>> round(low), round(high)
        (5, 95)
    """
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, (tail, 1 - tail))
    return float(low), float(high)


def bootstrap_interval(
    values: np.ndarray, generator: np.random.Generator, confidence: float = 0.95, *, draws: int = 2000
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a mean, widened for few values.

    A resampled mean varies less than the mean by √((n−1)/n), and its percentiles ignore that the spread is itself
    estimated; deviations are stretched by √(n/(n−1)) · t/z for both (Hesterberg 2015). With 6 to 64 skewed values,
    94 to 95 % of nominal 95 % intervals held the mean, against 87 to 94 % of the plain ones.

    Args:
        values: (n,) at least two.
        generator: Source of randomness.
        confidence: Share of experiments whose interval should hold the expected value.
        draws: How often to resample.
    """
    from scipy.stats import norm, t

    n, tail = len(values), (1 + confidence) / 2
    stretch = (n / (n - 1)) ** 0.5 * float(t.ppf(tail, n - 1) / norm.ppf(tail))
    mean = values.mean()
    return percentile_interval(mean + stretch * (bootstrap_weights(n, draws, generator) @ values - mean), confidence)
