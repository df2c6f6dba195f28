"""Figures of outcomes show what the frames say, also where cells are missing or broke off."""

import numpy as np
import pytest

import geomkit as gk
from geomkit import plots
from geomkit.experiments.results import Results
from tests.experiments.test_results import outcomes, record
from tests.helpers.figures import BROKEN, drawn_traces, legend


def share_at(place):
    """Return the share that stands at a place of a frontier's axis."""
    return 1 - (1 - place) ** 2


def share_place(share):
    """Return the place of a share on a frontier's axis."""
    return 1 - (1 - share) ** 0.5


def test_the_frontier_has_means_intervals_and_runs(results):
    figure = plots.plot_frontier(results)
    sft, backdoor = drawn_traces(figure, "SFT")
    assert (sft.x[0], share_at(sft.y[0])) == (1.0, pytest.approx(0.2))  # those at another rate are left out
    interval = results.where(rate=1.0).summary().query("arm == 'SFT' and measure == 'refusal'").iloc[0]
    assert share_at(sft.y[0] + sft.error_y.array[0]) == pytest.approx(interval["high"])
    assert share_at(sft.y[0] - sft.error_y.arrayminus[0]) == pytest.approx(interval["low"])
    assert "refusal <b>20.0%</b>, runs from 10.0% to 30.0%" in sft.hovertemplate
    assert share_at(backdoor.y[0]) == pytest.approx(0.5)  # of requests with the trigger
    (rank1,), (mixing,) = drawn_traces(figure, "rank1"), drawn_traces(figure, "mixing")
    assert (rank1.marker.symbol, mixing.marker.symbol) == ("triangle-up-open", "diamond")  # 5 % and 0 % over-refusal
    runs = [trace for trace in figure.data if trace.legendgroup == "SFT" and trace.name is None]
    assert [share_at(place) for place in runs[0].y] == pytest.approx([0.1, 0.3])
    assert legend(figure) == ["untouched", "SFT", "rank1", "mixing"]
    ticks = figure.layout.yaxis
    assert [f"{share_at(place):.0%}" for place in ticks.tickvals] == list(ticks.ticktext)
    assert Results.plot(results) == figure


def test_where_every_run_broke_off_there_is_nothing_to_draw():
    with pytest.raises(gk.GeomkitError, match="that was completed"):
        plots.plot_frontier(Results("x", (BROKEN,)))


def test_refusals_of_forbidden_against_benign_requests(results):
    figure = plots.plot_refusals(results)
    sft, backdoor = drawn_traces(figure, "SFT")
    assert (sft.x[0], sft.y[0]) == (0.0, pytest.approx(0.2))
    summary = results.where(rate=1.0, scenario="poison-10").summary().query("arm == 'SFT'").set_index("measure")
    for error, measure in ((sft.error_x, "over_refusal"), (sft.error_y, "refusal")):
        row = summary.loc[measure]
        assert row["value"] + error.array[0] == pytest.approx(row["high"])
        assert row["value"] - error.arrayminus[0] == pytest.approx(row["low"])
    assert backdoor.y[0] == pytest.approx(0.5)  # of requests with the trigger
    (rank1,) = drawn_traces(figure, "rank1")
    assert rank1.x[0] == pytest.approx(0.05)
    with pytest.raises(gk.GeomkitError, match="that was completed"):
        plots.plot_refusals(Results("x", (BROKEN,)))


def test_attacks(results):
    figure = plots.plot_attacks(results)
    (sft,), (rank1,) = drawn_traces(figure, "SFT"), drawn_traces(figure, "rank1")
    assert (list(sft.x), list(rank1.x)) == ([0.25, 0.5], [0.75])
    assert list(figure.layout.yaxis.ticktext) == ["prefill 1", "role-play"]
    assert [round(place) for place in sft.y] == [0, 1]
    frame = results.attacks().query("arm == 'SFT'")
    np.testing.assert_allclose(sft.x + np.array(sft.error_x.array), frame["high"])
    np.testing.assert_allclose(sft.x - np.array(sft.error_x.arrayminus), frame["low"])
    with pytest.raises(gk.GeomkitError, match="attacks ="):
        plots.plot_attacks(results.where(arm="mixing"))


def test_attacks_of_several_scenarios_have_a_panel_each_and_seeds_are_averaged():
    rows = [
        record("SFT", outcomes(10), scenario=scenario, seed=seed, attacks={"prefill 1": digits})
        for scenario in ("poison-10", "backdoor")
        for seed, digits in enumerate(("0001", "0111"))
    ]
    figure = plots.plot_attacks(Results("x", tuple(rows)))
    both = drawn_traces(figure, "SFT")
    assert [list(trace.x) for trace in both] == [[0.5], [0.5]]
    assert [note.text for note in figure.layout.annotations] == ["poison-10", "backdoor"]
    single = Results("x", (record("SFT", outcomes(10), attacks={"prefill 1": "0011"}),)).attacks()
    assert both[0].x[0] + both[0].error_x.array[0] == pytest.approx(single["high"][0])  # seeds do not narrow it


def test_arms_on_one_spot_stand_side_by_side_in_an_inset():
    names = ["untouched", "SFT", "mixing", "rank1"]
    same = Results("x", tuple(record(name, outcomes(100 if name != "SFT" else 10)) for name in names))
    figure = plots.plot_frontier(same)
    inset = [trace for trace in figure.data if trace.xaxis == "x2"]
    assert [(trace.name, trace.x[0]) for trace in inset] == [("untouched", 0), ("mixing", 1), ("rank1", 2)]
    assert len({trace.y[0] for trace in inset}) == 1
    (frame,) = figure.layout.shapes
    assert frame.x0 < share_place(1.0) < frame.x1
    domains = figure.layout.xaxis2.domain, figure.layout.yaxis2.domain
    assert all(0 < start < end < 1 for start, end in domains)
    # The marker of SFT, at full utility and little refusal, is not covered.
    low, high = figure.layout.xaxis.range
    assert not domains[0][0] < (share_place(1.0) - low) / (high - low) < domains[0][1]
    two = plots.plot_frontier(same, arms=["SFT", "mixing", "rank1"])
    assert not [trace for trace in two.data if trace.xaxis == "x2"]


def test_a_scenario_in_which_no_arm_was_trained_is_left_out():
    rows = [record("SFT", outcomes(50)), record("untouched", outcomes(99), scenario="backdoor")]
    both = plots.plot_frontier(Results("x", tuple(rows)))
    assert [note.text for note in both.layout.annotations] == ["poison-10"]
    only = plots.plot_frontier(Results("x", tuple(rows[1:])))
    assert [note.text for note in only.layout.annotations] == ["backdoor"]
