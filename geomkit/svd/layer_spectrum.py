"""The singular values of one gradient and several measures of its rank, which disagree."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from geomkit.errors import GeometryError
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.svd.singular_values import energy_rank, rank_tolerance, singular_values
from geomkit.utils.arguments import check_rank

Unit = Literal["tokens", "examples"]
"""Unit of the numbers that bound a rank: the tokens of a gradient, or the examples of a span."""

SMOOTH_STATISTICS = (
    "effective_rank",
    "entropy_rank",
    "participation_ratio",
    "stable_rank",
    "nuclear_rank",
    "cer10",
    "cer20",
)
"""Statistics that change little when an example changes. The others jump and have no interval, see
:func:`geomkit.svd.spectrum.spectrum`."""


@dataclass(frozen=True, eq=False)
class LayerSpectrum:
    """The singular values of one gradient, with the measures of its rank.

    A zero gradient has rank 0 by every measure, and a CER of NaN.

    Attributes:
        parameter: Name of the parameter; of a span, also of the decoder layer, or of all parameters.
        shape: Rows and columns.
        tokens: T, the number of token positions in the gradient.
        rank_bound: min(rows, columns, T), the upper bound of every measure of rank.
        singular_values: (rank_bound,) fp64, descending.
        unit: Unit of ``tokens``: the tokens of a gradient, or the examples of a span.
    """

    parameter: str
    shape: tuple[int, int]
    tokens: int
    rank_bound: int
    singular_values: np.ndarray = field(repr=False)
    unit: Unit = "tokens"

    @property
    def is_zero(self) -> bool:
        """Whether all singular values are zero."""
        return not self.singular_values.any()

    @cached_property
    def tolerance(self) -> float:
        """σ₁ · max(rows, columns) · ε of fp32: smaller singular values are rounding of the fp32 factors."""
        return rank_tolerance(self.singular_values, self.shape)

    @property
    def numeric_rank(self) -> int:
        """Number of singular values above :attr:`tolerance`."""
        return int((self.singular_values > self.tolerance).sum())

    @property
    def effective_rank(self) -> float:
        """Exponential of the entropy of the normalised singular values, exp H(σ/Σσ) (Roy and Vetterli 2007)."""
        return _exp_entropy(self.singular_values)

    @property
    def entropy_rank(self) -> float:
        """Exponential of the entropy of the energy, exp H(σ²/Σσ²), which a long tail of small values changes less."""
        return _exp_entropy(self.singular_values**2)

    @property
    def participation_ratio(self) -> float:
        """Participation ratio of the energy, (Σσ²)² / Σσ⁴."""
        if self.is_zero:
            return 0.0
        shares = self.singular_values**2 / (self.singular_values**2).sum()
        return float(1 / (shares**2).sum())

    @property
    def stable_rank(self) -> float:
        """Stable rank ‖G‖_F² / ‖G‖₂² (Rudelson and Vershynin 2007)."""
        return 0.0 if self.is_zero else float(((self.singular_values / self.singular_values[0]) ** 2).sum())

    @property
    def nuclear_rank(self) -> float:
        """Nuclear rank ‖G‖_*² / ‖G‖_F² = (Σσ)² / Σσ², the participation ratio of σ rather than of σ²."""
        return 0.0 if self.is_zero else float(self.singular_values.sum() ** 2 / (self.singular_values**2).sum())

    def cer(self, k: int) -> float:
        """Return the cumulative energy ratio CER(k) = Σ_{i≤k} σ_i² / Σ σ_i²; NaN for a zero gradient.

        Raises:
            GeometryError: If k is below 1.
        """
        check_rank(k)
        squared = self.singular_values**2
        return float("nan") if self.is_zero else float(squared[:k].sum() / squared.sum())

    def rank_at(self, energy: float) -> int:
        """Return the smallest k with CER(k) ≥ ``energy``.

        Raises:
            GeometryError: If the share is not above 0 and at most 1.
        """
        return energy_rank(self.singular_values, energy)

    def statistics(self) -> dict[str, float]:
        """Return all measures of rank by their short names."""
        return dict(self._statistics)

    @cached_property
    def _statistics(self) -> dict[str, float]:
        return {
            "numeric_rank": float(self.numeric_rank),
            "effective_rank": self.effective_rank,
            "entropy_rank": self.entropy_rank,
            "participation_ratio": self.participation_ratio,
            "stable_rank": self.stable_rank,
            "nuclear_rank": self.nuclear_rank,
            "cer10": self.cer(10),
            "cer20": self.cer(20),
            "rank90": float(self.rank_at(0.90)),
            "rank95": float(self.rank_at(0.95)),
            "rank99": float(self.rank_at(0.99)),
        }


def _exp_entropy(weights: np.ndarray) -> float:
    """Return exp(−Σ p log p) of the normalised weights p, 0 if all weights are zero."""
    if not weights.any():
        return 0.0
    shares = weights[weights > 0] / weights.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def layer_spectrum(parameter: str, gradient: LayerGradient) -> LayerSpectrum:
    """Return the singular values of one gradient, with the measures of its rank."""
    return LayerSpectrum(
        parameter, gradient.matrix_shape, gradient.tokens, gradient.rank_bound, singular_values(gradient)
    )


def statistic_values(layers: Sequence[LayerSpectrum], statistic: str) -> np.ndarray:
    """Return (n,) values of one statistic of n spectra.

    Args:
        layers: The spectra.
        statistic: Name of a statistic, a key of :meth:`LayerSpectrum.statistics`.

    Raises:
        GeometryError: If there is no such statistic.
    """
    statistics = [layer.statistics() for layer in layers]
    if statistics and statistic not in statistics[0]:
        raise GeometryError(f"expected one of {', '.join(statistics[0])}, found {statistic!r}; choose one of these")
    return np.array([values[statistic] for values in statistics])
