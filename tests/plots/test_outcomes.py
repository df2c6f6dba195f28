"""Figures of experiments show what the frames say, also where cells are missing or broke off."""

import numpy as np
import plotly.io
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
        record("SFT", outcomes(30), seed=1, along=[[10, 0.7], [20, 0.3]]),
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


def share_at(place):
    """Return the share that stands at a place of a frontier's axis."""
    return 1 - (1 - place) ** 2


def legend(figure):
    return [trace.name for trace in figure.data if trace.showlegend is not False]


def test_the_frontier_has_means_intervals_and_runs(found):
    figure = plots.plot_frontier(found)
    sft, backdoor = points(figure, "SFT")
    assert (sft.x[0], share_at(sft.y[0])) == (1.0, pytest.approx(0.2))  # those at another rate are left out
    interval = found.where(rate=1.0).summary().query("arm == 'SFT' and measure == 'refusal'").iloc[0]
    assert share_at(sft.y[0] + sft.error_y.array[0]) == pytest.approx(interval["high"])
    assert share_at(sft.y[0] - sft.error_y.arrayminus[0]) == pytest.approx(interval["low"])
    assert "refusal <b>20.0%</b>, runs from 10.0% to 30.0%" in sft.hovertemplate
    assert share_at(backdoor.y[0]) == pytest.approx(0.5)  # of requests with the trigger
    (rank1,), (mixing,) = points(figure, "rank1"), points(figure, "mixing")
    assert (rank1.marker.symbol, mixing.marker.symbol) == ("triangle-up-open", "diamond")  # 5 % and 0 % over-refusal
    runs = [trace for trace in figure.data if trace.legendgroup == "SFT" and trace.name is None]
    assert [share_at(place) for place in runs[0].y] == pytest.approx([0.1, 0.3])
    assert legend(figure) == ["untouched", "SFT", "rank1", "mixing"]
    ticks = figure.layout.yaxis
    assert [f"{share_at(place):.0%}" for place in ticks.tickvals] == list(ticks.ticktext)
    assert Results.plot(found) == figure


def test_of_several_organisms_the_first_is_drawn(found):
    more = {"along": [[10, 0.9], [20, 0.9]], "attacks": {"prefill 1": "1111"}}
    both = Results("x", (*found.records, record("SFT", outcomes(99), organism=1, **more),
                         record("SFT", outcomes(99), organism=1, rate=4.0)))  # fmt: skip
    for draw in (plots.plot_frontier, plots.plot_attacks, plots.plot_refusal_during_training):
        assert draw(both) == draw(found)
    assert plots.plot_breakdown(both, "poison-10") == plots.plot_breakdown(found, "poison-10")


def test_a_panel_says_which_strength_it_shows_where_that_is_not_the_scenarios_own(found):
    titles = [each.text for each in plots.plot_frontier(found.where(rate=2.0, length=3.0)).layout.annotations]
    assert titles == ["poison-10, rate 2×, steps 3×"]
    with pytest.raises(gk.GeomkitError, match=r"found \(2, 1\), \(2, 3\); choose"):
        plots.plot_frontier(found.where(rate=2.0))


def test_each_scenario_is_shown_at_its_own_or_its_only_strength():
    rows = (record("SFT", outcomes(50)), record("SFT", outcomes(60), scenario="backdoor", rate=4.0, length=0.1))
    titles = [each.text for each in plots.plot_frontier(Results("x", rows)).layout.annotations]
    assert titles == ["poison-10", "backdoor, rate 4×, steps 0.1×"]


def test_arms_are_chosen_and_too_many_refused(found):
    figure = plots.plot_frontier(found, arms=["mixing"])
    assert {trace.legendgroup for trace in figure.data} == {"mixing"}
    with pytest.raises(gk.GeomkitError, match="'left'"):
        plots.plot_frontier(found, arms=["left"])
    many = Results("x", tuple(record(f"arm {place}", outcomes(1)) for place in range(12)))
    with pytest.raises(gk.GeomkitError, match="at most 9 arms"):
        plots.plot_frontier(many)


@pytest.mark.parametrize(
    "draw",
    [
        plots.plot_frontier,
        plots.plot_refusal_during_training,
        lambda found, **arms: plots.plot_breakdown(found, "poison-10", **arms),
        plots.plot_drift,
        plots.plot_attacks,
    ],
    ids=["frontier", "along", "breakdown", "drift", "attacks"],
)
def test_unknown_arms_and_none_are_refused_by_every_figure(found, draw):
    with pytest.raises(gk.GeomkitError, match=r"expected arms among .*, found 'nobody'"):
        draw(found, arms=["nobody"])
    with pytest.raises(gk.GeomkitError, match="at least one arm"):
        draw(found, arms=[])
    assert len(plotly.io.from_json(draw(found).to_json()).data) == len(draw(found).data)


def test_an_arm_looks_alike_in_every_figure_and_unlike_all_others(found):
    alone, together = (plots.plot_frontier(found, arms=arms) for arms in (["rank1"], None))
    (one,), (same,) = points(alone, "rank1"), points(together, "rank1")
    assert (one.marker.color, one.marker.symbol) == (same.marker.color, same.marker.symbol)
    named = ["untouched", "SFT", "mixing", "mixing + benign", "rank1", "mine", "yours", "theirs", "left"]
    nine = plots.plot_frontier(Results("x", tuple(record(name, outcomes(50)) for name in named)))
    assert len({(trace.marker.color, trace.marker.symbol) for name in named for trace in points(nine, name)}) == 9


def test_where_every_run_broke_off_there_is_nothing_to_draw():
    with pytest.raises(gk.GeomkitError, match="that was completed"):
        plots.plot_frontier(Results("x", (BROKEN,)))


def test_along_training(found):
    figure = plots.plot_refusal_during_training(found)
    (mean,) = points(figure, "SFT")
    assert (list(mean.x), list(mean.y)) == ([10, 20], pytest.approx([0.6, 0.2]))
    thin = [trace for trace in figure.data if trace.legendgroup == "SFT" and trace.name is None]
    assert [list(trace.y) for trace in thin] == [[0.5, 0.1], [0.7, 0.3]]
    (one,) = points(plots.plot_refusal_during_training(found.where(seed=0)), "SFT")
    assert list(one.y) == [0.5, 0.1]
    with pytest.raises(gk.GeomkitError, match="along = 5"):
        plots.plot_refusal_during_training(found.where(arm="mixing"))


def test_the_map_of_where_arms_break(found):
    figure = plots.plot_breakdown(found, "poison-10")
    sft, rank1 = figure.data
    np.testing.assert_allclose(np.array(sft.z, dtype=float), [[0.2, np.nan], [0.7, np.nan]])
    np.testing.assert_allclose(np.array(rank1.z, dtype=float), [[0.9, np.nan], [np.nan, 0.6]])
    assert [list(row) for row in sft.text] == [["20%", ""], ["70%", ""]]
    assert (list(sft.x), list(sft.y)) == (["1×", "3×"], ["1×", "2×"])
    assert list(plots.plot_breakdown(found, "poison-10", arms=["mixing"]).data[0].z[0]) == [0.8]
    with pytest.raises(gk.GeomkitError, match="at several rates or lengths"):
        plots.plot_breakdown(found.where(rate=1.0), "poison-10")


def test_the_map_serves_other_measures_and_dark_is_bad(found):
    over = plots.plot_breakdown(found, "poison-10", measure="over_refusal")
    assert over.data[1].z[0][0] == pytest.approx(0.05)
    assert over.layout.coloraxis.reversescale
    assert not plots.plot_breakdown(found, "poison-10", measure="utility").layout.coloraxis.reversescale
    with pytest.raises(gk.GeomkitError, match="expected a measure among refusal, over_refusal, utility, found 'kl'"):
        plots.plot_breakdown(found, "poison-10", measure="kl")


def test_the_map_says_where_every_run_broke_off():
    broken = {"cell": record("SFT", {}, rate=4.0)["cell"], "error": "NaN"}
    figure = plots.plot_breakdown(results(broken), "poison-10", arms=["SFT"])
    (mark,) = [each for each in figure.layout.annotations if "broke" in each.text]
    assert (mark.x, mark.y) == ("1×", "4×")
    assert np.isnan(np.array(figure.data[0].z, dtype=float)[2]).all()


def test_certificate_against_outcome(found):
    figure = plots.plot_certificate_outcome(found)
    (held,), (raised,) = points(figure, "rank1"), points(figure, "mixing")
    assert (held.xaxis, list(held.y), held.marker.symbol) == ("x", [0.9], "circle")
    assert (raised.xaxis, list(raised.x), list(raised.y)) == ("x2", [0.4], [0.8])
    assert raised.marker.symbol == "diamond-open"
    assert legend(figure) == ["rank1", "mixing", "promised", "nothing promised"]
    with pytest.raises(gk.GeomkitError, match="cells under SPF"):
        plots.plot_certificate_outcome(found.where(arm="SFT"))


def test_of_many_certified_arms_those_with_most_runs_have_colours():
    rows = [record(f"arm {place}", outcomes(50), certificate=CERTIFICATE) for place in range(12)]
    rows.append(record("arm 11", outcomes(50), seed=1, certificate=CERTIFICATE))
    figure = plots.plot_certificate_outcome(Results("x", tuple(rows)))
    names = legend(figure)
    assert len(names) == 11  # eight, the others, and two symbols
    assert {"arm 11", "other arms"} <= set(names)
    (others,) = points(figure, "other arms")
    assert len(others.y) == 4


def test_the_parts_of_the_drift_add_up(found):
    figure = plots.plot_drift(found)
    (both,), (first,), (curved,) = (points(figure, name) for name in ("drift", "first_order", "curvature"))
    np.testing.assert_allclose(np.array(first.y) + np.array(curved.y), both.y)
    assert list(curved.y) == CURVE["curvature"]
    assert legend(figure) == ["measured: the sum of both", "first order", "curvature"]
    with pytest.raises(gk.GeomkitError, match="curvature = true"):
        plots.plot_drift(found.where(arm="SFT"))


def test_runs_that_did_not_measure_curvature_have_no_part_in_the_drift():
    unknown = CURVE | {"curvature": [None] * 3}
    rows = (record("rank1", outcomes(90), curve=CURVE), record("left", outcomes(90), curve=unknown))
    figure = plots.plot_drift(Results("x", rows))
    assert [each.text for each in figure.layout.annotations] == ["rank1"]
    with pytest.raises(gk.GeomkitError, match="curvature = true"):
        plots.plot_drift(Results("x", rows[1:]))


def test_attacks(found):
    figure = plots.plot_attacks(found)
    (sft,), (rank1,) = points(figure, "SFT"), points(figure, "rank1")
    assert (list(sft.x), list(rank1.x)) == ([0.25, 0.5], [0.75])
    assert list(figure.layout.yaxis.ticktext) == ["prefill 1", "role-play"]
    assert [round(place) for place in sft.y] == [0, 1]
    frame = found.attacks().query("arm == 'SFT'")
    np.testing.assert_allclose(sft.x + np.array(sft.error_x.array), frame["high"])
    np.testing.assert_allclose(sft.x - np.array(sft.error_x.arrayminus), frame["low"])
    with pytest.raises(gk.GeomkitError, match="attacks ="):
        plots.plot_attacks(found.where(arm="mixing"))


def test_attacks_of_several_scenarios_have_a_panel_each_and_seeds_are_averaged():
    rows = [
        record("SFT", outcomes(10), scenario=scenario, seed=seed, attacks={"prefill 1": digits})
        for scenario in ("poison-10", "backdoor")
        for seed, digits in enumerate(("0001", "0111"))
    ]
    figure = plots.plot_attacks(Results("x", tuple(rows)))
    both = points(figure, "SFT")
    assert [list(trace.x) for trace in both] == [[0.5], [0.5]]
    assert [each.text for each in figure.layout.annotations] == ["poison-10", "backdoor"]
    one = Results("x", (record("SFT", outcomes(10), attacks={"prefill 1": "0011"}),)).attacks()
    assert both[0].x[0] + both[0].error_x.array[0] == pytest.approx(one["high"][0])  # seeds do not narrow it
