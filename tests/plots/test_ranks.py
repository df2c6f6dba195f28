"""Figures of a statistic by layer: panels, null ranges, ticks and titles."""

import numpy as np
import pytest

from geomkit import plots
from geomkit.errors import GeometryError
from geomkit.svd.spectrum import Spectrum
from geomkit.svd.spectrum_contrast import SpectrumContrast
from tests.helpers.figures import LABELS, one_line


def test_effective_rank_has_a_panel_per_place_and_the_null_range(safety: Spectrum, utility: Spectrum) -> None:
    figure = plots.plot_effective_rank(safety, utility)
    assert [note.text for note in figure.layout.annotations] == [*LABELS, "outside the layers"]
    frame = safety.to_frame().query("statistic == 'effective_rank'")
    rows = frame[frame["parameter"].str.contains("q_proj")]
    null, value = figure.data[:2]
    np.testing.assert_allclose(value.y, rows["value"])
    np.testing.assert_allclose(null.y + null.error_y.array, rows["null_high"])
    np.testing.assert_allclose(null.y - null.error_y.arrayminus, rows["null_low"])
    np.testing.assert_allclose(np.round(value.x), [0, 1, 2])
    assert [drawn.name for drawn in figure.data if drawn.showlegend] == ["safety", "utility", "null of the same colour"]
    assert figure.layout.yaxis.minallowed == 0


def test_other_statistics_can_be_drawn(safety: Spectrum) -> None:
    figure = plots.plot_effective_rank(safety, statistic="stable_rank")
    assert figure.layout.yaxis.title.text == "stable rank"
    with pytest.raises(GeometryError, match="expected a statistic among numeric_rank"):
        plots.plot_effective_rank(safety, statistic="rank")


def test_two_layers_have_two_ticks_and_long_names_fit(small: Spectrum) -> None:
    assert list(plots.plot_effective_rank(small).layout.xaxis.tickvals) == [0, 1]
    names = ("safety", "benign requests, refused in the model's own words")
    figure = plots.plot_spectrum_contrast(SpectrumContrast(small, small, names))
    assert one_line(figure.layout.title.text) == "Effective rank: safety − benign requests, refused…"
    assert figure.layout.yaxis.title.text == "difference"
