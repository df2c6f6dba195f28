"""What results have to explore: series of numbers, each of one statistic, set of examples and parameter."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from geomkit.correlation.conflict import Conflict
from geomkit.errors import GeometryError
from geomkit.inputs.parameters import ALL_PARAMETERS
from geomkit.plots.labels import statistic_words
from geomkit.spf.certificate import Certificate
from geomkit.svd.layer_spectrum import LayerSpectrum
from geomkit.svd.one_sample.gradient_map import GradientMap
from geomkit.svd.principal_angles import Angles
from geomkit.svd.spectrum import Spectrum
from geomkit.svd.spectrum_contrast import SpectrumContrast
from geomkit.utils.arguments import type_in_words

if TYPE_CHECKING:
    from geomkit.analysis.analysis import Analysis

_Values = NDArray[np.float64]

_MOST_POINTS = 40
"""Longer curves are thinned to this many points, evenly on a log axis."""

_NO_VALUES: _Values = np.empty(0)
_SHARE = ".0%"


@dataclass(frozen=True)
class Statistic:
    """A number that can be explored.

    Attributes:
        name: The name, in the menu and along the vertical axis.
        abscissa: What is along the horizontal axis; empty for the decoder layers.
        is_log: Whether the vertical axis is logarithmic.
        form: The format of the ticks, in d3's notation; plotly's when empty.
        combined: What stands for several parameters in one curve: ``"median"``, ``"sum"`` or ``"mean"``.
        is_line: Whether a curve is a line rather than markers.
        beyond: The value beyond the end of a curve that is shorter than others.
    """

    name: str
    abscissa: str = ""
    is_log: bool = False
    form: str = ""
    combined: str = "median"
    is_line: bool = True
    beyond: float = np.nan


@dataclass(frozen=True, eq=False)
class Series:
    """The values of a statistic for one set and one parameter.

    Attributes:
        statistic: The statistic.
        of: Name of the set of examples, or of the run.
        parameter: The parameter.
        values: (n,) values; one value if the statistic is drawn over layers.
        x: (n,) places along the horizontal axis; empty if this is the parameter's layer.
        low: (n,) lower ends of the intervals, NaN where unknown; empty if there are no intervals.
        high: (n,) upper ends.
        null: (n,) values where there is nothing to find; empty if there is no null.
        null_low: (n,) lower ends of the range of the null.
        null_high: (n,) upper ends.
        at: The checkpoint; empty if there is one only.
    """

    statistic: Statistic
    of: str
    parameter: str
    values: _Values
    x: _Values = field(default_factory=lambda: _NO_VALUES)
    low: _Values = field(default_factory=lambda: _NO_VALUES)
    high: _Values = field(default_factory=lambda: _NO_VALUES)
    null: _Values = field(default_factory=lambda: _NO_VALUES)
    null_low: _Values = field(default_factory=lambda: _NO_VALUES)
    null_high: _Values = field(default_factory=lambda: _NO_VALUES)
    at: str = ""


def series_of(result: object, name: str = "") -> list[Series]:
    """Return all series of a result, or of a mapping of results, whose values may be mappings too.

    Args:
        result: A result, or results by name.
        name: Name of the result; if left out, a name that says what the numbers are of.

    Raises:
        GeometryError: If a result is none of those that can be explored, or nothing is given.
    """
    if isinstance(result, Mapping):
        if not result:
            raise GeometryError("expected at least one result to explore, found none; give explore(result)")
        prefix = f"{name}: " if name else ""
        return [series for key, value in result.items() for series in series_of(value, f"{prefix}{key}")]
    for cls in type(result).__mro__:
        if read := _READERS.get(cls.__name__):
            return list(read(result, name))
    raise GeometryError(
        "expected spectra, their comparison, principal angles, a conflict, a map of gradients, a certificate, a "
        f"fine-tune under SPF, an analysis, a trajectory, or a dict of these by name, found {type_in_words(result)}"
    )


# ------------------------------------------------------------------------------------------- measures of gradients


def _of_spectrum(spectrum: Spectrum, name: str) -> Iterator[Series]:
    of = name or "gradient"
    for layer in spectrum.layers.values():
        if layer.is_zero:
            continue
        indices = np.unique(np.geomspace(1, layer.rank_bound, _MOST_POINTS).round().astype(np.int64))
        for statistic, values_of in ((_SINGULAR_VALUES, _relative), (_ENERGY, _energy)):
            draws = [values_of(draw, indices) for draw in spectrum.null.get(layer.parameter, ()) if not draw.is_zero]
            null = np.quantile(draws, (0, 0.5, 1), axis=0) if draws else np.empty((3, 0))
            yield Series(
                statistic, of, layer.parameter, values_of(layer, indices), indices.astype(float),
                null=null[1], null_low=null[0], null_high=null[2],
            )  # fmt: skip
    yield from _rows(spectrum.to_frame(), of, lambda statistic: Statistic(statistic_words(statistic)))


_SINGULAR_VALUES = Statistic("singular values σ<sub>i</sub>/σ<sub>1</sub>", "index i", is_log=True, beyond=0.0)
_ENERGY = Statistic("energy CER(k)", "rank k", form=_SHARE, beyond=1.0)


def _relative(layer: LayerSpectrum, indices: NDArray[np.int64]) -> _Values:
    """Return σ_i/σ_1 at indices from 1, zero beyond the numeric rank."""
    values = np.zeros(len(indices))
    inside = indices <= min(layer.numeric_rank, len(layer.singular_values))
    values[inside] = layer.singular_values[indices[inside] - 1] / layer.singular_values[0]
    return values


def _energy(layer: LayerSpectrum, indices: NDArray[np.int64]) -> _Values:
    return np.array([layer.cer(int(k)) for k in indices])


def _of_contrast(contrast: SpectrumContrast, name: str) -> Iterator[Series]:
    frame = contrast.to_frame().rename(columns={"difference": "value"}).assign(null=0.0)
    of = name or " − ".join(contrast.names)
    yield from _rows(frame, of, lambda statistic: Statistic(f"difference of {statistic_words(statistic)}"))


def _of_angles(angles: Angles, name: str) -> Iterator[Series]:
    of = name or "safety"
    for parameter, layer in angles.layers.items():
        degrees = np.degrees(layer.angles[::-1])
        if len(degrees):
            edge = np.full(len(degrees), np.degrees(np.arccos(min(layer.random_edge, 1.0))))
            yield Series(_ANGLES, of, parameter, degrees, np.arange(1.0, len(degrees) + 1), null=edge)
    frame = angles.to_frame()
    statistics = {name: Statistic(name.replace("_", " ")) for name in frame["statistic"].unique()}
    statistics["overlap"] = Statistic("overlap, mean cos²")
    yield from _rows(frame, of, statistics.__getitem__)
    control = frame.dropna(subset=["control"]).assign(value=frame["control"])
    yield from _rows(control, f"{name} control".strip(), statistics.__getitem__)


_ANGLES = Statistic("angles, degrees", "index of the angle")


def _of_conflict(conflict: Conflict, name: str) -> Iterator[Series]:
    of, control = name or "safety", f"{name} control".strip()
    frame = conflict.to_frame()
    known = ["null_low", "null_high"]
    columns = {
        # statistic: set, column of the value, columns of the interval, columns of the null, the null itself
        "cosine of the means": (of, "cosine", (), known, np.nan),
        "cosine with utility": (of, "corrected", ("low", "high"), (), 0.0),
        "safety − control": (of, "contrast", ("contrast_low", "contrast_high"), (), 0.0),
        "share of the norms": (of, "weight", (), (), np.nan),
    }
    for statistic, (set_name, value, interval, null_range, null) in columns.items():
        if value in frame:
            yield from _rows(_renamed(frame, value, interval, null_range, null), set_name, _named(statistic))
    if "control" in frame:
        yield from _rows(_renamed(frame, "control", (), (), 0.0), control, _named("cosine with utility"))


def _named(statistic: str) -> Any:
    return lambda _: Statistic(statistic, form=_SHARE if statistic.startswith("share") else "")


def _renamed(frame: pd.DataFrame, value: str, interval: Any, null_range: Any, null: float) -> pd.DataFrame:
    """Return a frame of one statistic with the columns that :func:`_rows` reads; unknown values have no interval."""
    rows = pd.DataFrame({"parameter": frame["parameter"], "statistic": value, "value": frame[value], "null": null})
    for names, columns in ((("low", "high"), interval), (("null_low", "null_high"), null_range)):
        for target, column in zip(names, columns, strict=False):
            rows[target] = frame[column]
    return rows.dropna(subset=["value"])


def _rows(frame: pd.DataFrame, of: str, statistic_of: Any) -> Iterator[Series]:
    """Yield a series of one value for each row of a data frame of a result."""
    columns = ["value", "low", "high", "null", "null_low", "null_high"]
    present = frame.reindex(columns=["parameter", "statistic", *columns])
    for parameter, statistic, *numbers in present.itertuples(index=False):
        value, low, high, null, null_low, null_high = (np.array([number], dtype=float) for number in numbers)
        if np.isfinite(value[0]):
            yield Series(
                statistic_of(statistic), of, parameter, value,
                low=low, high=high, null=null, null_low=null_low, null_high=null_high,
            )  # fmt: skip


# -------------------------------------------------------------------------------------- maps, certificates, analyses


def _of_map(plane: GradientMap, name: str) -> Iterator[Series]:
    frame = plane.to_frame()
    axis = "principal component" if plane.method == "pca" else "scaled dimension"
    in_plane = Statistic(f"{axis} 2", f"{axis} 1", is_line=False)
    by_example = Statistic("silhouette", "example", is_line=False)
    for of, rows in frame.groupby("set", sort=False):
        label = f"{name}: {of}" if name else str(of)
        numbers = {column: rows[column].to_numpy(dtype=float) for column in ("x", "y", "example", "silhouette")}
        yield Series(in_plane, label, ALL_PARAMETERS, numbers["y"], numbers["x"])
        yield Series(by_example, label, ALL_PARAMETERS, numbers["silhouette"], numbers["example"])


_CHANGES = {
    "first_order": Statistic("change by applied update", "optimizer step", combined="sum"),
    "first_order_raw": Statistic("change by own update", "optimizer step", combined="sum"),
    "fired": Statistic("blocks projected", "optimizer step", form=_SHARE, combined="mean"),
}
"""By column of the records, what is explored of a certificate; the changes are of the safety loss, to first order."""


def _of_certificate(certificate: Certificate, name: str) -> Iterator[Series]:
    frame = certificate.to_frame(by="block")
    if frame.empty:
        raise GeometryError("expected a certificate with steps and blocks, found none; train first")
    for block, rows in frame.groupby("block", sort=False):
        steps = rows["step"].to_numpy(dtype=float)
        for column, statistic in _CHANGES.items():
            values = rows[column].to_numpy(dtype=float)
            null = np.zeros(len(steps)) if statistic.combined == "sum" else _NO_VALUES
            yield Series(statistic, name or certificate.rule, str(block), values, steps, null=null)


def _of_fine_tune(result: Any, name: str) -> Iterator[Series]:
    if result.certificate is None:
        raise GeometryError('expected a fine-tune with a certificate, found one without SPF; give SPF(rule="monitor")')
    yield from _of_certificate(result.certificate, name)


def _of_analysis(analysis: "Analysis", name: str) -> Iterator[Series]:
    for of, spectrum in analysis.spectra.items():
        yield from _of_spectrum(spectrum, f"{name}: {of}" if name else of)
    for part in (_of_conflict(analysis.conflict, ""), _of_angles(analysis.angles, "")):
        yield from (replace(series, of=f"{name}: {series.of}" if name else series.of) for series in part)


def _of_trajectory(trajectory: Any, name: str) -> Iterator[Series]:
    """Yield the series of every moment, without curves: a menu of layers and one of checkpoints cannot share them."""
    for at, point in trajectory.moments.items():
        for series in _of_analysis(point.analysis, name):
            if not series.statistic.abscissa:
                yield replace(series, at=str(at))


_READERS: Mapping[str, Any] = {
    "Spectrum": _of_spectrum,
    "SpectrumContrast": _of_contrast,
    "Angles": _of_angles,
    "Conflict": _of_conflict,
    "GradientMap": _of_map,
    "Certificate": _of_certificate,
    "FineTuneResult": _of_fine_tune,
    "Analysis": _of_analysis,
    "Trajectory": _of_trajectory,
}
"""What reads the series of a result, by the name of its class: some classes would import transformers, for seconds."""
