"""The figure of the tokens that conflict most with safety, and of the tokens that agree most with safety."""

import pandas as pd
import plotly.graph_objects as go

from geomkit.correlation.token_conflict import TokenConflict
from geomkit.plots.labels import escaped, per_cent
from geomkit.plots.style import fitted, title
from geomkit.plots.themes import palette, template
from geomkit.plots.traces import error_bars
from geomkit.utils.display import counted


def plot_token_conflict(tokens: TokenConflict, *, count: int = 12) -> go.Figure:
    """Draw the tokens that contribute most to the conflict with safety, and the tokens that agree most with safety.

    Args:
        tokens: The contribution of every token.
        count: The most tokens to draw on either side.

    Returns:
        The figure: the contribution of each token to the mean derivative of the utility examples' losses along the
        safety gradient, with its interval over examples; red where learning the token raises the safety loss.
    """
    table = tokens.by_token()
    against = table[table["total"] < 0].head(count)
    agreeing = table[table["total"] > 0].tail(count)
    low, high = tokens.interval
    figure = go.Figure(layout={"template": template()})
    red, blue = palette().against, palette().agreeing
    for frame, name, colour in ((against, "against safety", red), (agreeing, "with safety", blue)):
        figure.add_trace(_points(frame, name, colour))
    figure.add_vline(x=0, line={"color": palette().ink, "width": 1})
    rows = [*against.index, *agreeing.index]
    figure.update_layout(
        title=title(
            "Tokens against and with safety",
            f"of the utility examples: all together {tokens.totals.mean():+.3g} [{low:+.3g}, {high:+.3g}], mean over "
            f"{counted(len(tokens.examples), 'example')}; lines: {per_cent(tokens.confidence)} intervals",
        ),
        xaxis_title="derivative of the loss along the<br>safety gradient, nats per unit length",
        yaxis={
            "tickvals": rows,
            "ticktext": [_label(table["token"][row], table["count"][row]) for row in rows],
            "type": "category",
            "categoryorder": "array",
            "categoryarray": rows,
            "autorange": "reversed",
            "tickfont": {"size": 11},
        },
    )
    return fitted(figure, max(240, 20 * len(rows)))


def _label(token: str, count: int) -> str:
    """Return a token, visible even if it is white space, with the number of its occurrences."""
    visible = token.replace("\n", "⏎").strip(" ") or "␣"
    return f"{escaped(visible)} ×{count}"


def _points(frame: pd.DataFrame, name: str, colour: str) -> go.Scatter:
    columns = ["token", "count", "examples", "contribution", "loss", "low", "high"]
    return go.Scatter(
        x=frame["total"],
        y=frame.index.astype(str),
        name=name,
        mode="markers",
        marker={"color": colour, "size": 8},
        error_x=error_bars(frame["total"], frame["low"], frame["high"], thickness=1.4),
        customdata=frame.assign(token=frame["token"].map(escaped))[columns].to_numpy(),
        hovertemplate=(
            "%{customdata[0]}<br><b>%{x:+.3g}</b> [%{customdata[5]:+.3g}, %{customdata[6]:+.3g}]<br>%{customdata[1]} "
            "times in %{customdata[2]} examples, each %{customdata[3]:+.3g}<br>loss %{customdata[4]:.3g} nats"
            f"<extra>{name}</extra>"
        ),
    )
