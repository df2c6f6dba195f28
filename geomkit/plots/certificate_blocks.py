"""The figure of a certificate block by block: the change of the safety loss by each block's update."""

import numpy as np
import plotly.graph_objects as go

from geomkit.errors import SPFError
from geomkit.inputs.parameters import layer_index
from geomkit.plots.axes import signed_log, whole_ticks
from geomkit.plots.certificates import NATS, check_recorded
from geomkit.plots.labels import place_labels
from geomkit.plots.style import colour_bar, fitted, title
from geomkit.plots.themes import palette, template
from geomkit.spf.certificate import Certificate

_COLUMNS = 200
"""The most columns of the map; of a longer run a column stands for several steps."""

_FEW = 60
"""Up to this many rows or columns are separated by gaps, and each has a label."""

_LABEL = 26
"""The most characters of a block's label."""


def plot_certificate_blocks(certificate: Certificate, name: str = "") -> go.Figure:
    """Draw the first-order change of the safety loss by the applied update of each block.

    Args:
        certificate: The record of an SPF guard.
        name: Name of the run, for the title.

    Returns:
        A heat map of ⟨Δθ, g_s⟩ with a row per block in the model's order and a column per step: red where a block's
        update raises the safety loss, which a rule that constrains every block excludes. The scale of colours is
        logarithmic on both sides of zero, since a few blocks have most of the change. Of a run of many steps a column
        shows, for each block, the largest of several values.

    Raises:
        SPFError: If no step was recorded, or there is no block.
    """
    check_recorded(certificate)
    frame = certificate.to_frame(by="block")
    if frame.empty:
        raise SPFError("expected a block with a safety gradient, found none; check the loss masks of the anchors")
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
    scale = signed_log(applied)
    end = float(np.nanmax(np.abs(scale.places(applied)))) or 1.0
    steps = np.asarray(applied.columns) * stretch + first
    few_rows, few_columns = len(applied) <= _FEW, len(steps) <= _FEW
    figure = go.Figure(
        go.Heatmap(
            z=scale.places(applied),
            x=steps,
            y=applied.index,
            customdata=np.dstack([step.to_numpy(), proposed.to_numpy(), applied.to_numpy()]),
            colorscale=palette().diverging(rising="against"),
            zmid=0,
            zmin=-end,
            zmax=end,
            xgap=1 if few_columns else 0,
            ygap=1 if few_rows else 0,
            colorbar=colour_bar(NATS, tickvals=scale.ticks, ticktext=scale.labels),
            hoverongaps=False,
            hovertemplate=(
                "%{y}, step %{customdata[0]}<br>applied <b>%{customdata[2]:.2e}</b> nats per token<br>proposed "
                "%{customdata[1]:.2e}<extra></extra>"
            ),
        )
    )
    highest = frame["first_order"].max()
    raised = f"red raises it, by {highest:.2g} at most" if highest > 0 else "no block raises it"
    raised += "; SPF was idle" if certificate.is_idle else ""
    figure.update_layout(
        template=template(),
        title=title(
            f"{name}{': c' if name else 'C'}hange of the safety loss by block",
            f"to first order; rule {certificate.rule}, applied updates; {raised}",
        ),
        xaxis={
            "title": "optimizer step",
            **({"tickvals": whole_ticks([steps[0] - 1, *steps], 10)} if few_columns else {"tickformat": "d"}),
            "showgrid": False,
            "range": [steps[0] - 0.5 * stretch, steps[-1] + 0.5 * stretch],
        },
        yaxis=_axis_of_blocks(list(applied.index)),
    )
    return fitted(figure, max(150, 15 * len(applied)) if few_rows else min(1100, 3 * len(applied) + 720))


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
    """Return a block's decoder layer and its place in it, or the end of a long name.

    Example:
        >>> _label("base_model.model.model.layers.2.self_attn.q_proj.weight"), _label("lm_head.weight")
        ('2 attention q_proj', 'head')
    """
    (words,) = place_labels([name]).values()
    index = layer_index(name)
    end = words if len(words) <= _LABEL else f"…{words[-_LABEL:]}"
    return end if index is None else f"{index} {end}"
