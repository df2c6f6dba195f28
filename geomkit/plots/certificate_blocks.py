"""The figure of a certificate block by block: the change of the safety loss by each block's update."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from geomkit.errors import SPFError
from geomkit.plots.axes import whole_ticks
from geomkit.plots.certificates import NATS, check_recorded
from geomkit.plots.style import TEMPLATE, title
from geomkit.spf.certificate import Certificate

_COLUMNS = 200
"""The most columns of the map; of a longer run a column stands for several steps."""

_FEW = 60
"""Up to this many rows or columns are separated by gaps, and each has a label."""

_SHOWN = 0.98
"""Share of the cells whose value lies within the scale of colours."""

_LABEL = 38
"""The most characters of a block's label."""


def plot_certificate_blocks(certificate: Certificate, name: str = "") -> go.Figure:
    """Draw the first-order change of the safety loss by the applied update of each block.

    Args:
        certificate: The record of an SPF guard.
        name: Name of the run, for the title.

    Returns:
        A heat map of ⟨Δθ, g_s⟩ with a row per block in the model's order and a column per step: red where a block's
        update raises the safety loss, which a rule that constrains every block excludes. The last colour may stand for
        the largest 2 %. Of a run of many steps a column shows, for each block, the largest of several values.

    Raises:
        SPFError: If no step was recorded, or there is no block.
    """
    check_recorded(certificate)
    frame = certificate.to_frame(by="block")
    if frame.empty:
        raise SPFError("expected a block with a safety gradient, found none; is the gradient zero?")
    # 1. Cut the run into at most 200 stretches of equal length.
    first, stretch = int(frame["step"].min()), -(-certificate.steps // _COLUMNS)
    # 2. For each block and stretch keep the step with the largest change.
    frame = frame.assign(column=(frame["step"] - first) // stretch)
    worst = frame.loc[frame.groupby(["block", "column"], sort=False)["first_order"].idxmax()]
    # 3. Turn them into tables of blocks by stretches.
    applied, step, proposed = (
        worst.pivot(index="block", columns="column", values=column).reindex(frame["block"].unique())
        for column in ("first_order", "step", "first_order_raw")
    )
    limit, clipped = _limit(applied)
    steps = np.asarray(applied.columns) * stretch + first
    few_rows, few_columns = len(applied) <= _FEW, len(steps) <= _FEW
    figure = go.Figure(
        go.Heatmap(
            z=applied.to_numpy(),
            x=steps,
            y=applied.index,
            customdata=np.dstack([step.to_numpy(), proposed.to_numpy()]),
            colorscale="RdBu_r",
            zmid=0,
            zmin=-limit,
            zmax=limit,
            xgap=1 if few_columns else 0,
            ygap=1 if few_rows else 0,
            colorbar={
                "title": {"text": NATS.replace(" ", "<br>", 1), "side": "top", "font": {"size": 12}},
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
    highest = frame["first_order"].max()
    raised = f"red raises it, by {highest:.2g} at most" if highest > 0 else "no block raises it"
    figure.update_layout(
        template=TEMPLATE,
        title=title(
            f"{name}{': f' if name else 'F'}irst-order change of the safety loss, block by block",
            f"rule {certificate.rule}, applied updates; {raised}{f'; colours end at ±{limit:.2g}' if clipped else ''}",
        ),
        xaxis={
            "title": "optimizer step",
            **({"tickvals": whole_ticks([steps[0] - 1, *steps], 10)} if few_columns else {"tickformat": "d"}),
            "showgrid": False,
            "range": [steps[0] - 0.5 * stretch, steps[-1] + 0.5 * stretch],
        },
        yaxis=_axis_of_blocks(list(applied.index)),
        height=170 + (max(150, 15 * len(applied)) if few_rows else min(1100, 3 * len(applied) + 720)),
        margin_b=56,
    )
    return figure


def _limit(changes: pd.DataFrame) -> tuple[float, bool]:
    """Return the end of the scale of colours, and whether a value is larger."""
    magnitudes = np.abs(changes.to_numpy()[np.isfinite(changes)])
    limit = float(np.quantile(magnitudes, _SHOWN, method="higher")) or float(magnitudes.max()) or 1.0
    return limit, limit < magnitudes.max()


def _axis_of_blocks(names: list[str]) -> dict[str, object]:
    """Return a vertical axis of all blocks, of which at most 60 have a label."""
    labelled = names[:: -(-len(names) // _FEW)]
    return {
        "autorange": "reversed",
        "showgrid": False,
        "tickvals": labelled,
        "ticktext": [_label(name) for name in labelled],
        "tickfont": {"size": 10 if len(names) <= _FEW else 9},
    }


def _label(name: str) -> str:
    """Return the end of a block's name, without the beginning that all names share."""
    label = name.removeprefix("base_model.model.").removeprefix("model.").removesuffix(".weight")
    return label if len(label) <= _LABEL else f"…{label[-_LABEL:]}"
