"""The figure of a screen: the scores of the training rows beside the null, and the rows that stand out most."""

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from geomkit.correlation.token_conflict import ExampleTokens
from geomkit.plots.labels import coloured, per_cent
from geomkit.plots.style import fitted, title
from geomkit.plots.themes import COLOURS, palette, template
from geomkit.screening.screening import LEVEL, Screening
from geomkit.utils.display import counted

_LINE = 22
"""Height in pixels of the line of a row."""

_HISTOGRAM = 300
"""Height in pixels of the histogram."""

_WIDTH = 84
"""Number of characters of a row's answer that are shown."""

_STRONG, _VISIBLE = 0.5, 0.1
"""Shares of a row's largest contribution from which on a token is bold, and coloured."""


def plot_screening(screening: Screening, *, level: float = LEVEL, count: int = 8) -> go.Figure:
    """Draw the scores of the training rows beside those of the null, and the rows that stand out most.

    Args:
        screening: The result of a screen.
        level: The false-discovery level that rows are flagged at.
        count: The most rows whose answers are written below.

    Returns:
        The figure: a histogram of both sets of scores, a mark for each flagged row, and the answers of the rows with
        the highest scores; tokens in red raise the safety loss when they are learnt, tokens in blue lower it.
    """
    flagged = screening.flagged(level)
    figure = go.Figure(layout={"template": template()})
    edges = np.histogram_bin_edges(np.concatenate([screening.scores, screening.null_scores]), bins=60)
    kind = "benign rows" if screening.null_kind == "benign" else "shuffled pairs"
    for values, name, colour in (
        (screening.null_scores, f"null: {len(screening.null)} {kind}", COLOURS["null"]),
        (screening.scores, f"{len(screening.rows)} training rows", COLOURS["utility"]),
    ):
        figure.add_trace(_histogram(values, edges, name, colour))
    if len(flagged):
        figure.add_trace(_marks(screening, flagged))
    shown = list(zip(screening.top[:count], screening.top_tokens, strict=False))
    below = _LINE * (len(shown) + 1) if shown else 0
    figure.update_layout(
        title=title(
            screening.question,
            f"{counted(len(flagged), 'row')} at a false-discovery level of {per_cent(level)}; score: "
            f"{screening.method}, standardized by null rows of as many scored tokens",
        ),
        barmode="overlay",
        xaxis_title="score (standard deviations of the null)",
        yaxis={"title": "share of rows (%)", "type": "log", "dtick": 1},
    )
    fitted(figure, _HISTOGRAM)
    figure.update_layout(height=figure.layout.height + below, margin_b=figure.layout.margin.b + below)
    for place, (row, example) in enumerate(shown, 1):
        figure.add_annotation(
            text=f"<b>{screening.scores[row]:+.1f}</b>  row {row}: {_answer(example)}",
            x=0, xref="paper", xanchor="left", y=0, yref="paper", yanchor="top", yshift=-50 - _LINE * place,
            showarrow=False, align="left", font={"size": 12},
        )  # fmt: skip
    return figure


def _histogram(values: NDArray[np.float64], edges: NDArray[np.float64], name: str, colour: str) -> go.Bar:
    counts, _ = np.histogram(values, edges)
    share = 100 * counts / len(values)
    return go.Bar(
        x=(edges[:-1] + edges[1:]) / 2,
        y=np.where(counts > 0, share, np.nan),
        width=np.diff(edges),
        name=name,
        marker={"color": colour, "line_width": 0},
        opacity=0.55,
        customdata=counts,
        hovertemplate="score %{x:.2f}<br>%{customdata} rows, %{y:.3g} %<extra></extra>",
    )


def _marks(screening: Screening, flagged: NDArray[np.int64]) -> go.Scatter:
    lowest = 100 / max(len(screening.rows), len(screening.null))
    return go.Scatter(
        x=screening.scores[flagged],
        y=np.full(len(flagged), lowest / 2),
        name="flagged",
        mode="markers",
        marker={"symbol": "line-ns-open", "size": 12, "color": palette().ink},
        customdata=np.stack([flagged, screening.q_values[flagged]], axis=1),
        hovertemplate="row %{customdata[0]}<br>score %{x:.2f}, q %{customdata[1]:.2g}<extra></extra>",
    )


def _answer(example: ExampleTokens) -> str:
    """Return the scored tokens of a row, coloured by what learning them does to the safety loss."""
    scored = np.flatnonzero(example.scored)
    largest = float(np.abs(example.contributions[scored]).max()) or 1.0
    pieces: list[str] = []
    length = 0
    for place in scored.tolist():
        text, share = example.tokens[place].replace("\n", "⏎"), float(example.contributions[place]) / largest
        length += len(text)
        if length > _WIDTH:
            return "".join([*pieces, "…"])
        colours = palette()
        colour = colours.faint if abs(share) < _VISIBLE else colours.against if share < 0 else colours.agreeing
        pieces.append(coloured(text, colour, bold=abs(share) >= _STRONG))
    return "".join(pieces)
