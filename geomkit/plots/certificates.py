"""Figures of certificates: the changes of the safety loss by the updates of a run, or of several runs."""

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from geomkit.errors import SPFError
from geomkit.plots.axes import ending_at, step_ticks
from geomkit.plots.style import fitted, looks, title, translucent
from geomkit.plots.themes import COLOURS, palette, template
from geomkit.plots.traces import line_mode
from geomkit.spf.certificate import Certificate

_Steps = NDArray[np.int64]
_Values = NDArray[np.float64]

NATS = "nats per token"
"""The unit of the safety loss."""

_BINS = 500
"""A long run is cut into this many stretches, of which the extremes are drawn."""


def _zero() -> dict[str, object]:
    """Return the line at zero."""
    return {"color": palette().ink, "width": 1}


def plot_certificate(certificate: Certificate, name: str = "") -> go.Figure:
    """Draw the first-order change of the safety loss by each update, as proposed and as applied, and its drift.

    Args:
        certificate: The record of an SPF guard.
        name: Name of the run, for the title.

    Returns:
        The figure, panels over the optimizer steps. Of a run of many steps the extremes of short stretches are drawn.

        Top: ⟨Δθ, g_s⟩ of the optimizer's own update and of the applied update, positive where it raises the safety
        loss, with the bound if it is not zero, and a mark at violations.

        Middle: the change of the safety loss on the anchors since the first step, and the sum of the first-order parts.
        Their distance is curvature; if each step draws other anchors, it is also the difference between anchors. In
        this case the sum of each step's change on its own anchors is drawn too, if it was measured.

        Bottom: the share of blocks whose update was projected; left out where the title says that SPF was idle.

    Raises:
        SPFError: If no step was recorded.
    """
    check_recorded(certificate)
    all_steps = certificate.to_frame()
    frame = _thinned(all_steps)
    heights = [200, 180] if certificate.is_idle else [200, 180, 90]
    figure = make_subplots(len(heights), 1, shared_xaxes=True, row_heights=heights, vertical_spacing=0.06)
    figure.add_traces(list(_changes(frame, certificate)), rows=1, cols=1)
    figure.add_traces(list(_drift(all_steps)), rows=2, cols=1)
    for row in (1, 2):
        figure.add_hline(y=0, line=_zero(), row=row, col=1)
    if not certificate.is_idle:
        figure.add_trace(_projected(frame, len(frame) == len(all_steps)), row=3, col=1)
        figure.update_yaxes(title="blocks<br>projected", tickformat=".0%", range=[0, 1.05], row=3, col=1)
    figure.update_layout(
        template=template(),
        title=title(f"{name}{': w' if name else 'W'}hat each update does to the safety loss", _verdict(certificate)),
        yaxis={"title": "change by a step,<br>nats per token", "exponentformat": "power"},
        yaxis2={"title": "change since the start,<br>nats per token", "exponentformat": "power"},
        bargap=0.1,
    )
    figure.update_xaxes(**step_ticks([all_steps["step"].iloc[0] - 1, *all_steps["step"]]))
    figure.update_xaxes(title="optimizer step", row=len(heights), col=1)
    return fitted(figure, 80 + sum(heights))


def _verdict(certificate: Certificate) -> str:
    """Return what the certificate says, in words."""
    steps, raised = certificate.steps, "raised the safety loss to first order"
    largest = f"largest change {certificate.max_first_order_change:.2g}"
    if certificate.is_idle:
        did = "only measures" if certificate.rule == "monitor" else "found no conflict"
        updates = f"{certificate.raising} of {steps} updates {raised}"
        return f"SPF was idle, nothing was projected: rule {certificate.rule} {did}; {updates}; {largest}"
    if certificate.guaranteed:
        return f"rule {certificate.rule}: {certificate.violations} of {steps} steps break the constraint; {largest}"
    updates = f"{certificate.raising} of {steps} steps {raised}"
    return f"rule {certificate.rule}, which promises nothing: {updates}; {largest}"


def plot_certificates(certificates: Mapping[str, Certificate]) -> go.Figure:
    """Draw the change of the safety loss over several runs, for instance under different rules.

    Args:
        certificates: The records of SPF guards, by the name of the run.

    Returns:
        The figure, a line per run. Top: the sum of ⟨Δθ, g_s⟩ over the updates so far, which can only fall under a rule
        by which no update raises the safety loss. Bottom: the change of the loss on the anchors since the first step,
        which includes curvature and, if each step draws other anchors, the difference between anchors. The legend
        counts the updates that raise the loss to first order beyond rounding, whatever the rule promises.

    Raises:
        SPFError: If there is no run, or no step of a run was recorded.
    """
    if not certificates:
        raise SPFError("expected at least one certificate, found none; give e.g. {'SPF': result.certificate}")
    for certificate in certificates.values():
        check_recorded(certificate)
    frames = {name: certificate.to_frame() for name, certificate in certificates.items()}
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.07)
    for (name, frame), look in zip(frames.items(), looks(list(frames)), strict=True):
        for row, (steps, values) in enumerate((_summed(frame, "first_order"), _losses(frame)), start=1):
            trace = _line(
                steps, values, f"{name}: {certificates[name].raising} of {len(frame)} raise it", look.colour, look.dash
            )
            trace.update(legendgroup=name, showlegend=row == 1)
            figure.add_trace(trace, row=row, col=1)
            figure.add_hline(y=0, line=_zero(), row=row, col=1)
    figure.update_layout(
        template=template(),
        title=title(
            "Safety loss since the start, by run",
            f"{NATS}, on the anchors; the legend counts the updates that raise it to first order",
        ),
        yaxis={"title": "first-order part", "exponentformat": "power"},
        # Both panels have one scale: their difference is curvature and the difference between anchors.
        yaxis2={"title": "all of it", "exponentformat": "power"},
        xaxis2_title="optimizer step",
    )
    figure.update_xaxes(**step_ticks({0, *(step for frame in frames.values() for step in frame["step"])}))
    values = np.concatenate([trace.y for trace in figure.data])
    figure.update_yaxes(**ending_at(min(0.0, float(np.nanmin(values))), max(0.0, float(np.nanmax(values)))))
    return fitted(figure, 420)


def check_recorded(certificate: Certificate) -> None:
    """Check that a certificate has the record of a step.

    Raises:
        SPFError: If no step was recorded.
    """
    if not certificate.records:
        raise SPFError("expected the records of at least one step, found none; train first")


def _thinned(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the extremes and a violation of each stretch of a long run, or all steps of a short run."""
    if len(frame) <= 2 * _BINS:
        return frame
    stretches = frame.groupby(np.arange(len(frame)) * _BINS // len(frame))
    rows = {0, len(frame) - 1, *stretches["violated"].idxmax()}
    for column in ("first_order_raw", "first_order"):
        rows |= {*stretches[column].idxmax(), *stretches[column].idxmin()}
    return frame.loc[sorted(rows)]


# -------------------------------------------------------------------------------------- top: the changes by each update


def _changes(frame: pd.DataFrame, certificate: Certificate) -> Iterator[go.Scatter]:
    # Under a rule on the gradient both lines are the same: the wide line is visible behind the other.
    width = 6 if line_mode(len(frame)) != "lines" else 3
    proposed = {"color": translucent(COLOURS["SFT"], 0.5), "width": width}
    yield _change(frame, "first_order_raw", "optimizer's own update", proposed)
    yield _change(frame, "first_order", "applied update", {"color": COLOURS["SPF"], "width": 2})
    bound = frame[np.isfinite(frame["bound"])]
    if bound["bound"].any():
        yield _bound(bound)
    if certificate.violations:
        broken = "breaks the constraint" if certificate.guaranteed else "raises the safety loss"
        yield _violations(frame[frame["violated"]], broken)


def _change(frame: pd.DataFrame, column: str, name: str, line: dict[str, object]) -> go.Scatter:
    return go.Scatter(
        x=frame["step"],
        y=frame[column],
        name=name,
        mode=line_mode(len(frame)),
        line=line,
        customdata=frame[["anchor_loss", "removed", "worst", "tolerance"]].to_numpy(),
        hovertemplate=(
            f"{name}, step %{{x}}<br><b>%{{y:.3e}}</b> nats per token<br>safety loss on the anchors "
            "%{customdata[0]:.4g}<br>norm removed %{customdata[1]:.3g}<br>worst as applied "
            "%{customdata[2]:.2e}, tolerance %{customdata[3]:.2e}<extra></extra>"
        ),
    )


def _bound(frame: pd.DataFrame) -> go.Scatter:
    return go.Scatter(
        x=frame["step"],
        y=frame["bound"],
        name="bound with drift correction",
        mode="lines",
        line={"color": palette().ink, "dash": "dot", "width": 1.5},
        hovertemplate="bound, step %{x}<br><b>%{y:.3e}</b> nats per token<extra></extra>",
    )


def _violations(frame: pd.DataFrame, name: str) -> go.Scatter:
    return go.Scatter(
        x=frame["step"],
        y=frame["first_order"],
        name=name,
        mode="markers",
        marker={"symbol": "x", "size": 8 if len(frame) <= 2 * _BINS else 4, "color": palette().ink},
        customdata=frame[["worst", "tolerance"]].to_numpy(),
        hovertemplate=("step %{x}<br>worst <b>%{customdata[0]:.2e}</b>, tolerance %{customdata[1]:.2e}<extra></extra>"),
    )


# --------------------------------------------------------------------------------------------- middle: the drift


def _drift(frame: pd.DataFrame) -> Iterator[go.Scatter]:
    """Yield the change of the safety loss so far: as measured, as the sum over the steps, and to first order."""
    fresh = frame["fresh"].to_numpy()[1:]
    after, before = frame["loss_after"].to_numpy()[:-1][fresh], frame["anchor_loss"].to_numpy()[1:][fresh]
    same = bool((after == before).all())  # the loss after a step equals the loss before the next: same anchors
    loss = "safety loss on the anchors" if same else "safety loss on each step's own anchors"
    yield _line(*_losses(frame), loss, COLOURS["safety"], "solid" if same else "dot")
    if not same and frame["curvature"].notna().all():
        changes = frame.assign(change=frame["first_order"] + frame["curvature"])
        yield _line(*_summed(changes, "change"), "sum of its changes by each step", COLOURS["utility"], "solid")
    yield _line(*_summed(frame, "first_order"), "sum of first-order parts", COLOURS["SPF"], "dash")


def _losses(frame: pd.DataFrame) -> tuple[_Steps, _Values]:
    """Return the steps after which the safety loss was measured, and its changes since the first measurement."""
    fresh = frame[frame["fresh"]]
    steps, losses = fresh["step"].to_numpy() - 1, fresh["anchor_loss"].to_numpy()
    last = frame.iloc[-1]
    if np.isfinite(last["loss_after"]):
        steps, losses = np.append(steps, last["step"]), np.append(losses, last["loss_after"])
    if not len(losses):
        return steps, losses
    return steps, losses - losses[0]


def _summed(frame: pd.DataFrame, column: str) -> tuple[_Steps, _Values]:
    """Return the numbers of steps, the first before the run, and the sums of a column from the start to each step."""
    first = frame["step"].iloc[0] - 1
    return np.arange(first, first + len(frame) + 1), np.concatenate([[0.0], np.cumsum(frame[column])])


def _line(steps: _Steps, values: _Values, name: str, colour: str, dash: str) -> go.Scatter:
    if len(steps) > 2 * _BINS:
        places = np.unique(np.linspace(0, len(steps) - 1, 2 * _BINS).astype(int))
        steps, values = steps[places], values[places]
    return go.Scatter(
        x=steps,
        y=values,
        name=name,
        mode=line_mode(len(steps)),
        line={"color": colour, "dash": dash, "width": 2},
        hovertemplate=f"{name}, after %{{x}} steps<br><b>%{{y:+.3e}}</b> nats per token<extra></extra>",
    )


# ------------------------------------------------------------------------------------------ bottom: projected blocks


def _projected(frame: pd.DataFrame, is_whole_run: bool) -> go.Bar | go.Scatter:
    """Return a bar per step if the frame is the whole run, else a line through the steps that were chosen."""
    look = {"x": frame["step"], "y": frame["fired"], "name": "blocks projected"}
    hover = "step %{x}<br><b>%{y:.1%}</b> of the blocks projected<extra></extra>"
    if is_whole_run:
        return go.Bar(**look, marker={"color": COLOURS["null"], "line_width": 0}, hovertemplate=hover)
    return go.Scatter(**look, mode="lines", line={"color": COLOURS["null"], "width": 1}, hovertemplate=hover)
