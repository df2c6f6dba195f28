"""Singular spectra of a model's gradients, with intervals over examples and a null with the same token count.

No single number is the rank of a gradient: the measures of :class:`~geomkit.svd.layer_spectrum.LayerSpectrum` answer
different questions and disagree, and all are bounded by min(rows, columns, T), whatever the gradient. Therefore a
:class:`Spectrum` keeps T, the bound, the null, and the spectra with groups of examples left out in turn.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from geomkit.gradients.checks import check_gradients
from geomkit.gradients.copies import check_different_samples
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.gradient_set import GradientSet
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.inputs.parameters import Kind, Layers, kind_of, layer_index
from geomkit.stats.jackknife import jackknife_groups, jackknife_interval
from geomkit.svd.layer_measure import LayerMeasure, measure_layer
from geomkit.svd.layer_spectrum import SMOOTH_STATISTICS, LayerSpectrum, Unit, statistic_values
from geomkit.svd.nulls import NullDraws
from geomkit.utils.arguments import check_confidence, check_draws, check_groups, check_seed
from geomkit.utils.figures import DrawnResult, draw
from geomkit.utils.progress import with_bar
from geomkit.utils.readable import with_interval
from geomkit.utils.seeding import parameter_generator

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Spectrum(DrawnResult):
    """The singular spectra of a model's gradients, with random spectra from their nulls.

    Attributes:
        layers: The spectrum of every matrix parameter.
        null: Several spectra for every parameter, of random gradients from
            :func:`geomkit.svd.nulls.random_factor_null`.
        without: For every parameter, the spectra without one group of examples in turn, the same groups for all
            parameters; to first order above a rank bound of :data:`geomkit.svd.left_out.EXACT_BOUND`. Empty if there
            are no samples.
        confidence: Nominal coverage of the intervals.
    """

    layers: Mapping[str, LayerSpectrum]
    null: Mapping[str, tuple[LayerSpectrum, ...]]
    without: Mapping[str, tuple[LayerSpectrum, ...]] = field(default_factory=dict)
    confidence: float = 0.95

    @property
    def unit(self) -> Unit:
        """Unit of token counts and rank bounds: the tokens of a gradient, or the examples of a span."""
        return next((layer.unit for layer in self.layers.values()), "tokens")

    @property
    def measured(self) -> list[str]:
        """Names of the parameters with a non-zero gradient."""
        return [name for name, layer in self.layers.items() if not layer.is_zero]

    def mean(self, statistic: str) -> float:
        """Return the unweighted mean of a statistic over the parameters with a non-zero gradient.

        Raises:
            GeometryError: If there is no such statistic.
        """
        return _mean(statistic_values([self.layers[name] for name in self.measured], statistic))

    def interval(self, statistic: str) -> tuple[float, float]:
        """Return the jackknife interval of a statistic's mean over parameters, over examples.

        Returns:
            Lower and upper end; NaN for a statistic without an interval, or without samples.

        Raises:
            GeometryError: If there is no such statistic.
        """
        bound = float(np.mean([self.layers[name].rank_bound for name in self.measured])) if self.measured else 0.0
        largest = _largest_possible(statistic, bound)
        return self._interval(self.mean(statistic), self.left_out(statistic).mean(axis=1), largest)

    def null_mean(self, statistic: str) -> float:
        """Return the mean of a statistic over the random spectra of each parameter, and then over the parameters.

        The parameters are those of :meth:`mean`. They have the same weight, however many spectra were drawn for each.

        Raises:
            GeometryError: If there is no such statistic.
        """
        drawn = ([layer for layer in draws if not layer.is_zero] for draws in self.null.values())
        means = [_mean(statistic_values(layers, statistic)) for layers in drawn if layers]
        return _mean(np.array(means))

    def left_out(self, statistic: str, parameters: Sequence[str] | None = None) -> np.ndarray:
        """Return the values of a statistic with one group of examples left out, for every group in turn.

        Args:
            statistic: Name of a statistic.
            parameters: P names of parameters; :attr:`measured` by default.

        Returns:
            (J, P) for J groups; J is 0 for a statistic without an interval, or without samples.
        """
        names = self.measured if parameters is None else parameters
        if statistic not in SMOOTH_STATISTICS or not names or any(not self.without.get(name) for name in names):
            return np.empty((0, max(len(names), 1)))
        return np.column_stack([_left_out_values(self.layers[name], self.without[name], statistic) for name in names])

    def to_frame(self) -> "pd.DataFrame":
        """Return a data frame with one row per parameter and statistic.

        ``low`` and ``high`` are the interval over examples. ``null`` is the mean over the random spectra of the null,
        ``null_low`` and ``null_high`` are the smallest and the largest of these spectra's values: with D ≥ 2 draws,
        another draw falls outside with probability 2/(D+1); one draw, as a large spectrum has, is both. ``tolerance``
        is the threshold above which singular values count for the numeric rank.
        """
        import pandas as pd

        return pd.DataFrame([row for layer in self.layers.values() for row in self._rows(layer)])

    def shown_frame(self) -> "pd.DataFrame":
        """Return a data frame with one row per statistic: means over parameters of value and null."""
        import pandas as pd

        first = next(iter(self.layers.values()), None)
        rows = [
            (name, self.mean(name), *self.interval(name), self.null_mean(name))
            for name in (first.statistics() if first else ())
        ]
        return pd.DataFrame(rows, columns=["mean over parameters of", "value", "low", "high", "null"])

    def _rows(self, layer: LayerSpectrum) -> list[dict[str, object]]:
        values = layer.statistics()
        draws, without = (spectra.get(layer.parameter, ()) for spectra in (self.null, self.without))
        rows: list[dict[str, object]] = []
        for statistic, value in values.items():
            null = statistic_values(draws, statistic) if draws else np.array([np.nan])
            left_out = _left_out_values(layer, without, statistic) if statistic in SMOOTH_STATISTICS else np.empty(0)
            low, high = self._interval(value, left_out, _largest_possible(statistic, layer.rank_bound))
            rows.append(
                {
                    "parameter": layer.parameter,
                    "kind": kind_of(layer.parameter),
                    "layer": layer_index(layer.parameter),
                    "statistic": statistic,
                    "value": value,
                    "low": low,
                    "high": high,
                    "null": float(null.mean()),
                    "null_low": float(null.min()),
                    "null_high": float(null.max()),
                    "tokens": layer.tokens,
                    "rank_bound": layer.rank_bound,
                    "tolerance": layer.tolerance,
                }
            )
        return rows

    def _interval(self, value: float, left_out: np.ndarray, largest: float) -> tuple[float, float]:
        """Return the jackknife interval, cut at zero and at the largest possible value."""
        if len(left_out) < 2:
            return float("nan"), float("nan")
        low, high = np.clip(jackknife_interval(value, left_out, confidence=self.confidence), 0.0, largest)
        return float(low), float(high)

    def plot(
        self,
        layers: Layers = "*",
        kinds: Kind | Collection[Kind] | None = None,
        facet: Literal["layer", "matrix"] | None = None,
    ) -> "go.Figure":
        """Draw the spectra and their nulls, see :func:`geomkit.plots.spectra.plot_spectrum`.

        Args:
            layers: Which parameters to draw, such as ``"*.mlp.*"`` or ``range(4)``.
            kinds: Kinds of module, such as ``"attention"``, of which a parameter must have one.
            facet: ``"layer"`` for a panel per decoder layer, ``"matrix"`` for a panel per matrix of a layer; when left
                out, the median of all.

        Raises:
            GeometryError: If no parameter matches, there is no such facet, or all gradients are zero.
        """
        return draw("plot_spectrum", self, layers=layers, kinds=kinds, facet=facet)

    def __str__(self) -> str:
        """Return the mean effective rank and CER(10), with their intervals and nulls."""
        measures = (
            f"{words} {with_interval(self.mean(statistic), self.interval(statistic))} "
            f"(null {self.null_mean(statistic):.3g})"
            for words, statistic in (("mean effective rank", "effective_rank"), ("CER(10)", "cer10"))
        )
        parameters = f"{len(self.layers)} parameters" if len(self.layers) != 1 else next(iter(self.layers))
        return f"spectra of {parameters}: {', '.join(measures)}"


def _largest_possible(statistic: str, rank_bound: float) -> float:
    return 1.0 if statistic.startswith("cer") else rank_bound


def _left_out_values(layer: LayerSpectrum, without: Sequence[LayerSpectrum], statistic: str) -> np.ndarray:
    """Return (J,) values of a statistic without one group of examples, for every group in turn.

    The values are NaN for a CER(k) that becomes 1 because at most k tokens are left.
    """
    k = int(statistic.removeprefix("cer")) if statistic.startswith("cer") else 0
    if without and layer.rank_bound > k >= min(spectrum.rank_bound for spectrum in without):
        return np.full(len(without), np.nan)
    return statistic_values(without, statistic)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def spectrum(
    gradients: Mapping[str, LayerGradient],
    *,
    null_draws: int = 8,
    groups: int = 16,
    seed: int = 0,
    confidence: float = 0.95,
    progress: bool = True,
) -> Spectrum:
    """Measure the singular spectrum of every matrix gradient, with intervals and a null with the same token count.

    The strength of the null depends on the form of the gradients (:func:`geomkit.svd.nulls.random_factor_null`):
    collect with ``form="factored"`` for a null that shares the layer's inputs, which alone make a spectrum steep. The
    gradients of a model with random weights are below that null too; only the difference from a control set is a result
    about safety, see :func:`geomkit.svd.spectrum_contrast.compare_spectra`.

    Intervals are jackknife intervals over examples (:func:`geomkit.stats.jackknife.jackknife_interval`) of the
    statistic for sets of this size and token count: every measure of rank grows with both. They are cautious, because
    leaving examples out overstates the variance of a curved statistic (Efron and Stein 1981), except where a few
    examples have most of the squared norm; see tests/benchmarks/README.md. With a rank bound above
    :data:`geomkit.svd.left_out.EXACT_BOUND`, a spectrum without a group of examples is not decomposed, but taken to
    first order in the group's gradient (the infinitesimal jackknife, Jaeckel 1972), which is more cautious still.
    Statistics that jump have no interval: the ranks at a share of the energy, and the numeric rank, which mostly equals
    its bound. CER(k) has no interval if leaving a group out leaves k tokens or fewer, and one that is too short if it
    leaves few more.

    Args:
        gradients: Gradients by parameter, such as a :class:`~geomkit.gradients.gradient_set.GradientSet`; vectors are
            left out. Intervals need a set collected with ``per_sample=True``, which ``match_tokens`` may have thinned.
        null_draws: Number of random gradients from the null of every parameter; 0 for no null.
        groups: Largest number of groups of examples, of which one is left out at a time; 0 for no intervals.
        seed: Seed of the null and of the groups; the draws of a parameter do not depend on the other parameters.
        confidence: Nominal coverage of the intervals, between 0 and 1.
        progress: Show a bar, in parameters, once the work has taken five seconds.

    Returns:
        The spectra. Singular values are exact to 1e-7 of the largest, and no gradient of few tokens is formed.

    Raises:
        GeometryError: If ``gradients`` holds something other than gradients or a value that is not finite, ``groups``
            is 1 or negative, ``null_draws`` is negative, the confidence is not between 0 and 1, or all examples are
            copies of one row.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> safety = gk.load_examples("safety").select(range(4))
        >>> options = {"per_sample": True, "layers": "lm_head.*", "progress": False}
        >>> gradients = gk.collect_gradients(model, tokenizer, safety, **options)
        >>> low, high = spectrum(gradients).interval("effective_rank")
        >>> bool(low < spectrum(gradients).mean("effective_rank") < high)
        True
    """
    check_gradients("given", gradients)
    check_draws(null_draws, 0, "null_draws")
    check_groups(groups)
    check_confidence(confidence)
    check_seed(seed)
    if groups and isinstance(gradients, GradientSet):
        check_different_samples({"given": gradients}, 2)
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
    left_out = example_groups(gradients, groups, seed)
    measures = {
        name: measure_layer(
            name,
            gradient,
            weighted_parts(gradients, name),
            left_out,
            NullDraws(null_draws, parameter_generator(seed, name)),
        )
        for name, gradient in with_bar(matrices.items(), "spectra", "parameter", progress)
    }
    return spectrum_of(measures, confidence)


def spectrum_of(measures: Mapping[str, LayerMeasure], confidence: float = 0.95) -> Spectrum:
    """Return the spectra that were measured parameter by parameter, see :func:`spectrum`."""
    without = {name: measure.without for name, measure in measures.items() if measure.without}
    return Spectrum(
        {name: measure.spectrum for name, measure in measures.items()},
        {name: measure.null for name, measure in measures.items()},
        without,
        confidence,
    )


def example_groups(gradients: Mapping[str, LayerGradient], groups: int, seed: int) -> list[np.ndarray]:
    """Return the groups of examples that are left out in turn, for all parameters; empty without two samples."""
    if not isinstance(gradients, GradientSet) or len(gradients.samples) < 2 or not groups:
        return []
    return jackknife_groups(len(gradients.samples), groups, np.random.default_rng(seed))


def weighted_parts(gradients: Mapping[str, LayerGradient], name: str) -> list[LayerGradient]:
    """Return the gradients of the examples by a parameter, weighted so that their sum is N times the mean gradient."""
    if not isinstance(gradients, GradientSet):
        return []
    relative_weights = gradients.weights * len(gradients.samples)  # 1 for equal weights: nothing is scaled then
    return [
        sample[name] if weight == 1 else sample[name].scaled(weight)
        for sample, weight in zip(gradients.samples, relative_weights, strict=True)
    ]
