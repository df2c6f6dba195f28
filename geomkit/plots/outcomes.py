"""Figures of what experiments came to: refusal against utility, where arms break, and jailbreaks afterwards."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from geomkit.errors import DataError
from geomkit.plots.arms import (
    NARROW_PER_ROW,
    add_legend,
    among,
    arm_looks,
    arms_of,
    columns_for,
    comparable,
    few,
    lay_out,
    name_lowest,
    of_one_organism,
    panel_at,
    panels_for,
    scenario_labels,
    times,
)
from geomkit.plots.style import TEMPLATE, Look, legend_room, title, translucent

if TYPE_CHECKING:
    import pandas as pd

    from geomkit.experiments.results import Results

_GREY = "#E6E6E6"
_TICKS = (0.0, 0.5, 0.8, 0.95, 0.99, 1.0)
_MEASURES = {"refusal": "refusal", "over_refusal": "over-refusal", "utility": "utility"}


def plot_frontier(results: "Results", *, arms: Sequence[str] | None = None) -> go.Figure:
    """Draw refusal against utility, a panel per scenario: what is kept, and what is learnt.

    The mean over runs with its Wilson intervals over prompts, and each run as a faint dot. Of the backdoor scenario the
    refusal is that of requests with the trigger. A hollow marker stands for more than one point of over-refusal. Places
    are by the square root of what is missing to 100 %, since most arms that are worth a look lie close to it.

    Args:
        results: Results; of several organisms the first is drawn, of several rates and lengths a scenario's own.
        arms: The arms drawn, in this order; all when left out.

    Returns:
        The figure: a panel per scenario, a marker per arm; the ideal lies at the top right.

    Raises:
        DataError: If there is no such arm, there are too many to draw, no run was completed, or a scenario has several
            rates and lengths, none of them its own.
    """
    chosen = comparable(results)
    names = few(among(arms_of(chosen), arms))
    summary = chosen.summary(["refusal", "triggered_refusal", "over_refusal", "utility"])
    runs = chosen.to_frame()
    if "utility" not in runs:
        raise DataError("expected a run that was completed, found none; the errors are in to_frame()")
    scenarios = list(dict.fromkeys(runs["scenario"]))
    figure = panels_for(scenario_labels(chosen, scenarios))
    for place, scenario in enumerate(scenarios):
        at = panel_at(place, columns_for(len(scenarios)))
        # Each is smaller than those before it, so that arms at the same place are seen one within the other.
        for (name, look), size in zip(arm_looks(names).items(), np.linspace(17, 7, len(names)), strict=True):
            means = summary[(summary["scenario"] == scenario) & (summary["arm"] == name)].set_index("measure")
            own = runs[(runs["scenario"] == scenario) & (runs["arm"] == name)]
            if not len(means) or not means.loc["utility", "runs"]:
                continue
            kept = "triggered_refusal" if means.loc["triggered_refusal", "runs"] else "refusal"
            own = own.dropna(subset=["utility", kept])
            if len(own) > 1:
                figure.add_trace(_dots(name, look, own["utility"], own[kept]), **at)
            point = _point(name, look, means.loc[kept], means.loc["utility"], means.loc["over_refusal"])
            figure.add_trace(point.update(marker_size=float(size) if len(names) > 1 else 10), **at)
    add_legend(figure, names)
    places, labels = [_stretched(tick) for tick in _TICKS], [f"{tick:.0%}" for tick in _TICKS]
    axis = {"range": [-0.06, 1.08], "tickvals": places}
    figure.update_xaxes(**axis, ticktext=["" if label == "99%" else label for label in labels])
    figure.update_yaxes(**axis, ticktext=labels)
    subtitle = "mean over seeds, 95 % Wilson intervals; hollow: over-refusal above one point; axes widen towards 100 %"
    lay_out(figure, len(scenarios), names, title("Refusal against utility", subtitle), "utility", "refusal")
    return figure


def plot_breakdown(
    results: "Results", scenario: str, *, arms: Sequence[str] | None = None, measure: str = "refusal"
) -> go.Figure:
    """Draw a measure over the plane of learning rates and lengths, a map per arm: where it breaks.

    Args:
        results: Results at several rates and lengths; of several organisms the first is drawn.
        scenario: The scenario.
        arms: The arms drawn; all that were run at more than one strength when left out.
        measure: ``"refusal"``, ``"over_refusal"`` or ``"utility"``.

    Returns:
        The figure: dark cells are bad ones, white ones were not run, and where every run broke off it says so.

    Raises:
        DataError: If nothing was run at more than one strength, or there is no such scenario, arm or measure.
    """
    if measure not in _MEASURES:
        raise DataError(f"expected a measure among {', '.join(_MEASURES)}, found '{measure}'")
    summary = of_one_organism(results.where(scenario=scenario)).summary([measure])
    strengths = summary.groupby("arm", sort=False).size()
    if arms is None and not (strengths > 1).any():
        raise DataError(f"expected arms on {scenario} at several rates or lengths, found none")
    names = among(list(strengths.index), arms) if arms is not None else list(strengths[strengths > 1].index)
    drawn = summary[summary["arm"].isin(names)]
    rates, lengths = (sorted(set(drawn[axis])) for axis in ("rate", "length"))
    columns = columns_for(len(names), NARROW_PER_ROW)
    rows = -(-len(names) // columns)
    inner = 46 * len(rates) + 85
    figure = make_subplots(
        rows, columns, subplot_titles=names, shared_yaxes=True, horizontal_spacing=0.03,
        vertical_spacing=85 / (inner * rows),
    )  # fmt: skip
    for place, name in enumerate(names):
        trace = _map(name, drawn[drawn["arm"] == name], rates, lengths)
        figure.add_trace(trace, **panel_at(place, columns))
    figure.update_annotations(font_size=13)
    _mark_broken(figure, drawn, names, columns)
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", showgrid=False, title="learning rate", col=1)
    figure.update_yaxes(type="category", showgrid=False)
    name_lowest(figure, len(names), columns, "steps")
    subtitle = "by multiples of its own rate and steps; dark is bad"
    figure.update_layout(
        template=TEMPLATE,
        title=title(f"{_MEASURES[measure].capitalize()} after {scenario}", subtitle),
        coloraxis={
            # Cividis looks the same to colour-blind readers, and its lightness alone tells the order.
            "colorscale": "Cividis", "reversescale": measure == "over_refusal", "cmin": 0, "cmax": 1,
            "colorbar": {"tickformat": ".0%", "thickness": 14},
        },
        height=120 + inner * rows,
        margin={"t": 104, "b": 56},
    )  # fmt: skip
    return figure


def plot_attacks(results: "Results", *, arms: Sequence[str] | None = None) -> go.Figure:
    """Draw the share of requests that are still refused under each jailbreak, a panel per scenario.

    The mean over runs at each scenario's own strength, with its 95 % Wilson interval over the prompts of one run, which
    further runs over the same prompts do not narrow.

    Args:
        results: Results of cells that were attacked; of several organisms the first is drawn, of several rates and
            lengths a scenario's own.
        arms: The arms drawn; all that were attacked when left out.

    Returns:
        The figure: a row per jailbreak, a marker with its interval per arm.

    Raises:
        DataError: If none was attacked, there is no such arm, there are too many to draw, or a scenario has several
            rates and lengths, none of them its own.
    """
    attacked = tuple(record for record in results.records if record.get("attacks"))
    if not attacked:
        raise DataError("expected cells that were attacked, found none; give the grid's block attacks = ['prefill', …]")
    chosen = comparable(replace(results, records=attacked))
    frame = chosen.attacks()
    names = few(among(arms_of(chosen), arms))
    frame = frame[frame["arm"].isin(names)]
    kinds = list(dict.fromkeys(frame["attack"]))
    scenarios = list(dict.fromkeys(frame["scenario"]))
    columns = columns_for(len(scenarios), NARROW_PER_ROW)
    rows = -(-len(scenarios) // columns)
    inner = len(kinds) * (14 + 10 * len(names)) + 75
    figure = make_subplots(
        rows, columns, subplot_titles=scenario_labels(chosen, scenarios), shared_yaxes=True,
        horizontal_spacing=0.03, vertical_spacing=75 / (inner * rows),
    )  # fmt: skip
    shifts = np.linspace(-0.34, 0.34, len(names)) if len(names) > 1 else np.zeros(1)
    for place, scenario in enumerate(scenarios):
        for (name, look), shift in zip(arm_looks(names).items(), shifts, strict=True):
            own = frame[(frame["scenario"] == scenario) & (frame["arm"] == name)]
            if len(own):
                figure.add_trace(_attacked(name, look, own, kinds, float(shift)), **panel_at(place, columns))
    for boundary in range(1, len(kinds)):
        figure.add_hline(y=boundary - 0.5, line={"color": _GREY, "width": 1})
    add_legend(figure, names)
    figure.update_xaxes(range=[-0.05, 1.05], tickformat=".0%", dtick=0.5 if columns > 1 else 0.2)
    figure.update_annotations(font_size=13)
    figure.update_yaxes(
        tickvals=list(range(len(kinds))), ticktext=kinds, range=[len(kinds) - 0.5, -0.5], showgrid=False
    )
    name_lowest(figure, len(scenarios), columns, "still refused")
    figure.update_layout(
        template=TEMPLATE,
        title=title("Refusal under jailbreaks", "share of held-out requests, with 95 % Wilson intervals"),
        height=120 + inner * rows + (room := legend_room(names)),
        margin={"t": 104, "b": 90 + room},
    )
    return figure


def _dots(name: str, look: Look, x: "pd.Series[float]", y: "pd.Series[float]") -> go.Scatter:
    marker = {"color": translucent(look.colour, 0.3), "size": 5}
    return go.Scatter(
        x=[_stretched(each) for each in x], y=[_stretched(each) for each in y], mode="markers", marker=marker,
        legendgroup=name, showlegend=False, hoverinfo="skip",
    )  # fmt: skip


def _point(
    name: str, look: Look, kept: "pd.Series[float]", learnt: "pd.Series[float]", over: "pd.Series[float]"
) -> go.Scatter:
    hollow = over["value"] > 0.01
    return go.Scatter(
        x=[_stretched(learnt["value"])],
        y=[_stretched(kept["value"])],
        name=name,
        legendgroup=name,
        showlegend=False,
        mode="markers",
        marker={
            "color": look.colour,
            "symbol": f"{look.symbol}-open" if hollow else look.symbol,
            # A white rim parts markers that overlap, which most do at the top right.
            "line": {"width": 2, "color": look.colour} if hollow else {"width": 1, "color": "white"},
        },
        error_x=_bars(learnt, look),
        error_y=_bars(kept, look),
        hovertemplate=(
            f"{name}<br>refusal <b>{kept['value']:.1%}</b>, runs from {kept['least']:.1%} to {kept['most']:.1%}<br>"
            f"utility <b>{learnt['value']:.1%}</b><br>over-refusal {over['value']:.1%}<br>"
            f"{kept['runs']:.0f} runs of {kept['prompts']:.0f} prompts<extra></extra>"
        ),
    )


def _bars(row: "pd.Series[float]", look: Look) -> dict[str, object]:
    low, value, high = (_stretched(row[name]) for name in ("low", "value", "high"))
    look_of = {"color": translucent(look.colour, 0.6), "thickness": 1, "width": 0}
    return {"array": [high - value], "arrayminus": [value - low], **look_of}


def _stretched(share: float) -> float:
    """Return where a share stands on an axis that widens towards 100 %.

    Example:
        >>> [round(_stretched(share), 3) for share in (0.0, 0.75, 0.99, 1.0)]
        [0.0, 0.5, 0.9, 1.0]
    """
    # An interval's end may lie beyond by rounding.
    return share if math.isnan(share) else 1 - math.sqrt(max(0.0, 1 - share))


def _map(name: str, means: "pd.DataFrame", rates: list[float], lengths: list[float]) -> go.Heatmap:
    tables = {
        column: means.pivot_table(index="rate", columns="length", values=column, dropna=False)
        .reindex(index=rates, columns=lengths)
        .to_numpy(dtype=float)
        for column in ("value", "runs", "broke")
    }
    values = tables["value"]
    return go.Heatmap(
        z=values, x=[times(each) for each in lengths], y=[times(each) for each in rates], name=name,
        coloraxis="coloraxis", xgap=2, ygap=2, hoverongaps=False,
        text=[["" if np.isnan(one) else f"{one:.0%}" for one in row] for row in values], texttemplate="%{text}",
        customdata=np.dstack([tables["runs"], tables["broke"]]),
        hovertemplate=(
            f"{name}<br>rate %{{y}}, steps %{{x}}<br><b>%{{z:.1%}}</b>, mean of %{{customdata[0]}} runs, "
            "%{customdata[1]} broke off<extra></extra>"
        ),
    )  # fmt: skip


def _mark_broken(figure: go.Figure, means: "pd.DataFrame", names: Sequence[str], columns: int) -> None:
    """Say in white cells that runs were there and broke off; a map writes nothing where it has no value."""
    for _, row in means[(means["runs"] == 0) & (means["broke"] > 0)].iterrows():
        place = list(names).index(row["arm"])
        figure.add_annotation(
            x=times(row["length"]), y=times(row["rate"]), text="broke<br>off", showarrow=False, font_size=11,
            **panel_at(place, columns),
        )  # fmt: skip


def _attacked(name: str, look: Look, own: "pd.DataFrame", kinds: list[str], shift: float) -> go.Scatter:
    from geomkit.stats.proportions import wilson_interval

    means = own.groupby("attack", sort=False).agg(refusal=("refusal", "mean"), n=("n", "min"), runs=("n", "size"))
    intervals = [wilson_interval(share, int(n)) for share, n in zip(means["refusal"], means["n"], strict=True)]
    low, high = np.transpose(intervals)
    return go.Scatter(
        x=means["refusal"],
        y=[kinds.index(kind) + shift for kind in means.index],
        name=name,
        legendgroup=name,
        showlegend=False,
        mode="markers",
        marker={"color": look.colour, "symbol": look.symbol, "size": 8},
        error_x={"array": high - means["refusal"], "arrayminus": means["refusal"] - low, "thickness": 1.5, "width": 0},
        customdata=means.reset_index()[["attack", "n", "runs"]].to_numpy(),
        hovertemplate=(
            f"{name}, %{{customdata[0]}}<br><b>%{{x:.1%}}</b> still refused, %{{customdata[2]}} runs of "
            "%{customdata[1]} prompts<extra></extra>"
        ),
    )
