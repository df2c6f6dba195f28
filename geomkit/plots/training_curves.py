"""Figures of experiments over the training steps: refusal, the drift of the safety loss, and certificates."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from plotly.subplots import make_subplots

from geomkit.errors import DataError
from geomkit.experiments.results import Results
from geomkit.plots.arms import (
    FEW_ARMS,
    add_legend,
    arm_looks,
    arms_of,
    at_most_nine,
    at_strength,
    chosen_arms,
    comparable,
    scenario_labels,
    spare_look,
)
from geomkit.plots.axes import ending_at, signed_log
from geomkit.plots.panels import wide_panels
from geomkit.plots.style import Look, fitted, title, translucent
from geomkit.plots.themes import COLOURS, palette, template
from geomkit.plots.traces import LEGEND_ONLY, line_mode

_OTHER_ARMS = "other arms"
_NATS = "nats per token"

_RUN = ["organism", "scenario", "rate", "length", "seed"]
"""Columns that identify a run of one arm."""

_LABELLED = (0, 2, 5, 8, 10)
"""Of the ticks of the drift's scale, which has four powers of ten: zero, the largest, and every hundredth of it."""

_FEW_STEPS = 12
"""Up to this many points of a line in a panel have markers."""

_PARTS = (
    ("drift", "measured: the sum of both", "safety", "solid"),
    ("first_order", "first order", "SPF", "dash"),
    ("curvature", "curvature", "utility", "dot"),
)
"""The parts of the drift: column, legend entry, colour and dash."""


def plot_refusal_during_training(results: Results, *, arms: Sequence[str] | None = None) -> go.Figure:
    """Draw refusal on held-out requests while the model is trained, one panel per scenario.

    Args:
        results: Results of cells that measured refusal during training. Of several organisms the first is drawn; of
            several rates and lengths, each scenario's own.
        arms: The arms to draw; if left out, all arms that measured refusal during training.

    Returns:
        The figure: a line per arm, the mean over its runs, and a thin line per run if there are several.

    Raises:
        DataError: If no cell measured refusal during training, an arm is unknown, there are too many arms to draw, or
            a scenario has several rates and lengths, none of them its own.
    """
    measured = tuple(record for record in results.records if record.get("along"))
    if not measured:
        raise DataError(
            "expected cells that measured refusal along training, found none; give the grid's block along = 5"
        )
    results = comparable(replace(results, records=measured))
    frame = results.refusal_during_training()
    names = at_most_nine(chosen_arms(arms_of(results), arms))
    scenarios = list(dict.fromkeys(frame["scenario"]))
    drawn = wide_panels(scenario_labels(results, scenarios))
    for number, scenario in enumerate(scenarios):
        for name, look in arm_looks(names).items():
            rows = frame[(frame["scenario"] == scenario) & (frame["arm"] == name)]
            hover = f"{name}, step %{{x}}<br>refusal <b>%{{y:.1%}}</b>"
            drawn.add(number, *_curves(rows, "refusal", look, name, hover))
    add_legend(drawn.figure, names, "lines+markers")
    drawn.figure.update_xaxes(rangemode="tozero")
    drawn.figure.update_yaxes(range=[-0.06, 1.06], tickformat=".0%", dtick=0.5)
    words = title("Refusal along training", "share of 60 held-out requests; mean over seeds, thin: each seed")
    return drawn.finished(words, "optimizer step", "refusal")


def plot_drift(results: Results, *, arms: Sequence[str] | None = None) -> go.Figure:
    """Draw the drift of the safety loss over training: the sums of the steps' first-order parts and curvatures.

    Args:
        results: Results of cells that measured curvature.
        arms: The arms to draw, one panel each; if left out, all arms that measured curvature.

    Returns:
        The figure: in each panel the mean over the runs of a scenario, and a thin line per run if there are several.
        All panels have the same scale, which is logarithmic on both sides of zero.

    Raises:
        DataError: If no cell measured curvature, or an arm is unknown.
    """
    frame = results.curves()
    frame = frame.dropna(subset=["curvature"]) if "curvature" in frame else frame[:0]
    if not len(frame):
        raise DataError("expected cells that measured curvature, found none; give the grid's block curvature = true")
    frame = frame.assign(drift=frame["first_order"] + frame["curvature"])
    names = chosen_arms(list(dict.fromkeys(frame["arm"])), arms)
    scale = signed_log(frame.loc[frame["arm"].isin(names), [column for column, *_ in _PARTS]], decades=4)
    drawn = wide_panels(names)
    figure = drawn.figure
    for number, name in enumerate(names):
        for _, runs in frame[frame["arm"] == name].groupby(["scenario", "rate", "length"], sort=False):
            where = at_strength(*runs[["scenario", "rate", "length"]].iloc[0])
            for column, words, colour, dash in _PARTS:
                hover = f"{where}, step %{{x}}<br>{words}<br><b>%{{customdata:.3g}}</b> nats"
                look = Look(COLOURS[colour], dash, "circle")
                drawn.add(number, *_curves(runs, column, look, column, hover, scale.places))
    for column, words, colour, dash in _PARTS:
        line = {"color": COLOURS[colour], "dash": dash, "width": 2}
        figure.add_trace(go.Scatter(**LEGEND_ONLY, name=words, legendgroup=column, mode="lines", line=line))
    ticks = {"tickvals": [scale.ticks[at] for at in _LABELLED], "ticktext": [scale.labels[at] for at in _LABELLED]}
    figure.update_yaxes(zeroline=True, zerolinecolor=palette().frame, **ticks)
    figure.update_yaxes(range=ending_at(scale.ticks[0], scale.ticks[-1])["range"])
    figure.update_xaxes(rangemode="tozero")
    subtitle = "sums over the steps, each on its own anchors; one scale for all arms, logarithmic on both sides of zero"
    return drawn.finished(title("What the safety loss's drift is made of", subtitle), "optimizer step", _NATS)


def plot_certificate_outcome(results: Results) -> go.Figure:
    """Draw refusal after training against the share of steps that raised the safety loss on their anchors.

    If the constraint alone decided the outcome, runs without such a step would lie at the top and all other runs below.
    Runs without such a step would all lie at zero, so they are drawn in a separate panel, arm by arm.

    Args:
        results: Results with cells under SPF. Of more than nine arms, the eight with most runs have colours.

    Returns:
        The figure, a marker per run: at the left the runs in which no step raised the loss, at the right all others.

    Raises:
        DataError: If there is no cell under SPF.
    """
    frame = results.to_frame()
    if not {"raising", "refusal"} <= set(frame) or frame["raising"].isna().all():
        raise DataError("expected cells under SPF, which have a certificate, found none; run arms with a rule of SPF")
    frame = _with_groups(frame.dropna(subset=["raising", "refusal"]))
    names = sorted(dict.fromkeys(frame["group"]), key=_OTHER_ARMS.__eq__)
    looks_of = arm_looks([name for name in names if name != _OTHER_ARMS]) | {_OTHER_ARMS: spare_look()}
    figure = make_subplots(
        1, 2, column_widths=[0.34, 0.66], shared_yaxes=True, horizontal_spacing=0.04,
        subplot_titles=["no step<br>raised it", "some steps<br>raised it"],
    )  # fmt: skip
    for number, name in enumerate(names):
        for guaranteed in (True, False):
            runs = frame[(frame["group"] == name) & (frame["guaranteed"].astype(bool) == guaranteed)]
            never, sometimes = runs[runs["raising"] == 0], runs[runs["raising"] > 0]
            for col, part, x in ((1, never, np.full(len(never), number)), (2, sometimes, sometimes["raising"])):
                if len(part):
                    figure.add_trace(_markers(part, x, name, looks_of[name], guaranteed), row=1, col=col)
    add_legend(figure, names, looks_of={name: looks_of[name]._replace(symbol="square") for name in names})
    for words, guaranteed in (("promised", True), ("nothing promised", False)):
        marker = _marker(palette().others[0], guaranteed)
        figure.add_trace(go.Scatter(**LEGEND_ONLY, name=words, mode="markers", marker=marker))
    figure.update_xaxes(title="arms", range=[-0.7, len(names) - 0.3], showticklabels=False, ticks="", col=1)
    figure.update_xaxes(title="share of steps, to first order", tickformat=".0%", range=[-0.02, 1.04], col=2)
    figure.update_xaxes(showgrid=False, col=1)
    figure.update_annotations(font_size=13)
    figure.update_yaxes(range=[-0.06, 1.06], tickformat=".0%")
    figure.update_yaxes(title="held-out requests refused", col=1)
    subtitle = "a dot per run, by the share of its steps that raised the anchors' loss"
    figure.update_layout(
        template=template(),
        title=title("Certificate against outcome", subtitle),
    )
    return fitted(figure, 290, panel_titles=2)


def _curves(
    frame: pd.DataFrame,
    column: str,
    look: Look,
    group: str,
    hover: str,
    places: Callable[["pd.Series[float]"], ArrayLike] = np.asarray,
) -> list[go.Scatter]:
    """Return the mean of the runs as a line with hover, and before it a thin line per run if there are several.

    ``places`` returns the places of values along the vertical axis.
    """
    runs = [run for _, run in frame.groupby(_RUN, sort=False)]
    thin = {"color": translucent(look.colour, 0.35), "width": 1}
    lines = [
        go.Scatter(
            x=run["step"],
            y=places(run[column]),
            mode="lines",
            line=thin,
            legendgroup=group,
            showlegend=False,
            hoverinfo="skip",
        )
        for run in runs
        if len(runs) > 1
    ]
    if runs:
        mean = frame.groupby("step")[column].mean()
        lines.append(
            go.Scatter(
                x=mean.index, y=places(mean), customdata=mean, name=group, mode=line_mode(len(mean), _FEW_STEPS),
                legendgroup=group, showlegend=False, marker={"symbol": look.symbol, "size": 7},
                line={"color": look.colour, "dash": look.dash, "width": 2}, hovertemplate=f"{hover}<extra></extra>",
            )
        )  # fmt: skip
    return lines


def _with_groups(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the frame with a column ``group``: the arm, or "other arms" for arms without a colour."""
    counts = frame["arm"].value_counts()
    common = set(counts.index[: FEW_ARMS - 1] if len(counts) > FEW_ARMS else counts.index)
    return frame.assign(group=frame["arm"].where(frame["arm"].isin(common), _OTHER_ARMS))


def _markers(
    runs: pd.DataFrame, x: "pd.Series[float] | np.ndarray", name: str, look: Look, guaranteed: bool
) -> go.Scatter:
    return go.Scatter(
        x=x,
        y=runs["refusal"],
        name=name,
        legendgroup=name,
        showlegend=False,
        mode="markers",
        marker=_marker(translucent(look.colour, 0.6), guaranteed),
        customdata=runs[["arm", "scenario", "rate", "length", "seed", "raising"]].to_numpy(),
        hovertemplate=(
            "%{customdata[0]}, %{customdata[1]}<br>rate %{customdata[2]}×, steps %{customdata[3]}×, seed "
            "%{customdata[4]}<br>%{customdata[5]:.1%} of the steps raised L_s<br>refusal <b>%{y:.1%}</b><extra></extra>"
        ),
    )


def _marker(colour: str, guaranteed: bool) -> dict[str, object]:
    """Return a circle for a run whose rule guarantees its constraint, else an open diamond."""
    shape = {"symbol": "circle"} if guaranteed else {"symbol": "diamond-open", "line": {"width": 1.5}}
    return {"color": colour, "size": 8, **shape}
