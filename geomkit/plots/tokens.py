"""The figure of the tokens that conflict with safety, and of those that agree."""

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from geomkit.plots.style import TEMPLATE, per_cent, title, told
from geomkit.utils.display import counted

if TYPE_CHECKING:
    import pandas as pd

    from geomkit.correlation.token_conflict import TokenConflict

_AGAINST, _WITH = "#B2182B", "#2166AC"


def plot_token_conflict(tokens: "TokenConflict", *, count: int = 12) -> go.Figure:
    """Draw the tokens that add most to the conflict with safety, and those that add most to agreement.

    Args:
        tokens: The contributions of every token.
        count: How many of each to show, at most.

    Returns:
        The figure: what each token adds to the mean derivative of the utility examples' losses along the safety
        gradient, with its interval over examples; red where learning it raises the safety loss.
    """
    table = tokens.by_token()
    against = table[table["total"] < 0].head(count)
    agreeing = table[table["total"] > 0].tail(count)
    low, high = tokens.interval
    figure = go.Figure(layout={"template": TEMPLATE})
    for frame, name, colour in ((against, "against safety", _AGAINST), (agreeing, "with safety", _WITH)):
        figure.add_trace(_points(frame, name, colour))
    figure.add_vline(x=0, line={"color": "#222222", "width": 1})
    rows = [*against.index, *agreeing.index]
    figure.update_layout(
        title=title(
            "Tokens of the utility examples against and with safety",
            f"all tokens together {tokens.totals.mean():+.3g} [{low:+.3g}, {high:+.3g}], mean over "
            f"{counted(len(tokens.examples), 'example')}; lines: {per_cent(tokens.confidence)} intervals",
        ),
        xaxis_title="derivative of the loss along the safety gradient (nats per unit length)",
        yaxis={
            "tickvals": rows,
            "ticktext": [_label(table["token"][row], table["count"][row]) for row in rows],
            "type": "category",
            "categoryorder": "array",
            "categoryarray": rows,
            "autorange": "reversed",
            "tickfont": {"size": 11},
        },
        height=max(420, 180 + 20 * len(rows)),
    )
    return figure


def _label(token: str, count: int) -> str:
    visible = token.replace("\n", "⏎").strip(" ") or "␣"
    return f"{told(visible)} ×{count}"


def _points(frame: "pd.DataFrame", name: str, colour: str) -> go.Scatter:
    return go.Scatter(
        x=frame["total"],
        y=frame.index.astype(str),
        name=name,
        mode="markers",
        marker={"color": colour, "size": 8},
        error_x={
            "array": frame["high"] - frame["total"],
            "arrayminus": frame["total"] - frame["low"],
            "thickness": 1.4,
            "width": 0,
        },
        customdata=frame.assign(token=frame["token"].map(told))[
            ["token", "count", "examples", "contribution", "loss", "low", "high"]
        ].to_numpy(),
        hovertemplate=(
            "%{customdata[0]}<br><b>%{x:+.3g}</b> [%{customdata[5]:+.3g}, %{customdata[6]:+.3g}]<br>%{customdata[1]} "
            "times in %{customdata[2]} examples, each %{customdata[3]:+.3g}<br>loss %{customdata[4]:.3g} nats"
            f"<extra>{name}</extra>"
        ),
    )
