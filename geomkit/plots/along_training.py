"""Figures of experiments along training: refusal, the drift of the safety loss, and what certificates say of both."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from geomkit.errors import DataError
from geomkit.plots.arms import (
    FEW_ARMS,
    LEGEND_ONLY,
    SPARE,
    add_legend,
    among,
    arm_looks,
    arms_of,
    at_strength,
    columns_for,
    comparable,
    few,
    lay_out,
    panel_at,
    panels_for,
    scenario_labels,
)
from geomkit.plots.style import COLOURS, TEMPLATE, Look, legend_room, title, translucent

if TYPE_CHECKING:
    import pandas as pd

    from geomkit.experiments.results import Results

_OTHERS = "other arms"
_RUN = ["organism", "scenario", "rate", "length", "seed"]

_FEW_STEPS = 12
"""Up to this many points of a small panel's line have markers."""


_PARTS = (
    ("drift", "measured: the sum of both", "safety", "solid"),
    ("first_order", "first order", "SPF", "dash"),
    ("curvature", "curvature", "utility", "dot"),
)


def plot_refusal_during_training(results: "Results", *, arms: Sequence[str] | None = None) -> go.Figure:
    """Draw refusal on held-out requests while the model is trained, a panel per scenario.

    Args:
        results: Results of cells that looked along the way; of several organisms the first is drawn, of several rates
            and lengths a scenario's own.
        arms: The arms drawn; all that looked when left out.

    Returns:
        The figure: a line per arm, the mean over its runs, and a thin one per run where there are several.

    Raises:
        DataError: If no cell looked, there is no such arm, there are too many to draw, or a scenario has several rates
            and lengths, none of them its own.
    """
    looked = tuple(record for record in results.records if record.get("along"))
    if not looked:
        raise DataError(
            "expected cells that measured refusal along training, found none; give the grid's block along = 5"
        )
    chosen = comparable(replace(results, records=looked))
    frame = chosen.along()
    names = few(among(arms_of(chosen), arms))
    scenarios = list(dict.fromkeys(frame["scenario"]))
    figure = panels_for(scenario_labels(chosen, scenarios))
    for place, scenario in enumerate(scenarios):
        at = panel_at(place, columns_for(len(scenarios)))
        for name, look in arm_looks(names).items():
            own = frame[(frame["scenario"] == scenario) & (frame["arm"] == name)]
            hover = f"{name}, step %{{x}}<br>refusal <b>%{{y:.1%}}</b>"
            for trace in _curves(own, "refusal", look, name, hover):
                figure.add_trace(trace, **at)
    add_legend(figure, names, "lines+markers")
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(range=[-0.06, 1.06], tickformat=".0%", dtick=0.5)
    words = title("Refusal along training", "share of 60 held-out requests; mean over seeds, thin: each seed")
    lay_out(figure, len(scenarios), names, words, "optimizer step", "refusal")
    return figure


def plot_drift(results: "Results", *, arms: Sequence[str] | None = None) -> go.Figure:
    """Draw what the steps changed their anchors' loss by, summed up: the first-order part, curvature, and both.

    Args:
        results: Results of cells that measured curvature.
        arms: The arms drawn, a panel each; all that measured it when left out.

    Returns:
        The figure: in each panel the mean over the runs of a scenario, and a thin line per run where there are several.

    Raises:
        DataError: If no cell did, or there is no such arm.
    """
    frame = results.curves()
    frame = frame.dropna(subset=["curvature"]) if "curvature" in frame else frame[:0]
    if not len(frame):
        raise DataError("expected cells that measured curvature, found none; give the grid's block curvature = true")
    frame = frame.assign(drift=frame["first_order"] + frame["curvature"])
    names = among(list(dict.fromkeys(frame["arm"])), arms)
    figure = panels_for(names)
    for place, name in enumerate(names):
        own = frame[frame["arm"] == name]
        for _, runs in own.groupby(["scenario", "rate", "length"], sort=False):
            where = at_strength(*runs[["scenario", "rate", "length"]].iloc[0])
            for column, words, colour, dash in _PARTS:
                hover = f"{where}, step %{{x}}<br>{words}<br><b>%{{y:.3g}}</b> nats"
                for trace in _curves(runs, column, Look(COLOURS[colour], dash, "circle"), column, hover):
                    figure.add_trace(trace, **panel_at(place, columns_for(len(names))))
    for column, words, colour, dash in _PARTS:
        line = {"color": COLOURS[colour], "dash": dash, "width": 2}
        figure.add_trace(go.Scatter(**LEGEND_ONLY, name=words, legendgroup=column, mode="lines", line=line))
    figure.update_yaxes(zeroline=True, zerolinecolor="#8A8A8A", exponentformat="power", nticks=6)
    figure.update_xaxes(rangemode="tozero")
    subtitle = "sums over the steps, each on its own anchors; every panel has its own scale"
    legend = [words for _, words, *_ in _PARTS]
    lay_out(
        figure, len(names), legend, title("What the drift is made of", subtitle), "optimizer step", "nats per token"
    )
    return figure


def plot_certificate_outcome(results: "Results") -> go.Figure:
    """Draw the share of steps that raised the safety loss on their anchors against refusal, a dot per run.

    Were a held constraint all that counts, runs without such a step would lie at the top and all others below. Those
    runs stand by themselves, an arm beside the other, as they would else hide each other.

    Args:
        results: Results with cells under SPF. Of more than nine arms, the eight with most runs have colours.

    Returns:
        The figure: at the left the runs in which no step raised it, at the right all others.

    Raises:
        DataError: If there are none.
    """
    frame = results.to_frame()
    if not {"raising", "refusal"} <= set(frame) or frame["raising"].isna().all():
        raise DataError("expected cells under SPF, which have a certificate, found none")
    frame = frame.dropna(subset=["raising", "refusal"])
    counts = frame["arm"].value_counts()
    common = set(counts.index[: FEW_ARMS - 1] if len(counts) > FEW_ARMS else counts.index)
    frame = frame.assign(shown=frame["arm"].where(frame["arm"].isin(common), _OTHERS))
    names = sorted(dict.fromkeys(frame["shown"]), key=_OTHERS.__eq__)
    every = arm_looks([name for name in names if name != _OTHERS]) | {_OTHERS: SPARE}
    figure = make_subplots(
        1, 2, column_widths=[0.34, 0.66], shared_yaxes=True, horizontal_spacing=0.04,
        subplot_titles=["no step raised it", "some steps raised it"],
    )  # fmt: skip
    for place, name in enumerate(names):
        for promised in (True, False):
            own = frame[(frame["shown"] == name) & (frame["guaranteed"].astype(bool) == promised)]
            for column, part in enumerate((own[own["raising"] == 0], own[own["raising"] > 0])):
                if len(part):
                    x = part["raising"] if column else np.full(len(part), place)
                    figure.add_trace(_runs(name, every[name], promised, x, part), row=1, col=column + 1)
    add_legend(figure, names, looks_of={name: every[name]._replace(symbol="square") for name in names})
    for words, promised in (("promised", True), ("nothing promised", False)):
        marker = _promise_marker("#444444", promised)
        figure.add_trace(go.Scatter(**LEGEND_ONLY, name=words, mode="markers", marker=marker))
    legend = [*names, "promised", "nothing promised"]
    figure.update_xaxes(title="arms", range=[-0.7, len(names) - 0.3], showticklabels=False, ticks="", col=1)
    figure.update_xaxes(title="share of steps, to first order", tickformat=".0%", range=[-0.02, 1.04], col=2)
    figure.update_xaxes(showgrid=False, col=1)
    figure.update_annotations(font_size=13)
    figure.update_yaxes(range=[-0.06, 1.06], tickformat=".0%")
    figure.update_yaxes(title="held-out requests refused", col=1)
    subtitle = "a dot per run, by the share of its steps that raised the anchors' loss"
    figure.update_layout(
        template=TEMPLATE,
        title=title("Certificate against outcome", subtitle),
        height=480 + (room := legend_room(legend)),
        margin={"t": 104, "b": 90 + room},
    )
    return figure


def _curves(frame: "pd.DataFrame", column: str, look: Look, group: str, hover: str) -> list[go.Scatter]:
    """Return a thin line per run where there are several, and their mean, which alone speaks when pointed at."""
    runs = [run for _, run in frame.groupby(_RUN, sort=False)]
    thin = {"color": translucent(look.colour, 0.35), "width": 1}
    lines = [
        go.Scatter(
            x=run["step"], y=run[column], mode="lines", line=thin, legendgroup=group, showlegend=False, hoverinfo="skip"
        )
        for run in runs
        if len(runs) > 1
    ]
    if runs:
        mean = frame.groupby("step")[column].mean()
        lines.append(
            go.Scatter(
                x=mean.index, y=mean, name=group, mode="lines+markers" if len(mean) <= _FEW_STEPS else "lines",
                legendgroup=group, showlegend=False, marker={"symbol": look.symbol, "size": 7},
                line={"color": look.colour, "dash": look.dash, "width": 2}, hovertemplate=f"{hover}<extra></extra>",
            )
        )  # fmt: skip
    return lines


def _runs(name: str, look: Look, promised: bool, x: "pd.Series[float] | np.ndarray", own: "pd.DataFrame") -> go.Scatter:
    return go.Scatter(
        x=x,
        y=own["refusal"],
        name=name,
        legendgroup=name,
        showlegend=False,
        mode="markers",
        marker=_promise_marker(translucent(look.colour, 0.6), promised),
        customdata=own[["arm", "scenario", "rate", "length", "seed", "raising"]].to_numpy(),
        hovertemplate=(
            "%{customdata[0]}, %{customdata[1]}<br>rate %{customdata[2]}×, steps %{customdata[3]}×, seed "
            "%{customdata[4]}<br>%{customdata[5]:.1%} of the steps raised L_s<br>refusal <b>%{y:.1%}</b><extra></extra>"
        ),
    )


def _promise_marker(colour: str, promised: bool) -> dict[str, object]:
    shape = {"symbol": "circle"} if promised else {"symbol": "diamond-open", "line": {"width": 1.5}}
    return {"color": colour, "size": 8, **shape}
