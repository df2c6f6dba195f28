"""Figures of what models do and of runs: evaluations, the certificate, the training loss."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from geomkit.errors import SPFError
from geomkit.plots._style import COLOURS, TEMPLATE, looks, title, whole_ticks

if TYPE_CHECKING:
    import pandas as pd

    from geomkit.evaluation import Evaluation
    from geomkit.finetuning import FineTuneResult
    from geomkit.spf.certificate import Certificate

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


def plot_certificate(certificate: "Certificate", name: str = "") -> go.Figure:
    """Draw, step by step, what each update does to the safety loss to first order, as proposed and as applied.

    Args:
        certificate: What an SPF guard recorded.
        name: What to call the run in the title.

    Returns:
        The figure. Above: ⟨Δθ, g_s⟩ of the optimizer's own update and of the applied one, positive where it raises
        the safety loss, with the bound where it is not zero and a mark at violations. Below: the share of parameters
        whose update was projected.

    Raises:
        SPFError: If no step was recorded.
    """
    if not certificate.records:
        raise SPFError("expected the records of at least one step, found none; train first")
    frame = certificate.to_frame()
    figure = make_subplots(2, 1, shared_xaxes=True, row_heights=[0.68, 0.32], vertical_spacing=0.09)
    proposed, applied = {"color": COLOURS["SFT"], "dash": "dot"}, {"color": COLOURS["SPF"], "dash": "solid"}
    figure.add_trace(_change(frame, "first_order_raw", "optimizer's own update", proposed), row=1, col=1)
    figure.add_trace(_change(frame, "first_order", "applied update", applied), row=1, col=1)
    if frame["bound"].any():
        figure.add_trace(_bound(frame), row=1, col=1)
    if certificate.violations:
        figure.add_trace(_violations(frame[frame["violated"]]), row=1, col=1)
    figure.add_trace(_fired(frame), row=2, col=1)
    figure.add_hline(y=0, line={"color": "#222222", "width": 1}, row=1, col=1)
    promise = "" if certificate.guaranteed else " (not promised by this rule)"
    figure.update_layout(
        template=TEMPLATE,
        title=title(
            f"{name}{': f' if name else 'F'}irst-order change of the safety loss by each update",
            f"rule {certificate.rule}: {certificate.violations} of {certificate.steps} steps break the "
            f"constraint{promise}; largest change {certificate.max_first_order_change:.2g}",
        ),
        yaxis={"title": "⟨Δθ, g<sub>s</sub>⟩, nats per token", "exponentformat": "power"},
        yaxis2={"title": "projected", "tickformat": ".0%", "range": [0, 1.05]},
        xaxis2={"title": "optimizer step", **_steps(frame["step"])},
        height=520,
        bargap=0.1,
    )
    return figure


def _change(frame: "pd.DataFrame", column: str, name: str, line: dict[str, str]) -> go.Scatter:
    return go.Scatter(
        x=frame["step"],
        y=frame[column],
        name=name,
        mode=_mode(len(frame)),
        line={**line, "width": 2},
        customdata=frame[["anchor_loss", "removed", "worst", "tolerance"]].to_numpy(),
        hovertemplate=(
            f"{name}, step %{{x}}<br><b>%{{y:.3e}}</b> nats per token<br>safety loss on the anchors "
            "%{customdata[0]:.4g}<br>norm removed %{customdata[1]:.3g}<br>worst parameter as applied "
            "%{customdata[2]:.2e}, tolerance %{customdata[3]:.2e}<extra></extra>"
        ),
    )


def _bound(frame: "pd.DataFrame") -> go.Scatter:
    return go.Scatter(
        x=frame["step"],
        y=frame["bound"],
        name="bound with drift correction",
        mode="lines",
        line={"color": COLOURS["null"], "dash": "dash", "width": 1.5},
        hovertemplate="bound, step %{x}<br><b>%{y:.3e}</b> nats per token<extra></extra>",
    )


def _violations(frame: "pd.DataFrame") -> go.Scatter:
    return go.Scatter(
        x=frame["step"],
        y=frame["first_order"],
        name="violation",
        mode="markers",
        marker={"symbol": "x", "size": 8, "color": "#222222"},
        customdata=frame[["worst", "tolerance"]].to_numpy(),
        hovertemplate=(
            "violation, step %{x}<br>worst parameter <b>%{customdata[0]:.2e}</b>, tolerance "
            "%{customdata[1]:.2e}<extra></extra>"
        ),
    )


def _fired(frame: "pd.DataFrame") -> go.Bar:
    return go.Bar(
        x=frame["step"],
        y=frame["fired"],
        name="parameters projected",
        marker={"color": COLOURS["null"], "line_width": 0},
        hovertemplate="step %{x}<br><b>%{y:.1%}</b> of the parameters projected<extra></extra>",
    )


def _steps(steps: Iterable[int]) -> dict[str, object]:
    """Write whole steps: a short run has its own ticks, a long one those that follow the zoom."""
    known = set(steps)
    return {"tickvals": whole_ticks(known, 10)} if len(known) <= _FEW_STEPS else {"tickformat": "d"}


def _mode(points: int) -> str:
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
                mode=_mode(len(rows)),
                line={"color": look.colour, "dash": look.dash, "width": 2},
                hovertemplate=f"{name}, step %{{x}}<br>loss <b>%{{y:.4g}}</b><extra></extra>",
            )
        )
    figure.update_layout(
        title=title("Training loss"),
        xaxis={"title": "optimizer step", **_steps([step for run in runs.values() for step in run.history["step"]])},
        yaxis={"title": "loss, nats per token", "rangemode": "tozero"},
        showlegend=len(runs) > 1,
    )
    return figure
