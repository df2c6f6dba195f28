"""Figures of experiments show what the frames say, also where cells are missing or broke off."""

import numpy as np
import pytest

import geomkit as gk
from geomkit import plots
from geomkit.experiments.results import Results
from tests.experiments.test_results import outcomes, record

CURVE = {"step": [1, 50, 100], "first_order": [0.0, -0.2, -0.3], "curvature": [0.0, 0.1, 0.5]}
CERTIFICATE = {"guaranteed": True, "raising": 0.0}


def results(*more):
    rows = [
        record("untouched", outcomes(100, 0, 20)),
        record("SFT", outcomes(10), along=[[10, 0.5], [20, 0.1]], attacks={"prefill 1": "0001", "role-play": "0011"}),
        record("SFT", outcomes(30), seed=1),
        record("rank1", outcomes(90, 5), certificate=CERTIFICATE, curve=CURVE, attacks={"prefill 1": "0111"}),
        record("mixing", outcomes(80), certificate={"guaranteed": False, "raising": 0.4}),
        record("SFT", outcomes(50) | {"triggered_refusal": [True, False]}, scenario="backdoor"),
        record("SFT", outcomes(70), rate=2.0),
        record("rank1", outcomes(60), rate=2.0, length=3.0),
        *more,
    ]
    return Results("x", tuple(rows))


BROKEN = {"cell": record("rank1", {}, seed=3)["cell"], "error": "NaN"}


@pytest.fixture(params=[(), (BROKEN,)], ids=["all done", "one broke off"])
def found(request):
    return results(*request.param)


def points(figure, name):
    return [trace for trace in figure.data if trace.name == name and trace.x is not None and trace.x[0] is not None]


def test_the_frontier_has_means_intervals_and_runs(found):
    figure = plots.plot_frontier(found)
    sft, backdoor = points(figure, "SFT")
    assert (sft.x[0], sft.y[0]) == (1.0, pytest.approx(0.2))  # those at another rate are left out
    interval = found.where(rate=1.0).summary().query("arm == 'SFT' and measure == 'refusal'").iloc[0]
    assert sft.y[0] + sft.error_y.array[0] == pytest.approx(interval["high"])
    assert backdoor.y[0] == 0.5  # of requests with the trigger
    (rank1,) = points(figure, "rank1")
    assert (rank1.marker.symbol, sft.marker.symbol.endswith("-open")) == (f"{rank1.marker.symbol[:-5]}-open", False)
    runs = [trace for trace in figure.data if trace.legendgroup == "SFT" and trace.name is None]
    assert list(runs[0].y) == pytest.approx([0.1, 0.3])
    assert sum(bool(trace.showlegend is not False) for trace in figure.data if trace.name == "SFT") == 1


def test_arms_are_chosen_and_too_many_refused(found):
    figure = plots.plot_frontier(found, arms=["mixing"])
    assert {trace.legendgroup for trace in figure.data} == {"mixing"}
    with pytest.raises(gk.GeomkitError, match="'left'"):
        plots.plot_frontier(found, arms=["left"])
    many = Results("x", tuple(record(f"arm {place}", outcomes(1)) for place in range(12)))
    with pytest.raises(gk.GeomkitError, match="at most 9 arms"):
        plots.plot_frontier(many)


def test_along_training(found):
    figure = plots.plot_refusal_along(found)
    (line,) = points(figure, "SFT")
    assert (list(line.x), list(line.y)) == ([10, 20], [0.5, 0.1])
    with pytest.raises(gk.GeomkitError, match="along = 5"):
        plots.plot_refusal_along(found.where(arm="mixing"))


def test_the_map_of_where_arms_break(found):
    figure = plots.plot_breakdown(found, "poison-10")
    sft, rank1 = figure.data
    np.testing.assert_allclose(np.array(sft.z, dtype=float), [[0.2, np.nan], [0.7, np.nan]])
    np.testing.assert_allclose(np.array(rank1.z, dtype=float), [[0.9, np.nan], [np.nan, 0.6]])
    assert [list(row) for row in sft.text] == [["20%", ""], ["70%", ""]]
    assert list(sft.y) == ["1×", "2×"]
    with pytest.raises(gk.GeomkitError, match="expected arms among"):
        plots.plot_breakdown(found.where(rate=1.0), "poison-10")


def test_certificate_against_outcome(found):
    kept, nothing = plots.plot_certificate_outcome(found).data
    assert (list(kept.x), list(kept.y)) == ([0.0], [0.9])
    assert (list(nothing.x), list(nothing.y)) == ([0.4], [0.8])
    with pytest.raises(gk.GeomkitError, match="cells under SPF"):
        plots.plot_certificate_outcome(found.where(arm="SFT"))


def test_the_parts_of_the_drift_add_up(found):
    figure = plots.plot_drift(found)
    (both,), (first,), (curved,) = (points(figure, name) for name in ("measured", "first order", "curvature"))
    np.testing.assert_allclose(np.array(first.y) + np.array(curved.y), both.y)
    assert list(curved.y) == CURVE["curvature"]
    with pytest.raises(gk.GeomkitError, match="curvature = true"):
        plots.plot_drift(found.where(arm="SFT"))


def test_attacks(found):
    figure = plots.plot_attacks(found)
    (sft,), (rank1,) = points(figure, "SFT"), points(figure, "rank1")
    assert (list(sft.x), list(rank1.x)) == ([0.25, 0.5], [0.75])
    assert list(figure.layout.yaxis.ticktext) == ["prefill 1", "role-play"]
    with pytest.raises(gk.GeomkitError, match="attacks ="):
        plots.plot_attacks(found.where(arm="mixing"))
