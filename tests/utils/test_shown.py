"""What a notebook shows of a result: no empty column, no label twice in a row, and the numbers of its conclusion."""

import re
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from geomkit.utils.display import html_rows, verdict_colour
from geomkit.utils.readable import is_numeric, readable
from tests.helpers.every_result import every_result


@pytest.fixture(scope="module")
def results():
    return every_result()


def test_no_column_is_empty_and_no_label_is_repeated(results):
    for name, result in results.items():
        shown = readable(result.shown_frame())
        assert len(shown.columns), name
        for column in shown.columns:
            assert not shown[column].isin(["", "–"]).all(), (name, column)
        first = shown.iloc[:, 0].tolist()
        if not is_numeric(first):
            assert all(a != b or not a for a, b in pairwise(first)), name


def test_pooled_rows_are_the_numbers_of_the_sentence(results):
    spectrum, contrast, conflict = (results[name] for name in ("Spectrum", "SpectrumContrast", "Conflict"))
    rank = spectrum.shown_frame().set_index("mean over parameters of").loc["effective_rank"]
    assert rank.tolist() == [
        spectrum.mean("effective_rank"), *spectrum.interval("effective_rank"), spectrum.null_mean("effective_rank"),
    ]  # fmt: skip
    difference = contrast.shown_frame().set_index("mean over parameters of").loc["effective_rank"]
    assert difference["safety"] - difference["control"] == pytest.approx(difference["difference"])
    assert (difference["difference"], (difference["low"], difference["high"])) == contrast.mean("effective_rank")
    rows = conflict.shown_frame().set_index("over all parameters")
    assert rows.loc["cosine of the mean gradients", "value"] == conflict.cosine
    alike = rows.loc["cosine of the expected gradients, equal weights"]
    assert alike["difference"] == conflict.equal_weights.contrast.value
    assert alike["control_low"] == conflict.equal_weights.contrast.control_interval[0]
    angles = results["Angles"]
    assert angles.shown_frame()["value"][0] == pytest.approx(angles.mean_overlap)
    sample = results["OneSample"].shown_frame()
    assert sample["contrast"].isna().tolist() == [True, True, False, False]


def test_the_shown_steps_hold_the_first_the_last_and_the_worst(results):
    tuned = results["FineTuneResult"]
    long = pd.DataFrame({"loss": np.arange(100.0), "step": np.arange(1, 101)})
    object.__setattr__(tuned, "history", long)
    steps = tuned.shown_frame()["step"].tolist()
    assert (steps[0], steps[-1], len(steps)) == (1, 100, 10)
    certificate = results["Certificate"]
    worst = certificate.to_frame()["first_order"].idxmax()
    assert certificate.shown_frame().index[0] == worst


def test_a_trajectory_has_a_column_per_moment(results):
    trajectory = results["Trajectory"]
    shown = trajectory.shown_frame()
    assert list(shown.columns) == ["question", "measure", "of", "start", "end"]
    assert len(shown) * 2 == len(trajectory.to_frame())


def test_verdicts_have_colours_and_numbers_stand_at_the_right():
    frame = pd.DataFrame({"verdict": ["holds", "reversed, perhaps"], "value": [1.0, 2.0], "low": [0.0, 1.0],
                          "high": [2.0, 3.0]})  # fmt: skip
    html = html_rows(frame)
    assert re.search(r'text-align: left[^"]*color: #[0-9a-f]{6}[^"]*">holds<', html)
    assert re.search(r'text-align: right[^"]*">1.0 \[0.0, 2.0\]<', html)
    assert len({verdict_colour(verdict) for verdict in ("holds", "reversed", "not shown", "a claim")}) == 4
