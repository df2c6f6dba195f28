"""The figure of a trajectory: unknown values, long names, ticks and hover text."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from geomkit import plots
from geomkit.errors import GeometryError
from tests.helpers.figures import one_line, subtitle

COLUMNS = ["question", "measure", "of", "value", "low", "high", "null", "null_low", "null_high"]
NAN = np.nan
ROWS = [
    ("conflict?", "cosine of the mean gradients", "safety", 0.2, NAN, NAN, NAN, -0.1, 0.1),
    ("conflict?", "cosine with utility", "safety", 0.3, 0.1, 0.5, 0.0, NAN, NAN),
    ("conflict?", "cosine with utility", "control", NAN, -1.0, 1.0, 0.0, NAN, NAN),
    ("conflict?", "cosine, difference", "safety − control", NAN, -2.0, 2.0, 0.0, NAN, NAN),
    ("one sample?", "overlap, difference", "safety − control", 0.1, 0.0, 0.2, 0.0, NAN, NAN),
    ("has it moved?", "cosine with the start", "safety", 1.0, NAN, NAN, 0.0, NAN, NAN),
]


def trajectory(*moments: int | str, rows: list[tuple[object, ...]] = ROWS, confidence: float = 0.9) -> SimpleNamespace:
    frame = pd.concat([pd.DataFrame(rows, columns=COLUMNS).assign(at=at) for at in moments], ignore_index=True)
    moment = SimpleNamespace(analysis=SimpleNamespace(conflict=SimpleNamespace(confidence=confidence)))
    return SimpleNamespace(moments=dict.fromkeys(moments, moment), to_frame=lambda: frame)


@pytest.fixture(scope="module")
def named() -> go.Figure:
    return plots.plot_trajectory(trajectory("base", "after 100 steps of harm"))


def test_panels_of_no_value_are_left_out_and_differences_are_short(named: go.Figure) -> None:
    titles = [one_line(note.text) for note in named.layout.annotations]
    assert titles == ["cosine of the mean gradients", "cosine with utility", "Δ overlap", "cosine with the start"]
    nothing = trajectory(0, 1, rows=ROWS[3:4])
    with pytest.raises(GeometryError, match="found none at any moment"):
        plots.plot_trajectory(nothing)


def test_no_value_has_no_band_and_a_null_has_its_interval(named: go.Figure) -> None:
    bands = {drawn.name: list(drawn.y) for drawn in named.data if drawn.fill}
    assert list(bands) == ["safety: null interval", "safety: interval", "safety − control: interval"]
    assert bands["safety: null interval"] == [0.1, 0.1, -0.1, -0.1]
    assert subtitle(named) == (
        "bands: 90 % intervals over examples; dotted: the null; grey: its interval; Δ: difference"
    )


def test_hover_says_what_is_known(named: go.Figure) -> None:
    texts = {drawn.text[0] for drawn in named.data if drawn.mode == "lines+markers"}
    assert {"<br>null [-0.1, 0.1]", " [0.1, 0.5]<br>null 0", "<br>null 0"} < texts
    assert not any("nan" in text for text in texts)


def test_moments_are_named_below_the_lowest_panels_only(named: go.Figure) -> None:
    axes = [named.layout[name] for name in ("xaxis", "xaxis2", "xaxis3", "xaxis4")]
    assert [axis.showticklabels for axis in axes] == [False, False, True, True]
    assert [axis.title.text for axis in axes] == [None, None, "checkpoint", "checkpoint"]
    assert axes[3].ticktext == ("base", "after 100<br>steps of harm")
    steps = plots.plot_trajectory(trajectory(0, 1)).layout.xaxis4
    assert (list(steps.tickvals), steps.title.text) == ([0, 1], "optimizer step")
