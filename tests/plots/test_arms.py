"""Which arms, cells and strengths the figures of experiments draw, and how arms look."""

import plotly.io
import pytest

import geomkit as gk
from geomkit import plots
from geomkit.experiments.results import Results
from tests.experiments.test_results import outcomes, record
from tests.helpers.figures import drawn_traces, one_line


def test_of_several_organisms_the_first_is_drawn(results):
    more = {"along": [[10, 0.9], [20, 0.9]], "attacks": {"prefill 1": "1111"}}
    both = Results("x", (*results.records, record("SFT", outcomes(99), organism=1, **more),
                         record("SFT", outcomes(99), organism=1, rate=4.0)))  # fmt: skip
    for draw in (plots.plot_frontier, plots.plot_attacks, plots.plot_refusal_during_training):
        assert draw(both) == draw(results)
    assert plots.plot_breakdown(both, "poison-10") == plots.plot_breakdown(results, "poison-10")


def test_a_panel_says_which_strength_it_shows_where_that_is_not_the_scenarios_own(results):
    titles = [
        one_line(note.text) for note in plots.plot_frontier(results.where(rate=2.0, length=3.0)).layout.annotations
    ]
    assert titles == ["poison-10, rate 2×, steps 3×"]
    with pytest.raises(gk.GeomkitError, match=r"found \(2, 1\), \(2, 3\); choose"):
        plots.plot_frontier(results.where(rate=2.0))


def test_each_scenario_is_shown_at_its_own_or_its_only_strength():
    rows = (record("SFT", outcomes(50)), record("SFT", outcomes(60), scenario="backdoor", rate=4.0, length=0.1))
    titles = [one_line(note.text) for note in plots.plot_frontier(Results("x", rows)).layout.annotations]
    assert titles == ["poison-10", "backdoor, rate 4×, steps 0.1×"]


def test_arms_are_chosen_and_too_many_refused(results):
    figure = plots.plot_frontier(results, arms=["mixing"])
    assert {trace.legendgroup for trace in figure.data} == {"mixing"}
    with pytest.raises(gk.GeomkitError, match="'left'"):
        plots.plot_frontier(results, arms=["left"])
    many = Results("x", tuple(record(f"arm {place}", outcomes(1)) for place in range(12)))
    with pytest.raises(gk.GeomkitError, match="at most 9 arms"):
        plots.plot_frontier(many)


@pytest.mark.parametrize(
    "draw",
    [
        plots.plot_frontier,
        plots.plot_refusals,
        plots.plot_refusal_during_training,
        lambda results, **arms: plots.plot_breakdown(results, "poison-10", **arms),
        plots.plot_drift,
        plots.plot_attacks,
    ],
    ids=["frontier", "refusals", "along", "breakdown", "drift", "attacks"],
)
def test_unknown_arms_and_none_are_refused_by_every_figure(results, draw):
    with pytest.raises(gk.GeomkitError, match=r"expected arms among .*, found 'nobody'"):
        draw(results, arms=["nobody"])
    with pytest.raises(gk.GeomkitError, match="at least one arm"):
        draw(results, arms=[])
    assert len(plotly.io.from_json(draw(results).to_json()).data) == len(draw(results).data)


def test_an_arm_looks_alike_in_every_figure_and_unlike_all_others(results):
    single, all_arms = (plots.plot_frontier(results, arms=arms) for arms in (["rank1"], None))
    (rank1,), (rank1_of_all,) = drawn_traces(single, "rank1"), drawn_traces(all_arms, "rank1")
    assert (rank1.marker.color, rank1.marker.symbol) == (rank1_of_all.marker.color, rank1_of_all.marker.symbol)
    named = ["untouched", "SFT", "mixing", "mixing + benign", "rank1", "mine", "yours", "theirs", "left"]
    nine = plots.plot_frontier(Results("x", tuple(record(name, outcomes(50)) for name in named)))
    assert len({(trace.marker.color, trace.marker.symbol) for name in named for trace in drawn_traces(nine, name)}) == 9
