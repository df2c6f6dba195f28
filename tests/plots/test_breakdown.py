"""The figure of where arms break: its cells, its colours, and runs that broke off."""

import numpy as np
import pytest

import geomkit as gk
from geomkit import plots
from tests.experiments.test_results import record
from tests.helpers.figures import experiment


def test_the_map_of_where_arms_break(results):
    figure = plots.plot_breakdown(results, "poison-10")
    sft, rank1 = figure.data
    np.testing.assert_allclose(np.array(sft.z, dtype=float), [[0.2, np.nan], [0.7, np.nan]])
    np.testing.assert_allclose(np.array(rank1.z, dtype=float), [[0.9, np.nan], [np.nan, 0.6]])
    assert [list(row) for row in sft.text] == [["20%", ""], ["70%", ""]]
    assert (list(sft.x), list(sft.y)) == (["1×", "3×"], ["1×", "2×"])
    assert list(plots.plot_breakdown(results, "poison-10", arms=["mixing"]).data[0].z[0]) == [0.8]
    with pytest.raises(gk.GeomkitError, match="at several rates or lengths"):
        plots.plot_breakdown(results.where(rate=1.0), "poison-10")


def test_the_map_serves_other_measures_and_dark_is_bad(results):
    over = plots.plot_breakdown(results, "poison-10", measure="over_refusal")
    assert over.data[1].z[0][0] == pytest.approx(0.05)
    assert over.layout.coloraxis.reversescale
    assert not plots.plot_breakdown(results, "poison-10", measure="utility").layout.coloraxis.reversescale
    with pytest.raises(gk.GeomkitError, match="expected a measure among refusal, over_refusal, utility, found 'kl'"):
        plots.plot_breakdown(results, "poison-10", measure="kl")


def test_the_map_says_where_every_run_broke_off():
    broken = {"cell": record("SFT", {}, rate=4.0)["cell"], "error": "NaN"}
    figure = plots.plot_breakdown(experiment(broken), "poison-10", arms=["SFT"])
    (mark,) = [note for note in figure.layout.annotations if "broke" in note.text]
    assert (mark.x, mark.y) == ("1×", "4×")
    assert np.isnan(np.array(figure.data[0].z, dtype=float)[2]).all()
