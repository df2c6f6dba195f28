"""Figures of evaluations and of fine-tuning runs: shares of prompts, and the training loss."""

from collections.abc import Mapping

import plotly.graph_objects as go

from geomkit.plots.axes import name_rows, step_ticks
from geomkit.plots.style import TEMPLATE, looks, title
from geomkit.plots.traces import error_bars, line_mode, side_by_side
from geomkit.training.evaluation import Evaluation
from geomkit.training.result import FineTuneResult

_SPREAD = 0.56
"""Share of the distance between two rows over which the markers of a row are spread."""


def plot_evaluation(evaluations: Evaluation | Mapping[str, Evaluation]) -> go.Figure:
    """Draw refusal, over-refusal and skills with their 95 % Wilson intervals, models side by side.

    Args:
        evaluations: One evaluation, or several by name; "SFT" and "SPF" have fixed colours.

    Returns:
        The figure: a row per measure, with a marker and its interval per model.
    """
    models = evaluations if isinstance(evaluations, Mapping) else {"model": evaluations}
    frames = {name: evaluation.to_frame() for name, evaluation in models.items()}
    # Perplexities and scores from 1 to 5 have no place on an axis of shares.
    apart = {measure for frame in frames.values() for measure in frame.loc[frame["value"] > 1, "measure"]}
    frames = {name: frame[~frame["measure"].isin(apart)] for name, frame in frames.items()}
    subtitle = "share of prompts, with 95 % Wilson intervals"
    subtitle += f"; not drawn: {', '.join(sorted(apart))}" if apart else ""
    measures = list(dict.fromkeys(measure for frame in frames.values() for measure in frame["measure"]))
    shifts = side_by_side(len(models), _SPREAD)
    figure = go.Figure(layout={"template": TEMPLATE})
    for (name, frame), look, shift in zip(frames.items(), looks(list(models)), shifts, strict=True):
        figure.add_trace(
            go.Scatter(
                x=frame["value"],
                y=[measures.index(measure) + shift for measure in frame["measure"]],
                name=name,
                mode="markers",
                marker={"color": look.colour, "symbol": look.symbol, "size": 10},
                error_x=error_bars(frame["value"], frame["low"], frame["high"], thickness=2, width=4),
                customdata=frame[["measure", "low", "high", "n"]].to_numpy(),
                hovertemplate=(
                    f"{name}, %{{customdata[0]}}<br><b>%{{x:.1%}}</b> [%{{customdata[1]:.1%}}, "
                    "%{customdata[2]:.1%}], n = %{customdata[3]}<extra></extra>"
                ),
            )
        )
    name_rows(figure, measures)
    figure.update_layout(
        title=title("Refusal, over-refusal and skills", subtitle),
        xaxis={"title": "share of prompts", "range": [-0.02, 1.02], "tickformat": ".0%"},
        height=180 + len(measures) * (26 + 16 * len(models)),
        showlegend=len(models) > 1,
    )
    return figure


def plot_history(results: FineTuneResult | Mapping[str, FineTuneResult]) -> go.Figure:
    """Draw the training loss over the optimizer steps.

    Args:
        results: One fine-tuning run, or several by name; "SFT" and "SPF" have fixed colours.

    Returns:
        The figure: a line per run.
    """
    runs = results if isinstance(results, Mapping) else {"run": results}
    figure = go.Figure(layout={"template": TEMPLATE})
    for (name, result), look in zip(runs.items(), looks(list(runs)), strict=True):
        rows = result.history.dropna(subset=["loss"])
        figure.add_trace(
            go.Scatter(
                x=rows["step"],
                y=rows["loss"],
                name=name,
                mode=line_mode(len(rows)),
                line={"color": look.colour, "dash": look.dash, "width": 2},
                hovertemplate=f"{name}, step %{{x}}<br>loss <b>%{{y:.4g}}</b><extra></extra>",
            )
        )
    steps = [step for run in runs.values() for step in run.history["step"]]
    figure.update_layout(
        title=title("Training loss"),
        xaxis={"title": "optimizer step", **step_ticks(steps)},
        yaxis={"title": "loss, nats per token", "rangemode": "tozero"},
        showlegend=len(runs) > 1,
    )
    return figure
