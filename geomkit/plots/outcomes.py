"""Figures of outcomes of experiments: refusal against utility, and refusal under jailbreaks."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from geomkit.errors import DataError
from geomkit.experiments.results import Results
from geomkit.plots.arms import (
    add_legend,
    arm_looks,
    arms_of,
    at_most_nine,
    chosen_arms,
    comparable,
    scenario_labels,
)
from geomkit.plots.axes import name_rows
from geomkit.plots.insets import add_inset
from geomkit.plots.panels import panels, wide_panels
from geomkit.plots.style import Look, title, translucent
from geomkit.plots.themes import palette
from geomkit.plots.traces import error_bars, side_by_side
from geomkit.stats.proportions import wilson_interval

_UNTRAINED = "untouched"
_TICKS = (0.0, 0.5, 0.8, 0.95, 0.99, 1.0)
"""Shares that are marked along the axes of refusal against utility."""


def plot_frontier(results: Results, *, arms: Sequence[str] | None = None) -> go.Figure:
    """Draw refusal against utility after fine-tuning, one panel per scenario.

    A marker shows the mean over an arm's runs with Wilson intervals over prompts, and a faint dot each run. In the
    backdoor scenario, refusal is the refusal of requests with the trigger. A hollow marker means more than one point of
    over-refusal. A share p is placed at 1 − √(1 − p), which spreads the arms that lie close to 100 %.

    Args:
        results: Results. Of several organisms the first is drawn; of several rates and lengths, each scenario's own.
        arms: The arms to draw, in this order; if left out, all arms.

    Returns:
        The figure: a panel per scenario with a marker per arm; the ideal lies at the top right. Where three or more
        arms lie on one spot, an inset has them side by side, at their refusal. Scenarios in which no arm was trained
        are left out.

    Raises:
        DataError: If an arm is unknown, there are too many arms to draw, no run was completed, or a scenario has
            several rates and lengths, none of them its own.
    """
    results = comparable(results)
    names = at_most_nine(chosen_arms(arms_of(results), arms))
    summary = results.summary(["refusal", "triggered_refusal", "over_refusal", "utility"])
    runs = results.to_frame()
    if "utility" not in runs:
        raise DataError("expected a run that was completed, found none; the errors are in to_frame()")
    chosen = runs[runs["arm"].isin(names)]
    scenarios = list(dict.fromkeys(chosen.loc[chosen["arm"] != _UNTRAINED, "scenario"])) or list(
        dict.fromkeys(runs["scenario"])
    )
    drawn = wide_panels(scenario_labels(results, scenarios))
    spots: dict[int, list[go.Scatter]] = {}
    # Markers become smaller from arm to arm, so that a marker is visible inside the marker of an earlier arm.
    sizes = np.linspace(17, 7, len(names)) if len(names) > 1 else [10]
    for number, scenario in enumerate(scenarios):
        for (name, look), size in zip(arm_looks(names).items(), sizes, strict=True):
            means = summary[(summary["scenario"] == scenario) & (summary["arm"] == name)].set_index("measure")
            rows = runs[(runs["scenario"] == scenario) & (runs["arm"] == name)]
            if not len(means) or not means.loc["utility", "runs"]:
                continue
            refusal = "triggered_refusal" if means.loc["triggered_refusal", "runs"] else "refusal"
            rows = rows.dropna(subset=["utility", refusal])
            if len(rows) > 1:
                drawn.add(number, _dots(name, look, rows["utility"], rows[refusal]))
            point = _mean(name, look, means.loc[refusal], means.loc["utility"], means.loc["over_refusal"])
            spots.setdefault(number, []).append(point.update(marker_size=float(size)))
            drawn.add(number, point)
    add_legend(drawn.figure, names)
    labels = [f"{tick:.0%}" for tick in _TICKS]
    axis = {"range": [-0.06, 1.08], "tickvals": [_stretched(tick) for tick in _TICKS], "tickangle": 0}
    along = ["" if label in {"95%", "99%"} else label for label in labels]
    drawn.figure.update_xaxes(**axis, ticktext=along, tickfont_size=11)
    drawn.figure.update_yaxes(**axis, ticktext=labels)
    subtitle = "mean over seeds, 95 % Wilson intervals; hollow: over-refusal above one point; axes widen towards 100 %"
    subtitle += "; insets: the arms in a dotted frame side by side"
    figure = drawn.finished(title("Refusal against utility", subtitle), "utility", "refusal")
    for number, points in spots.items():
        add_inset(figure, drawn.at(number), points)
    return figure


def plot_attacks(results: Results, *, arms: Sequence[str] | None = None) -> go.Figure:
    """Draw the share of requests that are still refused under each jailbreak, one panel per scenario.

    A marker shows the mean over runs at the scenario's own strength, with the 95 % Wilson interval over the prompts of
    one run; further runs over the same prompts do not make the interval narrower.

    Args:
        results: Results of cells that were attacked. Of several organisms the first is drawn; of several rates and
            lengths, each scenario's own.
        arms: The arms to draw; if left out, all arms that were attacked.

    Returns:
        The figure: a row per jailbreak, with a marker and its interval per arm.

    Raises:
        DataError: If no cell was attacked, an arm is unknown, there are too many arms to draw, or a scenario has
            several rates and lengths, none of them its own.
    """
    attacked = tuple(record for record in results.records if record.get("attacks"))
    if not attacked:
        raise DataError("expected cells that were attacked, found none; give the grid's block attacks = ['prefill', …]")
    results = comparable(replace(results, records=attacked))
    frame = results.attacks()
    names = at_most_nine(chosen_arms(arms_of(results), arms))
    frame = frame[frame["arm"].isin(names)]
    attacks = list(dict.fromkeys(frame["attack"]))
    scenarios = list(dict.fromkeys(frame["scenario"]))
    inner = len(attacks) * (14 + 10 * len(names))
    drawn = panels(scenario_labels(results, scenarios), height=inner, shared_yaxes=True)
    figure = drawn.figure
    for number, scenario in enumerate(scenarios):
        shifts = side_by_side(len(names), 0.68)
        for (name, look), shift in zip(arm_looks(names).items(), shifts, strict=True):
            rows = frame[(frame["scenario"] == scenario) & (frame["arm"] == name)]
            if len(rows):
                drawn.add(number, _attacked(name, look, rows, attacks, float(shift)))
    name_rows(figure, attacks)
    add_legend(figure, names)
    figure.update_xaxes(range=[-0.05, 1.05], tickformat=".0%", dtick=0.5 if drawn.columns > 1 else 0.2)
    heading = title("Refusal under jailbreaks", "share of held-out requests, with 95 % Wilson intervals")
    return drawn.finished(heading, "still refused", "")


# ------------------------------------------------------------------------------------------------ refusal and utility


def _stretched(share: float) -> float:
    """Return the place 1 − √(1 − p) of a share p on an axis that widens towards 100 %.

    Example:
        >>> [round(_stretched(share), 3) for share in (0.0, 0.75, 0.99, 1.0)]
        [0.0, 0.5, 0.9, 1.0]
    """
    # The end of an interval may lie beyond 1 by rounding.
    return share if math.isnan(share) else 1 - math.sqrt(max(0.0, 1 - share))


def _dots(name: str, look: Look, utility: "pd.Series[float]", refusal: "pd.Series[float]") -> go.Scatter:
    return go.Scatter(
        x=[_stretched(share) for share in utility],
        y=[_stretched(share) for share in refusal],
        mode="markers",
        marker={"color": translucent(look.colour, 0.3), "size": 5},
        legendgroup=name,
        showlegend=False,
        hoverinfo="skip",
    )


def _mean(
    name: str, look: Look, refusal: "pd.Series[float]", utility: "pd.Series[float]", over: "pd.Series[float]"
) -> go.Scatter:
    hollow = over["value"] > 0.01
    return go.Scatter(
        x=[_stretched(utility["value"])],
        y=[_stretched(refusal["value"])],
        name=name,
        legendgroup=name,
        showlegend=False,
        mode="markers",
        marker={
            "color": look.colour,
            "symbol": f"{look.symbol}-open" if hollow else look.symbol,
            # A white rim separates markers that overlap, as most do at the top right.
            "line": {"width": 2, "color": look.colour} if hollow else {"width": 1, "color": palette().paper},
        },
        error_x=_interval(utility, look),
        error_y=_interval(refusal, look),
        hovertemplate=(
            f"{name}<br>refusal <b>{refusal['value']:.1%}</b>, runs from {refusal['least']:.1%} to "
            f"{refusal['most']:.1%}<br>utility <b>{utility['value']:.1%}</b><br>over-refusal {over['value']:.1%}<br>"
            f"{refusal['runs']:.0f} runs of {refusal['prompts']:.0f} prompts<extra></extra>"
        ),
    )


def _interval(row: "pd.Series[float]", look: Look) -> dict[str, object]:
    value, low, high = (_stretched(row[column]) for column in ("value", "low", "high"))
    return error_bars(value, low, high, color=translucent(look.colour, 0.6), thickness=1)


# ------------------------------------------------------------------------------------------- under jailbreak attacks


def _attacked(name: str, look: Look, rows: pd.DataFrame, attacks: list[str], shift: float) -> go.Scatter:
    means = rows.groupby("attack", sort=False).agg(refusal=("refusal", "mean"), n=("n", "min"), runs=("n", "size"))
    low, high = np.transpose(
        [wilson_interval(share, int(n)) for share, n in zip(means["refusal"], means["n"], strict=True)]
    )
    return go.Scatter(
        x=means["refusal"],
        y=[attacks.index(attack) + shift for attack in means.index],
        name=name,
        legendgroup=name,
        showlegend=False,
        mode="markers",
        marker={"color": look.colour, "symbol": look.symbol, "size": 8},
        error_x=error_bars(means["refusal"], low, high, thickness=1.5),
        customdata=means.reset_index()[["attack", "n", "runs"]].to_numpy(),
        hovertemplate=(
            f"{name}, %{{customdata[0]}}<br><b>%{{x:.1%}}</b> still refused, %{{customdata[2]}} runs of "
            "%{customdata[1]} prompts<extra></extra>"
        ),
    )
