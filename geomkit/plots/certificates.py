"""Figures of certificates: what updates did to the safety loss, step by step, block by block, and rule by rule."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from geomkit.errors import SPFError
from geomkit.plots.runs import line_mode, step_ticks
from geomkit.plots.style import COLOURS, TEMPLATE, legend_room, looks, title, translucent, whole_ticks

if TYPE_CHECKING:
    import pandas as pd

    from geomkit.spf.certificate import Certificate

_BINS = 500
"""A longer run is drawn by the extremes of so many stretches of it."""

_COLUMNS = 200
"""Columns of a map of blocks, at most."""

_FEW = 60
"""Up to so many rows or columns of a map stand apart, and have names of their own."""

_SHOWN = 0.98
"""Share of the cells of a map of blocks that lie within its scale of colours."""

_LABEL = 38
"""Letters of a block's name beside a map."""

_ZERO = {"color": "#222222", "width": 1}
_NATS = "nats per token"


def plot_certificate(certificate: "Certificate", name: str = "") -> go.Figure:
    """Draw, step by step, what each update does to the safety loss, as proposed and as applied.

    Args:
        certificate: What an SPF guard recorded.
        name: What to call the run in the title.

    Returns:
        The figure. Above: ⟨Δθ, g_s⟩ of the optimizer's own update and of the applied one, positive where it raises
        the safety loss, with the bound where it is not zero and a mark at violations. In the middle: by how much the
        safety loss on the anchors has changed, beside the sum of the first-order parts; what lies between them is
        curvature, and the draw where each step has other anchors, in which case the sum of each step's change on its
        own anchors, where that was measured, is free of the draw. Below: the share of blocks whose update was
        projected. Of a run of many steps the extremes of short stretches are drawn.

    Raises:
        SPFError: If no step was recorded.
    """
    whole = _frame(certificate)
    frame = _thinned(whole)
    figure = make_subplots(3, 1, shared_xaxes=True, row_heights=[0.42, 0.38, 0.2], vertical_spacing=0.06)
    # Under a rule on the gradient both are the same: the wide line shows beneath the other.
    wide = 6 if line_mode(len(frame)) != "lines" else 3
    proposed = {"color": translucent(COLOURS["SFT"], 0.5), "width": wide}
    applied = {"color": COLOURS["SPF"], "width": 2}
    figure.add_trace(_change(frame, "first_order_raw", "optimizer's own update", proposed), row=1, col=1)
    figure.add_trace(_change(frame, "first_order", "applied update", applied), row=1, col=1)
    bound = frame[np.isfinite(frame["bound"])]
    if bound["bound"].any():
        figure.add_trace(_bound(bound), row=1, col=1)
    if certificate.violations:
        figure.add_trace(_violations(frame[frame["violated"]]), row=1, col=1)
    figure.add_traces(list(_drift(whole)), rows=2, cols=1)
    figure.add_trace(_fired(frame, len(frame) == len(whole)), row=3, col=1)
    for row in (1, 2):
        figure.add_hline(y=0, line=_ZERO, row=row, col=1)
    promise = "" if certificate.guaranteed else " (not promised by this rule)"
    figure.update_layout(
        template=TEMPLATE,
        title=title(
            f"{name}{': w' if name else 'W'}hat each update does to the safety loss",
            f"rule {certificate.rule}: {certificate.violations} of {certificate.steps} steps break the "
            f"constraint{promise}; largest change {certificate.max_first_order_change:.2g}",
        ),
        yaxis={"title": f"⟨Δθ, g<sub>s</sub>⟩, {_NATS}", "exponentformat": "power"},
        yaxis2={"title": f"drift of L<sub>s</sub>, {_NATS}", "exponentformat": "power"},
        yaxis3={"title": "projected", "tickformat": ".0%", "range": [0, 1.05]},
        xaxis3_title="optimizer step",
        height=700 + (room := legend_room([trace.name for trace in figure.data])),
        margin_b=84 + room,
        bargap=0.1,
    )
    figure.update_xaxes(**step_ticks([whole["step"].iloc[0] - 1, *whole["step"]]))
    return figure


def plot_certificates(certificates: "Mapping[str, Certificate]") -> go.Figure:
    """Draw what the updates of several runs did to the safety loss.

    Args:
        certificates: What SPF guards recorded, by the name of the run.

    Returns:
        The figure, a line per run. Above: the sum of ⟨Δθ, g_s⟩ over the updates so far, which a rule that keeps every
        update from raising the safety loss can only lower. Below: by how much the loss on the anchors has changed,
        curvature included, and the draw where each step has other anchors. The legend counts the steps that raise the
        loss to first order beyond rounding, whatever the rule promises.

    Raises:
        SPFError: If there is no run, or one without a step.
    """
    if not certificates:
        raise SPFError("expected at least one certificate, found none")
    frames = {name: _frame(certificate) for name, certificate in certificates.items()}
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.07)
    for (name, frame), look in zip(frames.items(), looks(list(frames)), strict=True):
        raised = int((frame["first_order"] > frame["tolerance"]).sum())
        for row, (steps, values) in enumerate((_summed(frame, "first_order"), _losses(frame)), start=1):
            trace = _line(steps, values, f"{name}: {raised} of {len(frame)} raise it", look.colour, look.dash)
            trace.update(legendgroup=name, showlegend=row == 1)
            figure.add_trace(trace, row=row, col=1)
            figure.add_hline(y=0, line=_ZERO, row=row, col=1)
    figure.update_layout(
        template=TEMPLATE,
        title=title(
            "Safety loss under each rule, less that before training",
            f"{_NATS}, on the anchors; the legend counts the updates that raise it to first order",
        ),
        yaxis={"title": "first-order part", "exponentformat": "power"},
        yaxis2={"title": "all of it", "exponentformat": "power"},
        xaxis2_title="optimizer step",
        height=560 + (room := legend_room([trace.name for trace in figure.data if trace.showlegend])),
        margin_b=84 + room,
    )
    figure.update_xaxes(**step_ticks({0, *(step for frame in frames.values() for step in frame["step"])}))
    return figure


def plot_certificate_blocks(certificate: "Certificate", name: str = "") -> go.Figure:
    """Draw what the applied updates did to the safety loss block by block.

    Args:
        certificate: What an SPF guard recorded.
        name: What to call the run in the title.

    Returns:
        A heat map, a row per block in the model's order and a column per step, of ⟨Δθ, g_s⟩ as applied: red where a
        block's update raises the safety loss, which a rule that promises something of every block has none of. The
        largest 2 % may share the last colour. Of a run of many steps a column shows, for each block, the most positive
        of several, and where none is positive the least negative.

    Raises:
        SPFError: If no step was recorded, or there is no block.
    """
    _frame(certificate)
    frame = certificate.to_frame(by="block")
    if frame.empty:
        raise SPFError("expected a block with a safety gradient, found none; is the gradient zero?")
    stretch = -(-certificate.steps // _COLUMNS)
    frame = frame.assign(column=(frame["step"] - frame["step"].min()) // stretch)
    worst = frame.loc[frame.groupby(["block", "column"], sort=False)["first_order"].idxmax()]
    table, step, raw = (
        worst.pivot(index="block", columns="column", values=column).reindex(frame["block"].unique())
        for column in ("first_order", "step", "first_order_raw")
    )
    magnitudes = np.abs(table.to_numpy()[np.isfinite(table)])
    limit = float(np.quantile(magnitudes, _SHOWN, method="higher")) or float(magnitudes.max()) or 1.0
    clipped = f"; colours end at ±{limit:.2g}" if limit < magnitudes.max() else ""
    columns = table.columns * stretch + frame["step"].min()
    ticks = {"tickvals": whole_ticks([columns[0] - 1, *columns], 10)} if len(columns) <= _FEW else {"tickformat": "d"}
    few = len(table) <= _FEW
    figure = go.Figure(
        go.Heatmap(
            z=table.to_numpy(),
            x=columns,
            y=table.index,
            customdata=np.dstack([step.to_numpy(), raw.to_numpy()]),
            colorscale="RdBu_r",
            zmid=0,
            zmin=-limit,
            zmax=limit,
            xgap=1 if len(columns) <= _FEW else 0,
            ygap=1 if few else 0,
            colorbar={
                "title": {"text": _NATS.replace(" ", "<br>", 1), "side": "top", "font": {"size": 12}},
                "exponentformat": "power",
                "thickness": 14,
            },
            hoverongaps=False,
            hovertemplate=(
                "%{y}, step %{customdata[0]}<br>applied <b>%{z:.2e}</b> nats per token<br>proposed "
                "%{customdata[1]:.2e}<extra></extra>"
            ),
        )
    )
    labelled = list(table.index)[:: -(-len(table) // _FEW)]
    highest = frame["first_order"].max()
    raised = f"red raises it, by {highest:.2g} at most" if highest > 0 else "no block raises it"
    figure.update_layout(
        template=TEMPLATE,
        title=title(
            f"{name}{': f' if name else 'F'}irst-order change of the safety loss, block by block",
            f"rule {certificate.rule}, applied updates; {raised}{clipped}",
        ),
        xaxis={
            "title": "optimizer step",
            **ticks,
            "showgrid": False,
            "range": [columns[0] - 0.5 * stretch, columns[-1] + 0.5 * stretch],
        },
        yaxis={
            "autorange": "reversed",
            "showgrid": False,
            "tickvals": labelled,
            "ticktext": [_block_label(block) for block in labelled],
            "tickfont": {"size": 10 if few else 9},
        },
        height=170 + (max(150, 15 * len(table)) if few else min(1100, 3 * len(table) + 720)),
        margin_b=56,
    )
    return figure


def _block_label(name: str) -> str:
    """Return a name that fits beside a map, cut where all begin alike."""
    label = name.removeprefix("base_model.model.").removeprefix("model.").removesuffix(".weight")
    return label if len(label) <= _LABEL else f"…{label[-_LABEL:]}"


def _frame(certificate: "Certificate") -> "pd.DataFrame":
    if not certificate.records:
        raise SPFError("expected the records of at least one step, found none; train first")
    return certificate.to_frame()


def _thinned(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Return the extreme steps of each of some stretches of a long run, and its violations; else all steps."""
    if len(frame) <= 2 * _BINS:
        return frame
    stretches = frame.groupby(np.arange(len(frame)) * _BINS // len(frame))
    kept = {0, len(frame) - 1, *stretches["violated"].idxmax()}
    for column in ("first_order_raw", "first_order"):
        kept |= {*stretches[column].idxmax(), *stretches[column].idxmin()}
    return frame.loc[sorted(kept)]


def _change(frame: "pd.DataFrame", column: str, name: str, line: dict[str, object]) -> go.Scatter:
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


def _bound(frame: "pd.DataFrame") -> go.Scatter:
    return go.Scatter(
        x=frame["step"],
        y=frame["bound"],
        name="bound with drift correction",
        mode="lines",
        line={"color": "#222222", "dash": "dot", "width": 1.5},
        hovertemplate="bound, step %{x}<br><b>%{y:.3e}</b> nats per token<extra></extra>",
    )


def _violations(frame: "pd.DataFrame") -> go.Scatter:
    return go.Scatter(
        x=frame["step"],
        y=frame["first_order"],
        name="violation",
        mode="markers",
        marker={"symbol": "x", "size": 8 if len(frame) <= 2 * _BINS else 4, "color": "#222222"},
        customdata=frame[["worst", "tolerance"]].to_numpy(),
        hovertemplate=(
            "violation, step %{x}<br>worst <b>%{customdata[0]:.2e}</b>, tolerance %{customdata[1]:.2e}<extra></extra>"
        ),
    )


def _drift(frame: "pd.DataFrame") -> Iterator[go.Scatter]:
    """Yield by how much the safety loss has changed so far: as measured, to first order, and step by step."""
    again = frame["fresh"].to_numpy()[1:]
    after, before = frame["loss_after"].to_numpy()[:-1][again], frame["anchor_loss"].to_numpy()[1:][again]
    same = bool((after == before).all())  # the loss after a step is the one before the next
    loss = "safety loss on the anchors" if same else "safety loss on each step's own anchors"
    yield _line(*_losses(frame), loss, COLOURS["safety"], "solid" if same else "dot")
    if not same and frame["curvature"].notna().all():
        changes = frame.assign(change=frame["first_order"] + frame["curvature"])
        yield _line(*_summed(changes, "change"), "sum of its changes by each step", COLOURS["utility"], "solid")
    yield _line(*_summed(frame, "first_order"), "sum of first-order parts", COLOURS["SPF"], "dash")


def _losses(frame: "pd.DataFrame") -> "tuple[np.ndarray, np.ndarray]":
    """Return after how many steps the safety loss was measured, and its value less the first."""
    fresh = frame[frame["fresh"]]
    steps, losses = fresh["step"].to_numpy() - 1, fresh["anchor_loss"].to_numpy()
    last = frame.iloc[-1]
    if np.isfinite(last["loss_after"]):
        steps, losses = np.append(steps, last["step"]), np.append(losses, last["loss_after"])
    if not len(losses):
        return steps, losses
    return steps, losses - losses[0]


def _summed(frame: "pd.DataFrame", column: str) -> "tuple[np.ndarray, np.ndarray]":
    """Return after how many steps, and the sum of a column so far."""
    first = frame["step"].iloc[0] - 1
    return np.arange(first, first + len(frame) + 1), np.concatenate([[0.0], np.cumsum(frame[column])])


def _line(steps: np.ndarray, values: np.ndarray, name: str, colour: str, dash: str) -> go.Scatter:
    if len(steps) > 2 * _BINS:
        kept = np.unique(np.linspace(0, len(steps) - 1, 2 * _BINS).astype(int))
        steps, values = steps[kept], values[kept]
    return go.Scatter(
        x=steps,
        y=values,
        name=name,
        mode=line_mode(len(steps)),
        line={"color": colour, "dash": dash, "width": 2},
        hovertemplate=f"{name}, after %{{x}} steps<br><b>%{{y:+.3e}}</b> nats per token<extra></extra>",
    )


def _fired(frame: "pd.DataFrame", whole: bool) -> go.Bar | go.Scatter:
    look = {"x": frame["step"], "y": frame["fired"], "name": "blocks projected"}
    hover = "step %{x}<br><b>%{y:.1%}</b> of the blocks projected<extra></extra>"
    if whole:
        return go.Bar(**look, marker={"color": COLOURS["null"], "line_width": 0}, hovertemplate=hover)
    return go.Scatter(**look, mode="lines", line={"color": COLOURS["null"], "width": 1}, hovertemplate=hover)
