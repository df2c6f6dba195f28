"""Singular spectra of gradients and the measures of their rank, each beside a null with the same token count.

No single number is the rank of a gradient: the measures here answer different questions and disagree, and each is
bounded by min(rows, columns, T) whatever the gradient means. So a :class:`Spectrum` keeps T, the bound and the null.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from geomkit._display import html_table
from geomkit.controls import parameter_generator, random_factor_null
from geomkit.errors import GeometryError
from geomkit.layer_gradient import (
    DenseGradient,
    FactoredGradient,
    Factors,
    IndexedGradient,
    LayerGradient,
    row_products,
)
from geomkit.names import kind_of, layer_index

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_LOGGER = logging.getLogger(__name__)
_EPS_FP32 = float(np.finfo(np.float32).eps)
_EPS_FP64 = float(np.finfo(np.float64).eps)
_PRECISION = 5e-7  # largest bound on the error of a singular value, relative to σ₁, that is taken from squares
_STACKED = 2**20  # numbers of the small matrices that are decomposed in one call
_STRIP = 4096  # rows of a matrix that are squared at a time
_ROUNDING = 1e-12  # ten equal values reach 90 % with the ninth, whatever the last bit of their sum says


def core(gradient: LayerGradient) -> Tensor:
    """Return a small matrix with the same singular values as the gradient, fp64.

    With fewer rows of factors than of either dimension, LᵀR = Q_L (S_L S_Rᵀ) Q_Rᵀ from a QR of each, so the T × T
    middle is enough. Otherwise it is the gradient itself, or its non-zero rows.
    """
    if isinstance(gradient, IndexedGradient):
        return gradient.rows.double()
    if factors := thin_factors(gradient):
        left, right = factors
        return _triangle(left.double()) @ _triangle(right.double()).T
    return gradient.take(slice(None))


def thin_factors(gradient: LayerGradient) -> Factors | None:
    """Return the gradient's factors if they have fewer rows than the gradient has rows and columns."""
    factors = gradient.factors()
    return factors if factors is not None and len(factors[0]) < min(gradient.matrix_shape) else None


def _triangle(factor: Tensor) -> Tensor:
    """Return the (T, T) triangle S of factorᵀ = QS."""
    triangle: Tensor = torch.linalg.qr(factor.T, mode="r").R
    return triangle


def singular_values(gradient: LayerGradient) -> np.ndarray:
    """Return the singular values of a gradient, descending, as many as its rank bound.

    They are exact to 1e-7 of the largest, see :func:`singular_values_of`.

    Example:
        >>> singular_values(FactoredGradient(torch.eye(2, 5), 3 * torch.eye(2, 4)))
        array([3., 3.])
    """
    return np.asarray(singular_values_of([gradient])[0].cpu().numpy())


def singular_values_of(gradients: Sequence[LayerGradient]) -> Tensor:
    """Return the singular values of many gradients, of any shapes and forms, each to 1e-7 of its largest.

    Their squares are the eigenvalues of CᵀBC, with LLᵀ = CCᵀ (Cholesky) and B = RRᵀ in fp64, for a fraction of the
    cost of two QRs and an SVD; a factor that gradients share (the input of queries, keys and values) is squared once.
    Squaring costs half of fp64's digits: errors are below √(ε ‖LLᵀ‖₁ ‖RRᵀ‖₁), and were below a fifth of it wherever
    they were measured. If that bound is more than 5e-7 of the largest value (tokens that nearly cancel), or neither
    factor has a Cholesky decomposition, the two QRs and the SVD are taken.

    Args:
        gradients: N gradients on one device.

    Returns:
        (N, K) fp64, each row descending; K is the largest rank bound, and all beyond a gradient's own is zero.

    Example:
        >>> singular_values_of([FactoredGradient(torch.eye(2, 5), torch.eye(2, 4)), DenseGradient(torch.eye(3), 9)])
        tensor([[1., 1., 0.],
                [1., 1., 1.]], dtype=torch.float64)
    """
    bounds = [gradient.rank_bound for gradient in gradients]
    device = gradients[0].device if gradients else None
    values = torch.zeros(len(gradients), max(bounds, default=0), dtype=torch.float64, device=device)
    for places, squares, noise in _squares(gradients):
        squared = torch.linalg.eigvalsh(squares).clamp(min=0).flip(1)
        unsure = (noise > _PRECISION**2 * squared[:, 0]).tolist()
        for place, found, redo in zip(places, squared.sqrt(), unsure, strict=True):
            kept = torch.linalg.svdvals(core(gradients[place])) if redo else found
            values[place, : bounds[place]] = kept[: bounds[place]]
    return values


_Stack = tuple[list[int], Tensor, Tensor]
"""Places of n gradients, matrices (n, k, k) with their squared singular values, and rounding errors (n,) of these."""


def _squares(gradients: Sequence[LayerGradient]) -> Iterator[_Stack]:
    """Square every gradient and stack those of one size, a few at a time."""
    grams = _Grams(gradients)
    held: dict[tuple[int, int], list[tuple[int, tuple[Tensor, ...]]]] = {}
    for place, gradient in enumerate(gradients):
        found = grams.of(gradient)
        size = found[0].numel()
        waiting = held.setdefault((len(found), size), [])
        if size:
            waiting.append((place, found))
        if len(waiting) * size >= _STACKED:
            yield _stacked(held.pop((len(found), size)))
    yield from (_stacked(waiting) for waiting in held.values() if waiting)


def _stacked(held: list[tuple[int, tuple[Tensor, ...]]]) -> _Stack:
    places, found = zip(*held, strict=True)
    stacks = [torch.stack(matrices) for matrices in zip(*found, strict=True)]
    if len(stacks) == 1:
        return list(places), stacks[0], _EPS_FP64 * _size(stacks[0])
    return list(places), *_product(*stacks)


def _product(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return symmetric matrices (n, T, T) with the eigenvalues of left @ right, and their rounding errors (n,)."""
    noise = _EPS_FP64 * _size(left) * _size(right)
    left, right, stand_in = _without_dead(left, right)
    lower, failed = torch.linalg.cholesky_ex(left + stand_in)
    if failed.any():  # tokens that repeat one another make one of the two singular
        swap = (failed > 0)[:, None, None]
        left, right = torch.where(swap, right, left), torch.where(swap, left, right)
        lower, failed = torch.linalg.cholesky_ex(left + stand_in)
        noise = noise.masked_fill(failed > 0, float("inf"))
        lower = lower.masked_fill((failed > 0)[:, None, None], 0.0)
    return lower.mT @ right @ lower, noise


def _without_dead(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take out the tokens whose factor is zero on a side: they add nothing, but stop a Cholesky decomposition.

    The first token of a text is one for the queries: it has itself only to attend to. The third matrix has ones in
    their places, to be added to the side that is decomposed; the other side's zeros keep them out of the product.
    """
    dead = (left.diagonal(dim1=1, dim2=2) == 0) | (right.diagonal(dim1=1, dim2=2) == 0)
    stand_in = torch.diag_embed(dead.double())
    if not dead.any():
        return left, right, stand_in
    crossed = dead[:, :, None] | dead[:, None, :]
    return left.masked_fill(crossed, 0.0), right.masked_fill(crossed, 0.0), stand_in


def _size(matrices: Tensor) -> Tensor:
    """Return the largest column sum of magnitudes of each matrix, at least its spectral norm."""
    sizes: Tensor = matrices.abs().sum(1).amax(1)
    return sizes


class _Grams:
    """The small Gram matrices of gradients; that of a factor which several have in common is made once."""

    def __init__(self, gradients: Sequence[LayerGradient]) -> None:
        factored = [gradient for gradient in gradients if isinstance(gradient, FactoredGradient)]
        self._uses = Counter(_memory(factor) for gradient in factored for factor in gradient.factors())
        self._kept: dict[_Memory, Tensor] = {}

    def of(self, gradient: LayerGradient) -> tuple[Tensor, ...]:
        """Return LLᵀ and RRᵀ where factors are thin, otherwise the Gram matrix of the smaller side."""
        if isinstance(gradient, FactoredGradient) and gradient.tokens < min(gradient.shape):
            return self._shared(gradient.left), self._shared(gradient.right)
        if isinstance(gradient, IndexedGradient):
            rows = gradient.rows
            return (_gram(rows if len(rows) < rows.shape[1] else rows.T),)
        if factors := thin_factors(gradient):
            return _gram(factors[0]), _gram(factors[1])
        return (_gram_of_smaller_side(gradient),)

    def _shared(self, factor: Tensor) -> Tensor:
        key = _memory(factor)
        found = self._kept.get(key)
        if found is None:
            found = _gram(factor)
            if self._uses[key] > 1:
                self._kept[key] = found
        return found


_Memory = tuple[int, torch.Size, tuple[int, ...]]


def _memory(tensor: Tensor) -> _Memory:
    """Return what two tensors, both alive, agree in only if they are the same numbers."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _gram(rows: Tensor) -> Tensor:
    return row_products(rows, rows)


def _gram_of_smaller_side(gradient: LayerGradient) -> Tensor:
    rows, columns = gradient.matrix_shape
    if rows < columns:
        return _gram(gradient.take(slice(None)))
    starts = range(0, rows, _STRIP)
    strips = (_gram(gradient.take(slice(start, start + _STRIP)).T) for start in starts)
    return sum(strips, torch.zeros(columns, columns, dtype=torch.float64, device=gradient.device))


def rank_tolerance(values: np.ndarray, shape: tuple[int, int]) -> float:
    """Return σ₁ · max(rows, columns) · ε of fp32, below which a singular value of fp32 factors is rounding."""
    return float(values[0]) * max(shape) * _EPS_FP32 if len(values) else 0.0


def energy_rank(values: np.ndarray, energy: float) -> int:
    """Return the smallest k whose leading singular values hold a share ``energy`` of the squared norm.

    Raises:
        GeometryError: If the share is not above 0 and at most 1.
    """
    if not 0 < energy <= 1:
        raise GeometryError(f"expected a share of the energy above 0 and at most 1, found {energy}; give e.g. 0.9")
    squared = values**2
    if not squared.sum():
        return 0
    return int(np.argmax(np.cumsum(squared) / squared.sum() >= energy - _ROUNDING)) + 1


def _exp_entropy(weights: np.ndarray) -> float:
    shares = weights[weights > 0] / weights.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


@dataclass(frozen=True, eq=False)
class LayerSpectrum:
    """The singular values of one gradient and what can be said about its rank.

    A gradient that is zero has rank 0 by every measure, and no CER.

    Attributes:
        parameter: Name of the parameter.
        shape: Rows and columns.
        tokens: T, the number of token positions in the gradient.
        rank_bound: min(rows, columns, T), which no measure can exceed.
        singular_values: (rank_bound,) fp64, descending.
    """

    parameter: str
    shape: tuple[int, int]
    tokens: int
    rank_bound: int
    singular_values: np.ndarray = field(repr=False)

    @property
    def is_zero(self) -> bool:
        """Whether there is no gradient at all."""
        return not self.singular_values.any()

    @cached_property
    def tolerance(self) -> float:
        """σ₁ · max(rows, columns) · ε of fp32, the precision of the factors."""
        return rank_tolerance(self.singular_values, self.shape)

    @property
    def numeric_rank(self) -> int:
        """How many singular values exceed :attr:`tolerance`."""
        return int((self.singular_values > self.tolerance).sum())

    @property
    def effective_rank(self) -> float:
        """The exponential of the entropy of the shares, exp H(σ/Σσ) (Roy and Vetterli 2007)."""
        return 0.0 if self.is_zero else _exp_entropy(self.singular_values)

    @property
    def entropy_rank(self) -> float:
        """The exponential of the entropy of the energy, exp H(σ²/Σσ²): less moved by a long tail."""
        return 0.0 if self.is_zero else _exp_entropy(self.singular_values**2)

    @property
    def participation_ratio(self) -> float:
        """(Σσ²)² / Σσ⁴."""
        if self.is_zero:
            return 0.0
        shares = self.singular_values**2 / (self.singular_values**2).sum()
        return float(1 / (shares**2).sum())

    @property
    def stable_rank(self) -> float:
        """‖G‖_F² / ‖G‖₂² (Rudelson and Vershynin 2007)."""
        return 0.0 if self.is_zero else float(((self.singular_values / self.singular_values[0]) ** 2).sum())

    def cer(self, k: int) -> float:
        """Return the cumulative energy ratio Σ_{i≤k} σ_i² / Σ σ_i².

        Raises:
            GeometryError: If k is below 1.
        """
        if k < 1:
            raise GeometryError(f"expected a rank of at least 1, found {k}; give e.g. 10")
        squared = self.singular_values**2
        return float("nan") if self.is_zero else float(squared[:k].sum() / squared.sum())

    def rank_at(self, energy: float) -> int:
        """Return the smallest k with CER(k) ≥ ``energy``."""
        return energy_rank(self.singular_values, energy)

    def statistics(self) -> dict[str, float]:
        """Return every measure under its short name."""
        return {
            "numeric_rank": float(self.numeric_rank),
            "effective_rank": self.effective_rank,
            "entropy_rank": self.entropy_rank,
            "participation_ratio": self.participation_ratio,
            "stable_rank": self.stable_rank,
            "cer10": self.cer(10),
            "cer20": self.cer(20),
            "rank90": float(self.rank_at(0.90)),
            "rank95": float(self.rank_at(0.95)),
            "rank99": float(self.rank_at(0.99)),
        }


def layer_spectrum(parameter: str, gradient: LayerGradient) -> LayerSpectrum:
    """Measure one gradient."""
    return LayerSpectrum(
        parameter, gradient.matrix_shape, gradient.tokens, gradient.rank_bound, singular_values(gradient)
    )


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The spectra of a model's gradients, each beside draws from its null.

    Attributes:
        layers: A spectrum for each matrix parameter.
        null: Several spectra for each, of gradients drawn by :func:`geomkit.controls.random_factor_null`.
    """

    layers: Mapping[str, LayerSpectrum]
    null: Mapping[str, tuple[LayerSpectrum, ...]]

    def mean(self, statistic: str) -> float:
        """Return the plain mean of a statistic over the parameters whose gradient is not zero.

        Raises:
            GeometryError: If there is no such statistic.
        """
        return _mean([layer for layer in self.layers.values() if not layer.is_zero], statistic)

    def null_mean(self, statistic: str) -> float:
        """Return the mean of a statistic over the draws of the null, over the same parameters.

        Raises:
            GeometryError: If there is no such statistic.
        """
        return _mean([drawn for draws in self.null.values() for drawn in draws if not drawn.is_zero], statistic)

    def to_frame(self) -> "pd.DataFrame":
        """Return a row per parameter and statistic.

        ``null`` is the mean over the null's draws, ``null_low`` and ``null_high`` are its smallest and largest: with
        D draws, one more falls outside with probability 2/(D+1).
        """
        import pandas as pd

        return pd.DataFrame([row for layer in self.layers.values() for row in self._rows(layer)])

    def _rows(self, layer: LayerSpectrum) -> list[dict[str, object]]:
        drawn = [draw.statistics() for draw in self.null.get(layer.parameter, ())]
        rows: list[dict[str, object]] = []
        for statistic, value in layer.statistics().items():
            null = np.array([draw[statistic] for draw in drawn] or [np.nan])
            rows.append(
                {
                    "parameter": layer.parameter,
                    "kind": kind_of(layer.parameter),
                    "layer": layer_index(layer.parameter),
                    "statistic": statistic,
                    "value": value,
                    "null": float(null.mean()),
                    "null_low": float(null.min()),
                    "null_high": float(null.max()),
                    "tokens": layer.tokens,
                    "rank_bound": layer.rank_bound,
                }
            )
        return rows

    def plot(self) -> "go.Figure":
        """Draw it, see :func:`geomkit.plots.plot_spectrum`."""
        from geomkit.plots import plot_spectrum

        return plot_spectrum(self)

    def __str__(self) -> str:
        """Say the mean effective rank and CER(10) beside their nulls."""
        return (
            f"spectra of {len(self.layers)} matrices: mean effective rank {self.mean('effective_rank'):.3g} "
            f"(null {self.null_mean('effective_rank'):.3g}), "
            f"CER(10) {self.mean('cer10'):.3g} (null {self.null_mean('cer10'):.3g})"
        )

    def _repr_html_(self) -> str:
        return html_table(str(self), self.to_frame())


def _mean(layers: list[LayerSpectrum], statistic: str) -> float:
    values = [layer.statistics() for layer in layers]
    if values and statistic not in values[0]:
        raise GeometryError(f"expected one of {', '.join(values[0])}, found {statistic!r}; choose one of these")
    return float(np.mean([value[statistic] for value in values])) if values else float("nan")


def spectrum(gradients: Mapping[str, LayerGradient], *, null_draws: int = 8, seed: int = 0) -> Spectrum:
    """Measure the singular spectrum of every matrix gradient, beside a null with the same tokens.

    The null is only as strong as what the gradient's form still knows (:func:`geomkit.controls.random_factor_null`):
    collect with ``form="factored"`` so that it shares the layer's inputs, which alone make a spectrum steep.

    Args:
        gradients: Gradients by parameter, such as a :class:`~geomkit.gradients.GradientSet`; vectors are left out.
        null_draws: How many gradients to draw from the null for each parameter; 0 for no null.
        seed: Seed of the null; a parameter's draws do not depend on which others are measured.

    Returns:
        The spectra. Singular values are exact to 1e-7 of the largest, and no gradient of few tokens is formed.
    """
    matrices = {name: gradient for name, gradient in gradients.items() if min(gradient.matrix_shape) > 1}
    dense = [name for name, gradient in matrices.items() if isinstance(gradient, DenseGradient)]
    if dense and null_draws:
        _LOGGER.warning(
            "the null of %d of %d matrices (%s, …) knows only their tokens and shape, and is weak; "
            'collect with form="factored" for one that shares the inputs',
            len(dense),
            len(matrices),
            dense[0],
        )
    null: dict[str, tuple[LayerSpectrum, ...]] = {}
    for name, gradient in matrices.items():
        generator = parameter_generator(seed, name)
        null[name] = tuple(layer_spectrum(name, random_factor_null(gradient, generator)) for _ in range(null_draws))
    return Spectrum({name: layer_spectrum(name, gradient) for name, gradient in matrices.items()}, null)
