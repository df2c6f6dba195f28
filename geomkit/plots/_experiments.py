"""Figures of experiments: what arms keep and learn, where they break, and what certificates say of that."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from geomkit.errors import DataError
from geomkit.plots._style import COLOURS, TEMPLATE, Look, legend_room, looks, title, translucent

if TYPE_CHECKING:
    import pandas as pd

    from geomkit.experiments.results import Results

_PER_ROW = 3
_FEW_ARMS = 9
"""More arms than this do not fit into one panel; the caller chooses some then."""

_WORDS = {"refusal": "refusal", "over_refusal": "over-refusal", "utility": "utility", "triggered_refusal": "refusal"}
_SCALE = ("#B2432F", "#F1E3C8", "#00604A")
"""From lost to kept; told apart also in grey, by its lightness at the middle and the numbers on it."""


def plot_frontier(results: "Results", *, arms: Sequence[str] | None = None) -> go.Figure:
    """Draw refusal against utility, a panel per scenario: what is kept, and what is learnt.

    The mean over runs with its Wilson intervals over prompts, and each run as a faint dot. Of the backdoor scenario the
    refusal is that of requests with the trigger. A hollow marker stands for more than one point of over-refusal.

    Args:
        results: Results at one rate and length; those of the scenarios' own where there are several.
        arms: The arms drawn, in this order; all when left out.

    Raises:
        DataError: If there is no such arm, or there are too many to draw.
    """
    chosen = _at_own_strength(results)
    names = _arms(chosen, arms)
    summary = chosen.summary(["refusal", "triggered_refusal", "over_refusal", "utility"])
    runs = chosen.to_frame()
    scenarios = list(dict.fromkeys(runs["scenario"]))
    figure = _panels(scenarios)
    for place, scenario in enumerate(scenarios):
        at = {"row": place // _PER_ROW + 1, "col": place % _PER_ROW + 1}
        for name, look in zip(names, looks(names), strict=True):
            means = summary[(summary["scenario"] == scenario) & (summary["arm"] == name)].set_index("measure")
            own = runs[(runs["scenario"] == scenario) & (runs["arm"] == name)]
            if not len(means) or not means.loc["utility", "runs"]:
                continue
            kept = "triggered_refusal" if means.loc["triggered_refusal", "runs"] else "refusal"
            figure.add_trace(
                go.Scatter(
                    x=own["utility"], y=own[kept], mode="markers", legendgroup=name, showlegend=False, hoverinfo="skip",
                    marker={"color": translucent(look.colour, 0.35), "size": 5},
                ),
                **at,
            )  # fmt: skip
            figure.add_trace(_point(name, look, means.loc[kept], means.loc["utility"], means.loc["over_refusal"]), **at)
    _legend(figure, names)
    figure.update_xaxes(range=[-0.06, 1.06], tickformat=".0%", dtick=0.5)
    figure.update_yaxes(range=[-0.06, 1.06], tickformat=".0%", dtick=0.5)
    _sized(figure, scenarios, names, "Refusal against utility", "mean over seeds; hollow: over-refusal above a point")
    return figure


def _point(
    name: str, look: Look, kept: "pd.Series[float]", learnt: "pd.Series[float]", over: "pd.Series[float]"
) -> go.Scatter:
    hollow = over["value"] > 0.01
    return go.Scatter(
        x=[learnt["value"]],
        y=[kept["value"]],
        name=name,
        legendgroup=name,
        showlegend=False,
        mode="markers",
        marker={
            "color": look.colour,
            "symbol": f"{look.symbol}-open" if hollow else look.symbol,
            "size": 10,
            "line": {"width": 2 if hollow else 0},
        },
        error_x=_bars(learnt),
        error_y=_bars(kept),
        hovertemplate=(
            f"{name}<br>refusal <b>{kept['value']:.1%}</b>, runs from {kept['least']:.1%} to {kept['most']:.1%}<br>"
            f"utility <b>{learnt['value']:.1%}</b><br>over-refusal {over['value']:.1%}<br>"
            f"{kept['runs']:.0f} runs of {kept['prompts']:.0f} prompts<extra></extra>"
        ),
    )


def _bars(row: "pd.Series[float]") -> dict[str, object]:
    return {
        "array": [row["high"] - row["value"]],
        "arrayminus": [row["value"] - row["low"]],
        "thickness": 1,
        "width": 0,
    }


def plot_refusal_along(results: "Results", *, arms: Sequence[str] | None = None) -> go.Figure:
    """Draw refusal on held-out requests while the model is trained, a panel per scenario, a line per run.

    Args:
        results: Results of cells that looked along the way.
        arms: The arms drawn; all that looked when left out.

    Raises:
        DataError: If no cell looked, or there is no such arm.
    """
    frame = results.along()
    if not len(frame):
        raise DataError(
            "expected cells that measured refusal along training, found none; give the grid's block along = 5"
        )
    names = _among(list(dict.fromkeys(frame["arm"])), arms)
    scenarios = list(dict.fromkeys(frame["scenario"]))
    figure = _panels(scenarios)
    keys = ["organism", "rate", "length", "seed"]
    for place, scenario in enumerate(scenarios):
        for name, look in zip(names, looks(names), strict=True):
            own = frame[(frame["scenario"] == scenario) & (frame["arm"] == name)]
            for _, run in own.groupby(keys):
                figure.add_trace(
                    go.Scatter(
                        x=run["step"], y=run["refusal"], name=name, legendgroup=name, showlegend=False,
                        mode="lines+markers",
                        line={"color": look.colour, "dash": look.dash, "width": 2},
                        marker={"symbol": look.symbol, "size": 7},
                        hovertemplate=f"{name}, step %{{x}}<br>refusal <b>%{{y:.1%}}</b><extra></extra>",
                    ),
                    row=place // _PER_ROW + 1, col=place % _PER_ROW + 1,
                )  # fmt: skip
    _legend(figure, names)
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(range=[-0.05, 1.05], tickformat=".0%", dtick=0.5)
    _sized(
        figure, scenarios, names, "Refusal along training", "share of 60 held-out requests, by optimizer step", "step"
    )
    return figure


def plot_breakdown(
    results: "Results", scenario: str, *, arms: Sequence[str] | None = None, measure: str = "refusal"
) -> go.Figure:
    """Draw a measure over the plane of learning rates and lengths, a map per arm: where it breaks.

    Args:
        results: Results at several rates and lengths.
        scenario: The scenario.
        arms: The arms drawn; all that were run at more than one strength when left out.
        measure: ``"refusal"``, ``"over_refusal"`` or ``"utility"``.

    Raises:
        DataError: If nothing was run at more than one strength, or there is no such arm.
    """
    summary = results.where(scenario=scenario).summary([measure]).dropna(subset=["value"])
    strengths = summary.groupby("arm", sort=False).size()
    names = _among(list(strengths[strengths > 1].index), arms)
    rates, lengths = (sorted(set(summary.loc[summary["arm"].isin(names), axis])) for axis in ("rate", "length"))
    figure = make_subplots(1, len(names), subplot_titles=names, shared_yaxes=True, horizontal_spacing=0.03)
    for place, name in enumerate(names):
        table = summary[summary["arm"] == name].pivot_table(index="rate", columns="length", values="value")
        values = table.reindex(index=rates, columns=lengths).to_numpy()
        figure.add_trace(
            go.Heatmap(
                z=values, x=[f"{each:g}×" for each in lengths], y=[f"{each:g}×" for each in rates],
                coloraxis="coloraxis", xgap=2, ygap=2,
                text=[["" if np.isnan(one) else f"{one:.0%}" for one in row] for row in values],
                texttemplate="%{text}", hoverongaps=False,
                hovertemplate=f"{name}<br>rate %{{y}}, steps %{{x}}<br><b>%{{z:.1%}}</b><extra></extra>",
            ),
            row=1, col=place + 1,
        )  # fmt: skip
    colours = reversed(_SCALE) if measure == "over_refusal" else _SCALE
    scale = list(zip((0, 0.5, 1), colours, strict=True))
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", showgrid=False)
    figure.update_layout(
        template=TEMPLATE,
        title=title(
            f"{_WORDS.get(measure, measure).capitalize()} after {scenario}", "by multiples of its rate and steps"
        ),
        coloraxis={"colorscale": scale, "cmin": 0, "cmax": 1, "colorbar": {"tickformat": ".0%", "thickness": 14}},
        xaxis_title="steps",
        yaxis_title="learning rate",
        height=200 + 46 * len(rates),
        margin={"t": 100, "b": 60},
    )
    return figure


def plot_certificate_outcome(results: "Results") -> go.Figure:
    """Draw the share of steps that raised the safety loss on their anchors against refusal, a dot per run.

    Were a held constraint all that counts, runs without a violation would lie at the top and all others below.

    Args:
        results: Results with cells under SPF.

    Raises:
        DataError: If there are none.
    """
    frame = results.to_frame()
    if "raising" not in frame or frame["raising"].isna().all():
        raise DataError("expected cells under SPF, which have a certificate, found none")
    frame = frame.dropna(subset=["raising", "refusal"])
    figure = go.Figure(layout={"template": TEMPLATE})
    kinds = (("promised and kept", True, "SPF", "circle"), ("nothing promised", False, "utility", "diamond"))
    for name, promised, colour, symbol in kinds:
        own = frame[frame["guaranteed"].astype(bool) == promised]
        figure.add_trace(
            go.Scatter(
                x=own["raising"], y=own["refusal"], name=name, mode="markers",
                marker={"color": translucent(COLOURS[colour], 0.55), "symbol": symbol, "size": 9},
                customdata=own[["arm", "scenario", "rate", "length", "seed"]].to_numpy(),
                hovertemplate=(
                    "%{customdata[0]}, %{customdata[1]}<br>rate %{customdata[2]}×, steps %{customdata[3]}×, "
                    "seed %{customdata[4]}<br>%{x:.0%} of steps raised L_s<br>refusal <b>%{y:.1%}</b><extra></extra>"
                ),
            )
        )  # fmt: skip
    figure.update_layout(
        title=title(
            "Certificate against outcome", "a dot per run: a constraint that holds is not yet a refusal that is kept"
        ),
        xaxis={
            "title": "steps that raised the anchors' loss, to first order",
            "tickformat": ".0%",
            "range": [-0.03, 1.03],
        },
        yaxis={"title": "held-out requests refused", "tickformat": ".0%", "range": [-0.03, 1.03]},
    )
    return figure


_PARTS = (
    ("drift", "measured", "safety", "solid"),
    ("first_order", "first order", "SPF", "dash"),
    ("curvature", "curvature", "utility", "dot"),
)


def plot_drift(results: "Results", *, arms: Sequence[str] | None = None) -> go.Figure:
    """Draw what the steps changed their anchors' loss by, summed up: the first-order part, curvature, and both.

    Args:
        results: Results of cells that measured curvature.
        arms: The arms drawn, a panel each; all that measured it when left out.

    Raises:
        DataError: If no cell did, or there is no such arm.
    """
    frame = results.curves()
    frame = frame[frame["curvature"].notna()] if len(frame) else frame
    if not len(frame):
        raise DataError("expected cells that measured curvature, found none; give the grid's block curvature = true")
    frame = frame.assign(drift=frame["first_order"] + frame["curvature"])
    names = _among(list(dict.fromkeys(frame["arm"])), arms)
    figure = _panels(names)
    for place, name in enumerate(names):
        for _, run in frame[frame["arm"] == name].groupby(["organism", "scenario", "rate", "length", "seed"]):
            for column, words, colour, dash in _PARTS:
                figure.add_trace(
                    go.Scatter(
                        x=run["step"], y=run[column], name=words, legendgroup=column, showlegend=False, mode="lines",
                        line={"color": COLOURS[colour], "dash": dash, "width": 2},
                        hovertemplate=f"{name}, step %{{x}}<br>{words} <b>%{{y:.3g}}</b> nats<extra></extra>",
                    ),
                    row=place // _PER_ROW + 1, col=place % _PER_ROW + 1,
                )  # fmt: skip
    for column, words, colour, dash in _PARTS:
        line = {"color": COLOURS[colour], "dash": dash, "width": 2}
        figure.add_trace(go.Scatter(x=[None], y=[None], name=words, legendgroup=column, mode="lines", line=line))
    figure.update_yaxes(zeroline=True, zerolinecolor="#8A8A8A", exponentformat="power")
    subtitle = "nats per token on each step's own anchors, summed over the steps"
    _sized(figure, names, [words for _, words, *_ in _PARTS], "What the drift is made of", subtitle, "step")
    return figure


def plot_attacks(results: "Results", *, arms: Sequence[str] | None = None) -> go.Figure:
    """Draw the share of requests that are still refused under each jailbreak, with 95 % Wilson intervals.

    Args:
        results: Results of one scenario whose cells were attacked.
        arms: The arms drawn; all that were attacked when left out.

    Raises:
        DataError: If none was, or there is no such arm.
    """
    frame = results.attacks()
    if not len(frame):
        raise DataError("expected cells that were attacked, found none; give the grid's block attacks = ['prefill', …]")
    names = _among(list(dict.fromkeys(frame["arm"])), arms)
    kinds = list(dict.fromkeys(frame["attack"]))
    shifts = np.linspace(-0.3, 0.3, len(names)) if len(names) > 1 else np.zeros(1)
    figure = go.Figure(layout={"template": TEMPLATE})
    for name, look, shift in zip(names, looks(names), shifts, strict=True):
        own = frame[frame["arm"] == name].groupby("attack", sort=False)[["refusal", "low", "high", "n"]].mean()
        figure.add_trace(
            go.Scatter(
                x=own["refusal"], y=[kinds.index(kind) + shift for kind in own.index], name=name, mode="markers",
                marker={"color": look.colour, "symbol": look.symbol, "size": 9},
                error_x={
                    "array": own["high"] - own["refusal"], "arrayminus": own["refusal"] - own["low"],
                    "thickness": 1.5, "width": 3,
                },
                customdata=own.reset_index()[["attack", "n"]].to_numpy(),
                hovertemplate=f"{name}, %{{customdata[0]}}<br><b>%{{x:.1%}}</b> of %{{customdata[1]}}<extra></extra>",
            )
        )  # fmt: skip
    for boundary in range(1, len(kinds)):
        figure.add_hline(y=boundary - 0.5, line={"color": "#E6E6E6", "width": 1})
    figure.update_layout(
        title=title("Refusal under jailbreaks", "share of held-out requests, with 95 % Wilson intervals"),
        xaxis={"title": "still refused", "range": [-0.02, 1.02], "tickformat": ".0%"},
        yaxis={
            "tickvals": list(range(len(kinds))), "ticktext": kinds, "range": [len(kinds) - 0.5, -0.5],
            "showgrid": False,
        },
        height=190 + len(kinds) * (14 + 11 * len(names)) + (room := legend_room(names)),
        margin_b=84 + room,
    )  # fmt: skip
    return figure


# ---------------------------------------------------------------------------------------------------- shared parts


def _at_own_strength(results: "Results") -> "Results":
    """Keep the scenarios' own rate and length, where there are others too."""
    strengths = {(record["cell"]["rate"], record["cell"]["length"]) for record in results.records}
    return results.where(rate=1.0, length=1.0) if len(strengths) > 1 else results


def _arms(results: "Results", arms: Sequence[str] | None) -> list[str]:
    names = _among(list(dict.fromkeys(record["cell"]["arm"] for record in results.records)), arms)
    if len(names) > _FEW_ARMS:
        raise DataError(f"expected at most {_FEW_ARMS} arms in a panel, found {len(names)}; choose some with arms=[…]")
    return names


def _among(known: list[str], arms: Sequence[str] | None) -> list[str]:
    if arms is None:
        arms = known
    if not arms or (unknown := [name for name in arms if name not in known]):
        found = ", ".join(f"'{name}'" for name in unknown) if arms else "none"
        raise DataError(f"expected arms among {', '.join(known) or 'none'}, found {found}")
    return list(arms)


def _panels(names: Sequence[str]) -> go.Figure:
    columns = min(_PER_ROW, len(names))
    rows = -(-len(names) // columns)
    return make_subplots(
        rows, columns, subplot_titles=list(names), horizontal_spacing=0.08, vertical_spacing=0.28 / rows
    )


def _legend(figure: go.Figure, names: Sequence[str]) -> None:
    """Add an entry per arm that stands in no panel, so that it has one also where the first panel lacks it."""
    for trace in _entries(names):
        figure.add_trace(trace)


def _entries(names: Sequence[str]) -> Iterator[go.Scatter]:
    for name, look in zip(names, looks(names), strict=True):
        marker = {"color": look.colour, "symbol": look.symbol, "size": 9}
        yield go.Scatter(x=[None], y=[None], name=name, legendgroup=name, mode="markers", marker=marker)


def _sized(
    figure: go.Figure, panels: Sequence[str], names: Sequence[str], text: str, subtitle: str, below: str = "utility"
) -> None:
    rows = -(-len(panels) // _PER_ROW)
    room = legend_room(names)
    figure.update_layout(
        template=TEMPLATE,
        title=title(text, subtitle),
        height=150 + 210 * rows + room,
        margin={"t": 104, "b": 90 + room},
    )
    for column in range(min(_PER_ROW, len(panels))):
        # The last panel of each column has the words.
        last = max(row for row in range(rows) if row * _PER_ROW + column < len(panels))
        figure.update_xaxes(title=below, row=last + 1, col=column + 1)
