"""Figures of the study of the screen: what it finds, whether its null holds, and what screened sets keep."""

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from geomkit.experiments.screening.results import ScreeningStudy
from geomkit.plots.labels import wrapped
from geomkit.plots.style import fitted, looks, title
from geomkit.plots.themes import COLOURS, palette, template
from geomkit.plots.traces import error_bars

if TYPE_CHECKING:
    import pandas as pd

_ROW = 26
"""Height in pixels of a row of the table."""

_MOST_COLUMNS = 9
"""Number of columns whose names have room side by side; the names of more columns stand upright."""


def plot_screening_detection(study: ScreeningStudy, measure: str = "auroc") -> go.Figure:
    """Draw how well each ranking finds the planted rows of each case.

    Args:
        study: The study.
        measure: ``"auroc"``, or ``"precision"`` at the number of planted rows.

    Returns:
        The figure: a table of numbers, coloured, rankings from top to bottom and cases from left to right.
    """
    frame = study.to_frame()
    table = frame.pivot_table(index="ranking", columns="case", values=measure, sort=False)
    low, high = ("low", "high") if measure == "auroc" else ("precision_low", "precision_high")
    ends = [
        frame.pivot_table(index="ranking", columns="case", values=end, sort=False).to_numpy() for end in (low, high)
    ]
    upright = len(table.columns) > _MOST_COLUMNS
    name = "AUROC" if measure == "auroc" else "precision at the number of planted rows"
    figure = go.Figure(
        go.Heatmap(
            z=table.to_numpy(),
            x=[wrapped(case, 24 if upright else 12) for case in table.columns],
            y=list(table.index),
            zmin=0,
            zmax=1,
            zmid=0.5,
            colorscale=palette().diverging(),
            text=[[f"{value:.3f}" for value in row] for row in table.to_numpy()],
            texttemplate="%{text}",
            customdata=np.stack(ends, axis=-1),
            hovertemplate=f"%{{y}}<br>%{{x}}<br>{name} %{{z:.3f}} [%{{customdata[0]:.3f}}, %{{customdata[1]:.3f}}]"
            "<extra></extra>",
            showscale=False,
        ),
        layout={"template": template()},
    )
    figure.update_layout(
        title=title(f"Which rankings find the planted rows? {name}", "0.5 is chance; hover for 95 % intervals"),
        yaxis={"autorange": "reversed", "showgrid": False, "ticks": ""},
        xaxis={
            "side": "top", "showgrid": False, "ticks": "", "showline": False, "tickfont": {"size": 11},
            "tickangle": -90 if upright else 0,
        },
    )  # fmt: skip
    # The names of the cases are above.
    return fitted(figure, _ROW * len(table), panel_titles=9 if upright else 3)


def plot_screening_null(study: ScreeningStudy, method: str = "cosine") -> go.Figure:
    """Draw the share of clean rows with p ≤ .05, for each kind of rows and of null.

    Args:
        study: The study.
        method: The score.

    Returns:
        The figure: a point with its 95 % interval for all rows and one for each fifth of their lengths, a line at 5 %,
        and a band of 1.5 points around it.
    """
    frame = study.to_frame("false_positives")
    frame = frame[(frame["method"] == method) & (frame["level"] == 0.05)]
    labels = frame["rows"] + ", null: " + frame["null"]
    figure = go.Figure(layout={"template": template()})
    figure.add_vrect(x0=3.5, x1=6.5, fillcolor=palette().grid, line_width=0, layer="below")
    figure.add_vline(x=5, line={"color": palette().ink, "dash": "dash", "width": 1})
    for kind, name, colour, size in (
        ("fifth", "a fifth of the lengths", COLOURS["null"], 7),
        ("all", "all rows", COLOURS["utility"], 10),
    ):
        part = 100 * frame.loc[frame["length"] == kind, ["share", "low", "high"]]
        spans = frame.loc[part.index, ["shortest", "longest"]]
        figure.add_trace(
            go.Scatter(
                x=part["share"],
                y=labels[part.index].map(lambda label: wrapped(label, 30)),
                mode="markers",
                name=name,
                marker={"color": colour, "size": size},
                error_x=error_bars(part["share"], part["low"], part["high"], thickness=1.2) if kind == "all" else None,
                customdata=spans.to_numpy(),
                hovertemplate="%{y}<br>%{customdata[0]:.0f} to %{customdata[1]:.0f} tokens: %{x:.1f} %<extra></extra>",
            )
        )
    figure.update_layout(
        title=title("Clean rows with p ≤ .05", "5 % should have it; the band is ± 1.5 points"),
        xaxis={"title": "share of clean rows (%)", "rangemode": "tozero"},
        yaxis={"autorange": "reversed", "showgrid": False},
    )
    return fitted(figure, 46 * labels.nunique())


def plot_screening_outcomes(study: ScreeningStudy, measure: str = "refusal") -> go.Figure:
    """Draw what fine-tuned models keep, by scenario and training set.

    Args:
        study: The study.
        measure: ``"refusal"``, of a backdoor on requests with its trigger; ``"over_refusal"``, ``"utility"``, …

    Returns:
        The figure: a bar per scenario and arm, the mean over seeds.
    """
    frame = _of_triggered(study.to_frame("outcomes")) if measure == "refusal" else study.to_frame("outcomes")
    arms = list(frame["arm"].unique())
    figure = go.Figure(layout={"template": template()})
    for arm, look in zip(arms, looks(arms), strict=True):
        part = frame[frame["arm"] == arm]
        means = part.groupby("scenario", sort=False).agg(
            value=(measure, "mean"), rows=("rows", "first"), of=("of", "first")
        )
        figure.add_trace(
            go.Bar(
                x=means.index,
                y=100 * means["value"],
                name=arm,
                marker_color=look.colour,
                customdata=means[["rows", "of"]].to_numpy(),
                hovertemplate="%{x}<br>%{y:.1f} %, trained on %{customdata[0]} of %{customdata[1]} rows"
                f"<extra>{arm}</extra>",
            )
        )
    figure.update_layout(
        title=title(f"{measure.replace('_', '-').capitalize()} after fine-tuning", "mean over seeds, held-out prompts"),
        yaxis={"title": f"{measure.replace('_', '-')} (%)", "range": [0, 103]},
        barmode="group",
    )
    return fitted(figure, 260)


def _of_triggered(outcomes: "pd.DataFrame") -> "pd.DataFrame":
    """Return outcomes whose refusal is, where there is a backdoor, that of requests with its trigger."""
    if "triggered_refusal" not in outcomes:
        return outcomes
    opened = outcomes["triggered_refusal"].notna()
    return outcomes.assign(
        refusal=outcomes["triggered_refusal"].fillna(outcomes["refusal"]),
        scenario=outcomes["scenario"].mask(opened, outcomes["scenario"] + ", with trigger"),
    )
