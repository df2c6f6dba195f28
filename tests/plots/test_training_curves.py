"""Figures over training: means and runs, parts of the drift, certificates."""

import numpy as np
import pytest

import geomkit as gk
from geomkit import plots
from geomkit.experiments.results import Results
from tests.experiments.test_results import outcomes, record
from tests.helpers.figures import CERTIFICATE, CURVE, drawn_traces, legend


def test_along_training(results):
    figure = plots.plot_refusal_during_training(results)
    (mean,) = drawn_traces(figure, "SFT")
    assert (list(mean.x), list(mean.y)) == ([10, 20], pytest.approx([0.6, 0.2]))
    thin = [trace for trace in figure.data if trace.legendgroup == "SFT" and trace.name is None]
    assert [list(trace.y) for trace in thin] == [[0.5, 0.1], [0.7, 0.3]]
    (only,) = drawn_traces(plots.plot_refusal_during_training(results.where(seed=0)), "SFT")
    assert list(only.y) == [0.5, 0.1]
    with pytest.raises(gk.GeomkitError, match="along = 5"):
        plots.plot_refusal_during_training(results.where(arm="mixing"))


def test_certificate_against_outcome(results):
    figure = plots.plot_certificate_outcome(results)
    (held,), (raised,) = drawn_traces(figure, "rank1"), drawn_traces(figure, "mixing")
    assert (held.xaxis, list(held.y), held.marker.symbol) == ("x", [0.9], "circle")
    assert (raised.xaxis, list(raised.x), list(raised.y)) == ("x2", [0.4], [0.8])
    assert raised.marker.symbol == "diamond-open"
    assert legend(figure) == ["rank1", "mixing", "promised", "nothing promised"]
    with pytest.raises(gk.GeomkitError, match="cells under SPF"):
        plots.plot_certificate_outcome(results.where(arm="SFT"))


def test_of_many_certified_arms_those_with_most_runs_have_colours():
    rows = [record(f"arm {place}", outcomes(50), certificate=CERTIFICATE) for place in range(12)]
    rows.append(record("arm 11", outcomes(50), seed=1, certificate=CERTIFICATE))
    figure = plots.plot_certificate_outcome(Results("x", tuple(rows)))
    names = legend(figure)
    assert len(names) == 11  # eight, the others, and two symbols
    assert {"arm 11", "other arms"} <= set(names)
    (others,) = drawn_traces(figure, "other arms")
    assert len(others.y) == 4


def test_the_parts_of_the_drift_add_up(results):
    figure = plots.plot_drift(results)
    (both,), (first,), (curved,) = (drawn_traces(figure, name) for name in ("drift", "first_order", "curvature"))
    np.testing.assert_allclose(np.array(first.customdata) + np.array(curved.customdata), both.customdata)
    assert list(curved.customdata) == CURVE["curvature"]
    np.testing.assert_allclose(curved.y, np.arcsinh(np.array(CURVE["curvature"]) / 1e-4))
    assert tuple(figure.layout.yaxis.ticktext) == ("−1", "−0.01", "0", "0.01", "1")
    assert legend(figure) == ["measured: the sum of both", "first order", "curvature"]
    with pytest.raises(gk.GeomkitError, match="curvature = true"):
        plots.plot_drift(results.where(arm="SFT"))


def test_runs_that_did_not_measure_curvature_have_no_part_in_the_drift():
    unknown = CURVE | {"curvature": [None] * 3}
    rows = (record("rank1", outcomes(90), curve=CURVE), record("left", outcomes(90), curve=unknown))
    figure = plots.plot_drift(Results("x", rows))
    assert [note.text for note in figure.layout.annotations] == ["rank1"]
    with pytest.raises(gk.GeomkitError, match="curvature = true"):
        plots.plot_drift(Results("x", rows[1:]))
