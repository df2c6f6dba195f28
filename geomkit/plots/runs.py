"""Figures of evaluations and of fine-tuning runs: shares of prompts, and the training loss."""

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from geomkit.plots.axes import name_rows, step_ticks
from geomkit.plots.labels import wrapped
from geomkit.plots.style import Look, fitted, looks, title
from geomkit.plots.themes import template
from geomkit.plots.traces import error_bars, line_mode, side_by_side
from geomkit.training.evaluation import Evaluation
from geomkit.training.result import FineTuneResult

_SAFETY_LOSS = "spf/anchor_loss"
"""The column of a history that has the loss on the anchors, which SPF writes."""

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
    figure = go.Figure(layout={"template": template()})
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
    name_rows(figure, [wrapped(measure, 16) for measure in measures])
    figure.update_layout(
        title=title("Refusal, over-refusal and skills", subtitle),
        xaxis={"title": "share of prompts", "range": [-0.02, 1.02], "tickformat": ".0%"},
        showlegend=len(models) > 1,
    )
    return fitted(figure, len(measures) * (26 + 16 * len(models)))


def plot_history(results: FineTuneResult | Mapping[str, FineTuneResult]) -> go.Figure:
    """Draw the training loss over the optimizer steps and, where it was measured, the safety loss below it.

    Args:
        results: One fine-tuning run, or several by name; "SFT" and "SPF" have fixed colours.

    Returns:
        The figure: a line per run. Top: the loss on the training data. Bottom: the loss on the anchors before each
        step, which a run under SPF measures, also with the rule ``"monitor"``, which changes no update.
    """
    runs = results if isinstance(results, Mapping) else {"run": results}
    measured = [name for name, result in runs.items() if _SAFETY_LOSS in result.history]
    rows = 1 + bool(measured)
    figure = make_subplots(rows, 1, shared_xaxes=True, vertical_spacing=0.08)
    for (name, result), look in zip(runs.items(), looks(list(runs)), strict=True):
        figure.add_trace(_losses(result.history, "loss", name, look), row=1, col=1)
        if name in measured:
            figure.add_trace(_losses(result.history, _SAFETY_LOSS, name, look, showlegend=False), row=2, col=1)
    unmeasured = [name for name in runs if name not in measured]
    note = "safety loss: on the anchors of the step" if measured else ""
    note += f"; not measured in {', '.join(unmeasured)}" if measured and unmeasured else ""
    figure.update_layout(
        template=template(),
        title=title("Training loss and safety loss" if measured else "Training loss", note),
        showlegend=len(runs) > 1,
    )
    steps = [step for run in runs.values() for step in run.history["step"]]
    figure.update_xaxes(**step_ticks(steps))
    figure.update_xaxes(title="optimizer step", row=rows)
    figure.update_yaxes(title="training loss,<br>nats per token", rangemode="tozero", row=1)
    if measured:
        figure.update_yaxes(title="safety loss,<br>nats per token", rangemode="tozero", exponentformat="power", row=2)
    return fitted(figure, 180 + 170 * bool(measured))


def _losses(history: pd.DataFrame, column: str, name: str, look: Look, **options: bool) -> go.Scatter:
    """Return the line of one loss of a run, without the rows in which it is unknown."""
    rows = history.dropna(subset=[column])
    what = "loss" if column == "loss" else "loss on the anchors"
    return go.Scatter(
        x=rows["step"],
        y=rows[column],
        name=name,
        legendgroup=name,
        mode=line_mode(len(rows)),
        line={"color": look.colour, "dash": look.dash, "width": 2},
        hovertemplate=f"{name}, step %{{x}}<br>{what} <b>%{{y:.4g}}</b><extra></extra>",
        **options,
    )
