"""Whether two sets of examples differ in the rank of their gradients, and by how much.

A spectrum below its null does not speak of safety yet: on a model with random weights it is below too, because the
examples repeat their wording. What a set does *not* share with a control set at the same token count is left.
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
from geomkit.svd.layer_spectrum import statistics_of
from geomkit.svd.spectrum import Spectrum
from geomkit.utils.arguments import check_confidence, type_in_words
from geomkit.utils.display import html_table
from geomkit.utils.figures import draw

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class SpectrumContrast:
    """The difference between the spectra of two independent sets of examples, parameter by parameter.

    Attributes:
        a: Spectra of the first set.
        b: Spectra of the second, of the same parameters at the same token counts.
        names: Of the two sets.
        confidence: Of the intervals.
    """

    a: Spectrum
    b: Spectrum
    names: tuple[str, str] = ("safety", "control")
    confidence: float = 0.95

    @property
    def measured(self) -> list[str]:
        """The parameters whose gradient is zero on neither side."""
        return [name for name in self.a.measured if not self.b.layers[name].is_zero]

    def mean(self, statistic: str) -> tuple[float, tuple[float, float]]:
        """Return the difference a − b of a statistic's means over parameters, and its interval.

        Returns:
            The difference and the ends of its interval, NaN for a statistic that has none.

        Raises:
            GeometryError: If there is no such statistic.
        """
        difference, without = self._mean(statistic)
        if not all(map(len, without)):
            return difference, (float("nan"), float("nan"))
        low, high = jackknife_interval(difference, *without, confidence=self.confidence)
        return difference, (float(low), float(high))

    def p_value(self, statistic: str) -> float:
        """Return the two-sided p-value of that difference being zero; NaN for a statistic without an interval.

        Raises:
            GeometryError: If there is no such statistic.
        """
        difference, without = self._mean(statistic)
        return float(jackknife_p_value(difference, *without)) if all(map(len, without)) else float("nan")

    def _mean(self, statistic: str) -> tuple[float, tuple[np.ndarray, np.ndarray]]:
        names = self.measured
        if not names:
            return float("nan"), (np.empty(0), np.empty(0))
        difference = float((_values(self.a, names, statistic) - _values(self.b, names, statistic)).mean())
        left_out = (side.left_out(statistic, names).mean(axis=1) for side in (self.a, self.b))
        first, second = left_out
        return difference, (first, second)

    def to_frame(self) -> "pd.DataFrame":
        """Return a row per parameter and statistic.

        ``a`` and ``b`` are the two values, ``difference`` is a − b with its interval ``low``, ``high`` and two-sided
        ``p_value``; ``q_value`` is that p-value adjusted for the number of parameters, within each statistic
        (:func:`geomkit.stats.multiple_testing.benjamini_hochberg`).
        """
        return self._frame.copy()

    @cached_property
    def _frame(self) -> "pd.DataFrame":
        import pandas as pd

        names = list(self.a.layers)
        statistics = [_columns(self, names, statistic) for statistic in self.a.layers[names[0]].statistics()]
        frame = pd.concat([pd.DataFrame(columns) for columns in statistics])
        return frame.sort_values("place", kind="stable").drop(columns="place").reset_index(drop=True)

    def plot(self) -> "go.Figure":
        """Draw it, see :func:`geomkit.plots.ranks.plot_spectrum_contrast`."""
        return draw("plot_spectrum_contrast", self)

    def __str__(self) -> str:
        """Say the differences in effective rank and CER(10) with their intervals, and in how many parameters."""
        said = []
        for words, statistic in (("effective rank", "effective_rank"), ("CER(10)", "cer10")):
            difference, (low, high) = self.mean(statistic)
            said.append(f"mean {words} {difference:+.3g} [{low:+.3g}, {high:+.3g}]")
        ranks = self._frame[self._frame["statistic"] == "effective_rank"]
        differ = int((ranks["q_value"] < 1 - self.confidence).sum())
        where = f"; effective rank differs in {differ} of {len(ranks)} parameters" if len(ranks) > 1 else ""
        return f"{self.names[0]} − {self.names[1]}: {', '.join(said)}{where}"

    def _repr_html_(self) -> str:
        return html_table(str(self), self.to_frame())


def _values(side: Spectrum, names: Sequence[str], statistic: str) -> np.ndarray:
    return statistics_of([side.layers[name] for name in names], statistic)


def _columns(contrast: SpectrumContrast, names: Sequence[str], statistic: str) -> dict[str, object]:
    """Return the rows of one statistic, as columns; ``place`` is that of the parameter."""
    a, b = (_values(side, names, statistic) for side in (contrast.a, contrast.b))
    difference = a - b
    without = [side.left_out(statistic, names) for side in (contrast.a, contrast.b)]
    low, high, p_value = (np.full(len(names), np.nan) for _ in range(3))
    if all(map(len, without)):
        low, high = jackknife_interval(difference, *without, confidence=contrast.confidence)
        p_value = jackknife_p_value(difference, *without)
        # A gradient of zero has no examples that could vary: nothing is known of its rank.
        zero = ~np.isin(names, contrast.measured)
        low, high, p_value = (np.where(zero, np.nan, found) for found in (low, high, p_value))
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

    Intervals and p-values are those of the jackknife of two samples, with Student's t and the degrees of freedom of
    Welch and Satterthwaite. They are cautious, as those of :func:`geomkit.svd.spectrum.spectrum` are: of 500 pairs of
    sets from each planted population, p < .05 was found in 0 to 4 % where tokens had low-rank or power-law covariances,
    and in 0 to 10 % (most often 4 %) where a few examples had most of the weight.

    Args:
        a: Of the first set, from per-sample gradients thinned by :func:`geomkit.svd.token_matching.match_tokens`.
        b: Of the second set, of other examples, thinned together with the first.
        names: Of the two sets.
        confidence: Of the intervals.

    Returns:
        The differences a − b.

    Raises:
        GeometryError: If a side is no spectrum or was measured without its examples, parameters, their shapes or token
            counts differ, there are not two names, or the confidence is not between 0 and 1.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> sets = (gk.load_examples(name).select(range(8)) for name in ("safety", "utility"))
        >>> options = {"per_sample": True, "layers": "*.3.mlp.*", "progress": False}
        >>> sides = gk.match_tokens(*(gk.collect_gradients(model, tokenizer, each, **options) for each in sets))
        >>> found = compare_spectra(*(gk.spectrum(side) for side in sides), names=("safety", "utility"))
        >>> difference, (low, high) = found.mean("effective_rank")
        >>> bool(low < difference < high)
        True
    """
    check_confidence(confidence)
    if len(names) != 2 or isinstance(names, str):
        raise GeometryError(f"expected two names, found {names!r}; give one for each side")
    for found in (a, b):
        if not isinstance(found, Spectrum):
            raise GeometryError(
                f"expected two spectra, found {type_in_words(found)}; measure each with spectrum or span"
            )
    if difference := sorted(set(a.layers).symmetric_difference(b.layers)):
        raise GeometryError(
            f"expected spectra of the same parameters, found {len(difference)} on one side only "
            f"({', '.join(difference[:4])}); measure what match_tokens returns"
        )
    if not a.layers:
        raise GeometryError("expected spectra of one parameter or more, found none; choose others with layers=")
    for side, found in zip(names, (a, b), strict=True):
        if any(len(found.without.get(name, ())) < 2 for name in found.layers):
            raise GeometryError(
                f"expected the {side} spectra without some of their examples in turn, found them of the mean only; "
                "measure a set collected with per_sample=True, with groups= of 2 or more"
            )
    _check_units(a, b)
    _check_shapes(a, b)
    return SpectrumContrast(a, b, names, confidence)


def _check_units(a: Spectrum, b: Spectrum) -> None:
    """Check that both sides are of as many tokens, or of as many examples."""
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
        "grows with tokens, so bring the sides to the same number with match_tokens first"
    )


def _check_shapes(a: Spectrum, b: Spectrum) -> None:
    for name, layer in a.layers.items():
        if layer.shape != (other := b.layers[name].shape):
            raise GeometryError(
                f"expected gradients of one shape for {name}, found {layer.shape} and {other}; collect both from the "
                "same model"
            )
