"""The singular values of a mean gradient that exceed the sampling noise of its examples.

The mean of N random gradients with expectation zero is a full matrix too, with a spectrum. The noise floor is computed
from the examples themselves: a sum of their gradients under random signs has the same noise, with all correlations
between tokens, inputs and entries, but no mean.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from geomkit.errors import GeometryError
from geomkit.gradients.accumulator import add
from geomkit.gradients.checks import check_enough, check_sets
from geomkit.gradients.copies import check_different_samples
from geomkit.gradients.gradient_set import GradientSet, shared_layers
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.inputs.parameters import kind_of, layer_index
from geomkit.stats.multiple_testing import benjamini_hochberg
from geomkit.svd.singular_values import rank_tolerance, singular_values
from geomkit.svd.weighted_sums import weighted_spectra
from geomkit.utils.arguments import check_confidence, check_draws, check_seed
from geomkit.utils.display import counted
from geomkit.utils.figures import DrawnResult, draw

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_MIN_EXAMPLES = 8
"""Smallest number of examples: with eight, one in 2⁷ draws of signs repeats the mean; with fewer, too many do."""
_TIED = 1e-7
"""Relative slack of comparisons: signs that are all equal give the mean, up to the rounding of its square."""


@dataclass(frozen=True, eq=False)
class LayerNoiseFloor:
    """The spectrum of one parameter's mean gradient with the floor of its sampling noise.

    Attributes:
        parameter: Name of the parameter.
        shape: Rows and columns.
        tokens: T, the token positions of all examples.
        singular_values: (K,) singular values of the mean over examples, fp64, descending.
        floor: The quantile, at the confidence level, of the largest singular value of sampling noise. A singular value
            of the mean beyond the rank of the expected gradient is at most the largest singular value of the noise
            (Weyl 1912), so the same floor serves all singular values.
        null: (draws,) largest singular value of the mean under random signs.
        confidence: Confidence level of the floor, and of the test for any mean.
    """

    parameter: str
    shape: tuple[int, int]
    tokens: int
    singular_values: np.ndarray = field(repr=False)
    floor: float
    null: np.ndarray = field(repr=False)
    confidence: float = 0.95

    @property
    def largest(self) -> float:
        """The largest singular value of the mean."""
        return float(max(self.singular_values, default=0.0))

    @property
    def p_value(self) -> float:
        """Share of draws of signs with a largest singular value as large as the mean's: small if there is a mean.

        The test is exact where gradients without a mean would be symmetric about zero (Phipson and Smyth 2010).
        """
        return _p_value(self.null, self.largest)

    @property
    def signal_rank(self) -> int:
        """Number of singular values above the floor and above rounding; 0 if the mean cannot be told from zero.

        In at most a share 1 − confidence of experiments, the number is larger than the rank of the expected gradient.
        The number is smaller than this rank where a direction is weaker than the noise.
        """
        if self.p_value > 1 - self.confidence + _TIED:
            return 0
        return max(1, int((self.singular_values > max(self.floor, self.rounding)).sum()))

    @property
    def rounding(self) -> float:
        """Largest rounding error of the fp32 factors, see :func:`geomkit.svd.singular_values.rank_tolerance`."""
        return rank_tolerance(self.singular_values, self.shape)


@dataclass(frozen=True, eq=False)
class NoiseFloor(DrawnResult):
    """The spectra of a model's mean gradients with the floors of their sampling noise.

    Attributes:
        layers: For every matrix parameter, the spectrum and its floor.
        examples: N, the number of examples in the mean.
        draws: Number of draws of random signs; no p-value is below 1/(draws + 1).
        confidence: Confidence level of the floors.
    """

    layers: Mapping[str, LayerNoiseFloor]
    examples: int
    draws: int
    confidence: float = 0.95

    @cached_property
    def family_p_values(self) -> Mapping[str, float]:
        """The p-value of every parameter, adjusted for the number of parameters (Westfall and Young 1993).

        The parameters with an adjusted p-value of at most α include a false discovery in at most a share α of
        experiments. Few draws are enough for many parameters, and parameters with correlated gradients cost no power.
        """
        # 1. Units: the median of a parameter's largest singular value under random signs.
        scales = {name: float(np.median(layer.null)) for name, layer in self.layers.items()}
        nonzero = {name: layer for name, layer in self.layers.items() if scales[name] > 0}
        # 2. For every draw of signs, the largest value of all parameters in these units.
        scaled = [layer.null / scales[name] for name, layer in nonzero.items()]
        maxima = np.max(scaled, axis=0) if scaled else np.ones(0)
        # 3. A parameter's value is compared with that maximum.
        return {
            name: _p_value(maxima, layer.largest / scales[name]) if name in nonzero else 1.0
            for name, layer in self.layers.items()
        }

    @property
    def significant(self) -> frozenset[str]:
        """The parameters whose mean exceeds its noise; with probability ``confidence``, none of them by chance."""
        return frozenset(name for name, p in self.family_p_values.items() if p <= 1 - self.confidence + _TIED)

    def to_frame(self) -> "pd.DataFrame":
        """Return a data frame with one row per parameter: largest singular value, floor, signal rank and p-values.

        ``p_family`` is the p-value of :attr:`family_p_values`, ``q_value`` the p-value adjusted after Benjamini and
        Hochberg (1995) over the parameters: if few of P parameters have a signal, 20 P draws are needed for a
        ``q_value`` below .05.
        """
        import pandas as pd

        frame = pd.DataFrame([_row(layer) for layer in self.layers.values()])
        if not len(frame):
            return frame
        q_values = benjamini_hochberg(frame["p_value"].to_numpy())
        return frame.assign(p_family=frame["parameter"].map(self.family_p_values), q_value=q_values)

    def plot(self) -> "go.Figure":
        """Draw the spectra relative to their floors, see :func:`geomkit.plots.noise_floor.plot_noise_floor`."""
        return draw("plot_noise_floor", self)

    def __str__(self) -> str:
        """Return in how many matrices the mean gradient exceeds its noise, and in how many directions."""
        ranks = [layer.signal_rank for layer in self.layers.values()]
        level = 1 - self.confidence
        q_values = benjamini_hochberg([layer.p_value for layer in self.layers.values()])
        discoveries = int((q_values < level).sum())
        span = f"{np.median(ranks):.3g} ({min(ranks)} to {max(ranks)})" if ranks else "none"
        return (
            f"mean gradient of {self.examples} examples above its sampling noise in {len(self.significant)} of "
            f"{counted(len(self.layers), 'matrix', 'matrices')} (family-wise p ≤ {level:.2g}; {discoveries} at "
            f"q < {level:.2g}); directions above the {self.confidence:.0%} floor of {self.draws} random signs, at the "
            f"median: {span}"
        )


def _p_value(null: np.ndarray, value: float) -> float:
    return (1 + int((null >= value * (1 - _TIED)).sum())) / (1 + len(null))


def _row(layer: LayerNoiseFloor) -> dict[str, object]:
    return {
        "parameter": layer.parameter,
        "kind": kind_of(layer.parameter),
        "layer": layer_index(layer.parameter),
        "largest": layer.largest,
        "floor": layer.floor,
        "rounding": layer.rounding,
        "signal_rank": layer.signal_rank,
        "tokens": layer.tokens,
        "p_value": layer.p_value,
    }


def noise_floor(gradients: GradientSet, *, draws: int = 99, seed: int = 0, confidence: float = 0.95) -> NoiseFloor:
    """Measure how many singular values of the mean gradient exceed the sampling noise of its examples.

    The same random signs ε answer two questions. *Is there a mean at all?* compares the largest singular value of the
    mean with the largest of Σ ε_i g_i / N, an exact test wherever gradients without a mean would be symmetric about
    zero. *How many directions does the mean have?* compares every singular value with the largest of
    Σ (ε_i − ε̄) g_i / √(N (N−1)): noise with the sample covariance of the mean, in which a strong direction does not
    hide the weak directions. For error rates in simulations see tests/benchmarks/README.md.

    Args:
        gradients: Collected with ``per_sample=True``, at least eight examples. The mean is over the examples'
            gradients, with equal weights.
        draws: Number of draws of random signs, which all parameters share.
        seed: Seed of the signs.
        confidence: Confidence level of the floors, between 0 and 1.

    Returns:
        The spectrum of the mean and its noise floor, for every matrix parameter.

    Raises:
        GeometryError: If there are no per-sample gradients or fewer than eight, a gradient is not finite, the
            confidence is not between 0 and 1, or there are too few draws for the confidence.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> safety = gk.load_examples("safety").select(range(8))
        >>> gradients = gk.collect_gradients(model, tokenizer, safety, per_sample=True, layers="lm_head.*")
        >>> gk.noise_floor(gradients).layers["lm_head.weight"].p_value <= 0.05
        True
    """
    check_sets({"given": gradients})
    check_draws(draws, 1)
    check_confidence(confidence)
    check_seed(seed)
    samples = gradients.samples
    check_enough({"given": len(samples)}, _MIN_EXAMPLES)
    check_different_samples({"given": gradients}, _MIN_EXAMPLES)
    exceeding = int((1 - confidence) * (draws + 1) + _TIED)
    if exceeding < 1:
        raise GeometryError(f"expected draws for a confidence of {confidence}, found {draws}; give 99 or more")
    names = [name for name in shared_layers(*samples) if min(samples[0][name].matrix_shape) > 1]
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(draws, len(samples)))
    layers = {
        name: _layer_floor(name, [sample[name] for sample in samples], signs, exceeding, confidence) for name in names
    }
    return NoiseFloor(layers, len(samples), draws, confidence)


def _layer_floor(
    name: str, gradients: Sequence[LayerGradient], signs: np.ndarray, exceeding: int, confidence: float
) -> LayerNoiseFloor:
    """Return the floor of one parameter, the ``exceeding``-th largest value of its noise under random signs."""
    mean = add(gradients).scaled(1 / len(gradients))
    flipped, centred = _null_values(gradients, signs)
    return LayerNoiseFloor(
        parameter=name,
        shape=mean.matrix_shape,
        tokens=mean.tokens,
        singular_values=singular_values(mean),
        floor=float(np.sort(centred)[-exceeding]),
        null=flipped,
        confidence=confidence,
    )


def _null_values(gradients: Sequence[LayerGradient], signs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest singular values of the sums under random signs, and under signs with their mean subtracted.

    Args:
        gradients: N gradients of one parameter.
        signs: (draws, N) ε, each 1 or −1.

    Returns:
        (draws,) for the test, and (draws,) for the floor.
    """
    n = signs.shape[1]
    # 1. For the test: Σ ε_i g_i / N, of which the observed mean is the case with all signs equal.
    # 2. For the floor: Σ (ε_i − ε̄) g_i / √(N (N−1)). The weights sum to zero, so that the mean cancels, and their
    #    expected sum of squares is 1/N, as for the mean of N examples.
    weights = np.concatenate([signs / n, (signs - signs.mean(1, keepdims=True)) / (n * (n - 1)) ** 0.5])
    spectra = weighted_spectra(gradients, torch.from_numpy(weights)).cpu().numpy()
    largest = spectra.max(axis=1, initial=0.0)
    return largest[: len(signs)], largest[len(signs) :]
