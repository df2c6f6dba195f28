"""The figure of a measure over learning rates and numbers of steps, which shows where arms break."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from geomkit.errors import DataError
from geomkit.experiments.results import Results
from geomkit.plots.arms import chosen_arms, multiple_text, of_one_organism
from geomkit.plots.panels import Panels, panels
from geomkit.plots.style import colour_bar, title

_MEASURES = {"refusal": "refusal", "over_refusal": "over-refusal", "utility": "utility"}


def plot_breakdown(
    results: Results, scenario: str, *, arms: Sequence[str] | None = None, measure: str = "refusal"
) -> go.Figure:
    """Draw a measure over learning rates and numbers of steps, one heat map per arm, to show where an arm breaks.

    Args:
        results: Results at several rates and lengths; of several organisms the first is drawn.
        scenario: The scenario.
        arms: The arms to draw; if left out, all arms that were run at more than one strength.
        measure: ``"refusal"``, ``"over_refusal"`` or ``"utility"``.

    Returns:
        The figure: dark cells are bad, white cells were not run, and cells in which every run broke off say so.

    Raises:
        DataError: If no arm was run at more than one strength, or the scenario, an arm or the measure is unknown.
    """
    if measure not in _MEASURES:
        raise DataError(f"expected a measure among {', '.join(_MEASURES)}, found '{measure}'")
    summary = of_one_organism(results.where(scenario=scenario)).summary([measure])
    strengths = summary.groupby("arm", sort=False).size()
    if arms is None and not (strengths > 1).any():
        raise DataError(
            f"expected arms on {scenario} at several rates or lengths, found none; run some at several, or name arms="
        )
    names = chosen_arms(list(strengths.index), arms) if arms is not None else list(strengths[strengths > 1].index)
    means = summary[summary["arm"].isin(names)]
    rates, lengths = (sorted(set(means[axis])) for axis in ("rate", "length"))
    drawn = panels(names, height=46 * len(rates), shared_yaxes=True)
    figure = drawn.figure
    for number, name in enumerate(names):
        drawn.add(number, _map(name, means[means["arm"] == name], rates, lengths))
    _mark_broken(drawn, means)
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", showgrid=False)
    figure.update_layout(
        coloraxis={
            # Cividis looks the same to colour-blind readers, and its lightness alone tells the order.
            "colorscale": "Cividis",
            "reversescale": measure == "over_refusal",
            "cmin": 0,
            "cmax": 1,
            "colorbar": colour_bar(_MEASURES[measure], tickformat=".0%"),
        },
    )
    subtitle = "by multiples of the scenario's own rate and steps; dark is bad"
    heading = title(f"{_MEASURES[measure].capitalize()} after {scenario}", subtitle)
    return drawn.finished(heading, "steps", "learning rate")


def _map(name: str, means: pd.DataFrame, rates: list[float], lengths: list[float]) -> go.Heatmap:
    values, runs, broken = (
        means.pivot_table(index="rate", columns="length", values=column, dropna=False)
        .reindex(index=rates, columns=lengths)
        .to_numpy(dtype=float)
        for column in ("value", "runs", "broke")
    )
    return go.Heatmap(
        z=values,
        x=[multiple_text(length) for length in lengths],
        y=[multiple_text(rate) for rate in rates],
        name=name,
        coloraxis="coloraxis",
        xgap=2,
        ygap=2,
        hoverongaps=False,
        text=[["" if np.isnan(value) else f"{value:.0%}" for value in row] for row in values],
        texttemplate="%{text}",
        customdata=np.dstack([runs, broken]),
        hovertemplate=(
            f"{name}<br>rate %{{y}}, steps %{{x}}<br><b>%{{z:.1%}}</b>, mean of %{{customdata[0]}} runs, "
            "%{customdata[1]} broke off<extra></extra>"
        ),
    )


def _mark_broken(drawn: Panels, means: pd.DataFrame) -> None:
    """Write "broke off" into cells whose runs all broke off; a heat map leaves cells without a value white."""
    for _, row in means[(means["runs"] == 0) & (means["broke"] > 0)].iterrows():
        place = drawn.at(list(drawn.names).index(row["arm"]))
        x, y = multiple_text(row["length"]), multiple_text(row["rate"])
        drawn.figure.add_annotation(x=x, y=y, text="broke<br>off", showarrow=False, font_size=11, **place)
