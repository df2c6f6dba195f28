"""Singular spectra of gradients and the measures of their rank, each beside a null with the same token count.

No single number is the rank of a gradient: the measures here answer different questions and disagree, and each is
bounded by min(rows, columns, T) whatever the gradient means. So a :class:`Spectrum` keeps T, the bound and the null.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from geomkit._display import html_table
from geomkit.controls import parameter_generator, random_factor_null
from geomkit.errors import GeometryError
from geomkit.forms import DenseGradient
from geomkit.layer_gradient import LayerGradient
from geomkit.names import kind_of, layer_index
from geomkit.svd import energy_rank, rank_tolerance, singular_values

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_LOGGER = logging.getLogger(__name__)


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
        return _exp_entropy(self.singular_values)

    @property
    def entropy_rank(self) -> float:
        """The exponential of the entropy of the energy, exp H(σ²/Σσ²): less moved by a long tail."""
        return _exp_entropy(self.singular_values**2)

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


def _exp_entropy(weights: np.ndarray) -> float:
    if not weights.any():
        return 0.0
    shares = weights[weights > 0] / weights.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


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
