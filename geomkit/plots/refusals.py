"""The figure of refusals after fine-tuning: of forbidden requests against benign ones."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from geomkit.errors import DataError
from geomkit.experiments.results import Results
from geomkit.plots.arms import add_legend, arm_looks, arms_of, at_most_nine, chosen_arms, comparable, scenario_labels
from geomkit.plots.panels import wide_panels
from geomkit.plots.style import Look, title, translucent
from geomkit.plots.themes import palette
from geomkit.plots.traces import error_bars

if TYPE_CHECKING:
    import pandas as pd


def plot_refusals(results: Results, *, arms: Sequence[str] | None = None) -> go.Figure:
    """Draw the refusal of forbidden requests against the refusal of benign ones, one panel per scenario.

    A marker shows the mean over an arm's runs with Wilson intervals over prompts. In the backdoor scenario, refusal is
    the refusal of requests with the trigger. A fine-tune that preserves safety stays where the untouched model is, at
    the top left: down is lost refusals, to the right is over-refusal.

    Args:
        results: Results. Of several organisms the first is drawn; of several rates and lengths, each scenario's own.
        arms: The arms to draw, in this order; if left out, all arms.

    Returns:
        The figure: a panel per scenario with a marker per arm.

    Raises:
        DataError: If an arm is unknown, there are too many arms to draw, no run was completed, or a scenario has
            several rates and lengths, none of them its own.
    """
    results = comparable(results)
    names = at_most_nine(chosen_arms(arms_of(results), arms))
    summary = results.summary(["refusal", "triggered_refusal", "over_refusal"])
    summary = summary[summary["arm"].isin(names) & (summary["runs"] > 0)]
    if not len(summary):
        raise DataError("expected a run that was completed, found none; the errors are in to_frame()")
    scenarios = list(dict.fromkeys(summary["scenario"]))
    drawn = wide_panels(scenario_labels(results, scenarios))
    for number, scenario in enumerate(scenarios):
        # Markers become smaller from arm to arm, so that a marker is visible inside the marker of an earlier arm.
        sizes = np.linspace(16, 8, len(names)) if len(names) > 1 else [10]
        for (name, look), size in zip(arm_looks(names).items(), sizes, strict=True):
            means = summary[(summary["scenario"] == scenario) & (summary["arm"] == name)].set_index("measure")
            if len(means):
                refusal = "triggered_refusal" if "triggered_refusal" in means.index else "refusal"
                drawn.add(number, _mean(name, look, size, means.loc[refusal], means.loc["over_refusal"]))
    add_legend(drawn.figure, names)
    axis = {"range": [-0.04, 1.04], "tickformat": ".0%", "dtick": 0.25}
    drawn.figure.update_xaxes(**axis)
    drawn.figure.update_yaxes(**axis)
    heading = title("Refusals after fine-tuning", "mean over seeds, with 95 % Wilson intervals over prompts")
    return drawn.finished(heading, "benign requests refused", "forbidden requests refused")


def _mean(name: str, look: Look, size: float, refusal: "pd.Series[float]", over: "pd.Series[float]") -> go.Scatter:
    return go.Scatter(
        x=[over["value"]],
        y=[refusal["value"]],
        name=name,
        legendgroup=name,
        showlegend=False,
        mode="markers",
        marker={
            "color": look.colour, "symbol": look.symbol, "size": size, "line": {"width": 1, "color": palette().paper},
        },
        error_x=_interval(over, look),
        error_y=_interval(refusal, look),
        hovertemplate=(
            f"{name}<br>forbidden requests refused: <b>{refusal['value']:.1%}</b><br>benign requests refused: "
            f"<b>{over['value']:.1%}</b><br>{refusal['runs']:.0f} runs of {refusal['prompts']:.0f} prompts"
            "<extra></extra>"
        ),
    )  # fmt: skip


def _interval(row: "pd.Series[float]", look: Look) -> dict[str, object]:
    return error_bars(row["value"], row["low"], row["high"], color=translucent(look.colour, 0.6), thickness=1)
