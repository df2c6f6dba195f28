"""Differences between the spectra of two sets of examples, with intervals and p-values.

A spectrum below its null is not yet a result about safety: the spectrum of a model with random weights is below the
null too, because the examples repeat their wording. Only the difference from a control set at the same token count is
a result about safety.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from geomkit.errors import GeometryError
from geomkit.inputs.parameters import kind_of, layer_index
from geomkit.stats.jackknife import jackknife_interval, jackknife_p_value
from geomkit.stats.multiple_testing import benjamini_hochberg
from geomkit.svd.layer_spectrum import statistic_values
from geomkit.svd.spectrum import Spectrum
from geomkit.utils.arguments import check_confidence, type_in_words
from geomkit.utils.figures import DrawnResult, draw
from geomkit.utils.readable import with_interval

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class SpectrumContrast(DrawnResult):
    """The difference between the spectra of two independent sets of examples, parameter by parameter.

    Attributes:
        a: Spectra of the first set.
        b: Spectra of the second set, for the same parameters at the same token counts.
        names: Names of the two sets.
        confidence: Nominal coverage of the intervals.
    """

    a: Spectrum
    b: Spectrum
    names: tuple[str, str] = ("safety", "control")
    confidence: float = 0.95

    @property
    def measured(self) -> list[str]:
        """Names of the parameters with a non-zero gradient in both sets."""
        return [name for name in self.a.measured if not self.b.layers[name].is_zero]

    def mean(self, statistic: str) -> tuple[float, tuple[float, float]]:
        """Return the difference a − b between the means of a statistic over parameters, and its interval.

        Returns:
            The difference and the ends of its interval, NaN for a statistic without an interval.

        Raises:
            GeometryError: If there is no such statistic.
        """
        difference, left_out = self._mean(statistic)
        if not all(map(len, left_out)):
            return difference, (float("nan"), float("nan"))
        low, high = jackknife_interval(difference, *left_out, confidence=self.confidence)
        return difference, (float(low), float(high))

    def p_value(self, statistic: str) -> float:
        """Return the two-sided p-value of equal means of a statistic; NaN for a statistic without an interval.

        Raises:
            GeometryError: If there is no such statistic.
        """
        difference, left_out = self._mean(statistic)
        return float(jackknife_p_value(difference, *left_out)) if all(map(len, left_out)) else float("nan")

    def _mean(self, statistic: str) -> tuple[float, tuple[np.ndarray, np.ndarray]]:
        """Return the difference between the means, and the means of both sets without each group of examples."""
        names = self.measured
        if not names:
            return float("nan"), (np.empty(0), np.empty(0))
        difference = float((_values(self.a, names, statistic) - _values(self.b, names, statistic)).mean())
        first, second = (spectrum.left_out(statistic, names).mean(axis=1) for spectrum in (self.a, self.b))
        return difference, (first, second)

    def to_frame(self) -> "pd.DataFrame":
        """Return a data frame with one row per parameter and statistic.

        ``a`` and ``b`` are the two values, and ``difference`` is a − b with the interval ``low`` to ``high`` and the
        two-sided ``p_value``; ``q_value`` is the p-value adjusted for the number of parameters, within each statistic
        (:func:`geomkit.stats.multiple_testing.benjamini_hochberg`).
        """
        return self._frame.copy()

    def shown_frame(self) -> "pd.DataFrame":
        """Return a data frame with one row per statistic: the means over parameters, and their difference."""
        import pandas as pd

        rows = []
        for name in self.a.layers[next(iter(self.a.layers))].statistics():
            difference, interval = self.mean(name)
            means = (float(_values(spectrum, self.measured, name).mean()) for spectrum in (self.a, self.b))
            rows.append((name, *means, difference, *interval, self.p_value(name)))
        columns = ["mean over parameters of", *self.names, "difference", "low", "high", "p_value"]
        return pd.DataFrame(rows, columns=columns)

    @cached_property
    def _frame(self) -> "pd.DataFrame":
        import pandas as pd

        names = list(self.a.layers)
        statistics = [_columns(self, names, statistic) for statistic in self.a.layers[names[0]].statistics()]
        frame = pd.concat([pd.DataFrame(columns) for columns in statistics])
        return frame.sort_values("place", kind="stable").drop(columns="place").reset_index(drop=True)

    def plot(self) -> "go.Figure":
        """Draw the differences, see :func:`geomkit.plots.ranks.plot_spectrum_contrast`."""
        return draw("plot_spectrum_contrast", self)

    def __str__(self) -> str:
        """Return the mean differences in effective rank and CER(10), and in how many parameters the rank differs."""
        differences = []
        for words, statistic in (("effective rank", "effective_rank"), ("CER(10)", "cer10")):
            difference, interval = self.mean(statistic)
            differences.append(f"mean {words} {with_interval(difference, interval, sign=True)}")
        ranks = self._frame[self._frame["statistic"] == "effective_rank"]
        differ = int((ranks["q_value"] < 1 - self.confidence).sum())
        where = f"; effective rank differs in {differ} of {len(ranks)} parameters" if len(ranks) > 1 else ""
        return f"{self.names[0]} − {self.names[1]}: {', '.join(differences)}{where}"


def _values(spectrum: Spectrum, names: Sequence[str], statistic: str) -> np.ndarray:
    return statistic_values([spectrum.layers[name] for name in names], statistic)


def _columns(contrast: SpectrumContrast, names: Sequence[str], statistic: str) -> dict[str, object]:
    """Return the columns of the rows of one statistic; ``place`` is the index of the parameter."""
    a, b = (_values(spectrum, names, statistic) for spectrum in (contrast.a, contrast.b))
    difference = a - b
    left_out = [spectrum.left_out(statistic, names) for spectrum in (contrast.a, contrast.b)]
    low, high, p_value = (np.full(len(names), np.nan) for _ in range(3))
    if all(map(len, left_out)):
        low, high = jackknife_interval(difference, *left_out, confidence=contrast.confidence)
        p_value = jackknife_p_value(difference, *left_out)
        # The rank of a zero gradient does not vary with the examples, so that the jackknife says nothing about it.
        zero = ~np.isin(names, contrast.measured)
        low, high, p_value = (np.where(zero, np.nan, values) for values in (low, high, p_value))
    return {
        "parameter": names,
        "kind": [kind_of(name) for name in names],
        "layer": [layer_index(name) for name in names],
        "statistic": statistic,
        "a": a,
        "b": b,
        "difference": difference,
        "low": low,
        "high": high,
        "p_value": p_value,
        "q_value": benjamini_hochberg(p_value),
        "tokens": [contrast.a.layers[name].tokens for name in names],
        "place": range(len(names)),
    }


def compare_spectra(
    a: Spectrum, b: Spectrum, *, names: tuple[str, str] = ("safety", "control"), confidence: float = 0.95
) -> SpectrumContrast:
    """Compare the spectra of two independent sets of examples at equal token counts.

    Intervals and p-values come from the two-sample jackknife, with Student's t and the degrees of freedom of Welch and
    Satterthwaite. They are cautious, as the intervals of :func:`geomkit.svd.spectrum.spectrum` are, except where a
    few examples have most of the squared norm; see tests/benchmarks/README.md.

    Args:
        a: Spectra of the first set, from per-sample gradients thinned by
            :func:`geomkit.svd.token_matching.match_tokens`.
        b: Spectra of the second set, of other examples, thinned together with the first set.
        names: Names of the two sets.
        confidence: Nominal coverage of the intervals, between 0 and 1.

    Returns:
        The differences a − b.

    Raises:
        GeometryError: If ``a`` or ``b`` is not a spectrum or was measured without samples; if parameters, shapes or
            token counts differ; if there are not two names; or if the confidence is not between 0 and 1.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> sets = (gk.load_examples(name).select(range(8)) for name in ("safety", "utility"))
        >>> options = {"per_sample": True, "layers": "*.3.mlp.*", "progress": False}
        >>> matched = gk.match_tokens(*(gk.collect_gradients(model, tokenizer, rows, **options) for rows in sets))
        >>> contrast = compare_spectra(*(gk.spectrum(gradients) for gradients in matched), names=("safety", "utility"))
        >>> difference, (low, high) = contrast.mean("effective_rank")
        >>> bool(low < difference < high)
        True
    """
    check_confidence(confidence)
    if len(names) != 2 or isinstance(names, str):
        raise GeometryError(f"expected two names, found {names!r}; give one for each set")
    for spectrum in (a, b):
        if not isinstance(spectrum, Spectrum):
            raise GeometryError(
                f"expected two spectra, found {type_in_words(spectrum)}; measure each with spectrum or span"
            )
    if difference := sorted(set(a.layers).symmetric_difference(b.layers)):
        raise GeometryError(
            f"expected spectra of the same parameters, found {len(difference)} on one side only "
            f"({', '.join(difference[:4])}); measure what match_tokens returns, or spans with the same by="
        )
    if not a.layers:
        raise GeometryError("expected spectra of one parameter or more, found none; choose others with layers=")
    for set_name, spectrum in zip(names, (a, b), strict=True):
        if any(len(spectrum.without.get(name, ())) < 2 for name in spectrum.layers):
            raise GeometryError(
                f"expected {set_name} spectra with groups of examples left out, found spectra of the mean only; "
                "measure a set collected with per_sample=True, with groups= of 2 or more"
            )
    _check_units(a, b)
    _check_shapes(a, b)
    return SpectrumContrast(a, b, names, confidence)


def _check_units(a: Spectrum, b: Spectrum) -> None:
    """Raise GeometryError unless both spectra have the same number of tokens, or of examples, for every parameter."""
    if a.unit != b.unit:
        raise GeometryError(
            f"expected two spectra of gradients or two spans, found one of {a.unit} and one of {b.unit}; measure both "
            "with spectrum, or both with span"
        )
    counts = {name: (layer.tokens, b.layers[name].tokens) for name, layer in a.layers.items()}
    unequal = [name for name, (first, second) in counts.items() if first != second]
    if not unequal:
        return
    first, second = counts[unequal[0]]
    if a.unit == "examples":
        raise GeometryError(
            f"expected equal numbers of examples, found {first} and {second}; rank grows with examples, so give as "
            "many of each set"
        )
    raise GeometryError(
        f"expected equal token counts, found {first} and {second} in {unequal[0]} ({len(unequal)} differ); rank "
        "grows with tokens, so bring the sets to the same number with match_tokens first"
    )


def _check_shapes(a: Spectrum, b: Spectrum) -> None:
    """Raise GeometryError unless every parameter has the same shape in both spectra."""
    for name, layer in a.layers.items():
        if layer.shape != (other := b.layers[name].shape):
            raise GeometryError(
                f"expected gradients of one shape for {name}, found {layer.shape} and {other}; collect both from the "
                "same model"
            )
