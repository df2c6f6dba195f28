"""Figures of what models do and of runs: evaluations and the training loss."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from geomkit.plots.style import TEMPLATE, looks, title, whole_ticks

if TYPE_CHECKING:
    from geomkit.training.evaluate import Evaluation
    from geomkit.training.finetune import FineTuneResult

_DODGE = 0.56
"""How much of the distance between two measures the arms of one take up."""

_FEW_STEPS = 40
"""Up to this many steps every one gets a marker."""


def plot_evaluation(evaluations: "Evaluation | Mapping[str, Evaluation]") -> go.Figure:
    """Draw refusal, over-refusal and skills with their 95 % Wilson intervals, models side by side.

    Args:
        evaluations: One evaluation, or several by name; "SFT" and "SPF" have fixed colours.

    Returns:
        The figure: a row per measure, a marker with its interval per model.
    """
    arms = evaluations if isinstance(evaluations, Mapping) else {"model": evaluations}
    frames = {name: evaluation.to_frame() for name, evaluation in arms.items()}
    measures = list(dict.fromkeys(measure for frame in frames.values() for measure in frame["measure"]))
    shifts = np.linspace(-_DODGE / 2, _DODGE / 2, len(arms)) if len(arms) > 1 else np.zeros(1)
    figure = go.Figure(layout={"template": TEMPLATE})
    for (name, frame), look, shift in zip(frames.items(), looks(list(arms)), shifts, strict=True):
        figure.add_trace(
            go.Scatter(
                x=frame["value"],
                y=[measures.index(measure) + shift for measure in frame["measure"]],
                name=name,
                mode="markers",
                marker={"color": look.colour, "symbol": look.symbol, "size": 10},
                error_x={
                    "array": frame["high"] - frame["value"],
                    "arrayminus": frame["value"] - frame["low"],
                    "thickness": 2,
                    "width": 4,
                },
                customdata=frame[["measure", "low", "high", "n"]].to_numpy(),
                hovertemplate=(
                    f"{name}, %{{customdata[0]}}<br><b>%{{x:.1%}}</b> [%{{customdata[1]:.1%}}, "
                    "%{customdata[2]:.1%}], n = %{customdata[3]}<extra></extra>"
                ),
            )
        )
    for boundary in range(1, len(measures)):
        figure.add_hline(y=boundary - 0.5, line={"color": "#E6E6E6", "width": 1})
    figure.update_layout(
        title=title("Refusal, over-refusal and skills", "share of prompts, with 95 % Wilson intervals"),
        xaxis={"title": "share of prompts", "range": [-0.02, 1.02], "tickformat": ".0%"},
        yaxis={
            "tickvals": list(range(len(measures))),
            "ticktext": measures,
            "range": [len(measures) - 0.5, -0.5],
            "showgrid": False,
        },
        height=180 + len(measures) * (26 + 16 * len(arms)),
        showlegend=len(arms) > 1,
    )
    return figure


def step_ticks(steps: Iterable[int]) -> dict[str, object]:
    """Return an axis of whole steps: a short run has its own ticks, a long one those that follow the zoom."""
    known = set(steps)
    return {"tickvals": whole_ticks(known, 10)} if len(known) <= _FEW_STEPS else {"tickformat": "d"}


def line_mode(points: int) -> str:
    """Return the mode of a line of so many points: few have markers."""
    return "lines+markers" if points <= _FEW_STEPS else "lines"


def plot_history(results: "FineTuneResult | Mapping[str, FineTuneResult]") -> go.Figure:
    """Draw the training loss by optimizer step.

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
    figure.update_layout(
        title=title("Training loss"),
        xaxis={
            "title": "optimizer step",
            **step_ticks([step for run in runs.values() for step in run.history["step"]]),
        },
        yaxis={"title": "loss, nats per token", "rangemode": "tozero"},
        showlegend=len(runs) > 1,
    )
    return figure
