"""Arms in figures of experiments: which arms and which cells are drawn, and how each arm looks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import plotly.graph_objects as go

from geomkit.errors import DataError
from geomkit.experiments.results import Results
from geomkit.plots.style import Look
from geomkit.plots.themes import COLOURS, palette
from geomkit.plots.traces import LEGEND_ONLY

FEW_ARMS = 9
"""The most arms that fit into one panel."""


def _fixed_looks() -> dict[str, Look]:
    """Return the fixed looks of frequent arms, which are the same in all figures, whichever other arms are drawn."""
    return {
        "untouched": Look(palette().others[0], "solid", "circle"),
        "SFT": Look(COLOURS["SFT"], "dash", "square"),
        "mixing": Look(palette().others[2], "dashdot", "diamond"),
        "mixing + benign": Look(palette().frame, "dot", "pentagon"),
        "paper": Look(COLOURS["utility"], "longdash", "x"),
        "rank1": Look(COLOURS["SPF"], "solid", "triangle-up"),
        "mixing, 2048": Look(palette().others[5], "longdashdot", "diamond-wide"),
        "mixed-left": Look(COLOURS["safety"], "dot", "cross"),
        "mixed-left, 2048": Look(COLOURS["safety"], "dashdot", "star"),
        "kl-left, 2048": Look(COLOURS["safety"], "longdash", "hexagram"),
        "adaptive-kl-left": Look(COLOURS["safety"], "solid", "star-diamond"),
        "adaptive-kl-left, 2048": Look(COLOURS["safety"], "solid", "star-diamond"),
        "left": Look(COLOURS["control"], "dashdot", "triangle-down"),
        "left + fence": Look(palette().others[1], "longdash", "hourglass"),
    }


def spare_look() -> Look:
    """Return the look of arms without a fixed look when all fixed looks are taken."""
    return Look(COLOURS["null"], "dot", "hexagon")


_OWN_STRENGTH = (1.0, 1.0)
"""The rate and the length of a scenario's own strength, as multiples of the values in its definition."""


# ------------------------------------------------------------------------------------------- which cells and arms


def of_one_organism(results: Results) -> Results:
    """Return the cells of the first organism: prompts differ between organisms, so a panel shows a single organism."""
    return results.where(organism=results.records[0]["cell"]["organism"]) if results.records else results


def comparable(results: Results) -> Results:
    """Return the cells of one organism, at one rate and length per scenario.

    A scenario's cells are the cells at its own rate and length, or, without such cells, at its only other strength.

    Raises:
        DataError: If a scenario has several strengths, none of them its own.
    """
    results = of_one_organism(results)
    strengths = _strengths(results)
    for scenario, present in strengths.items():
        if len(present) > 1 and _OWN_STRENGTH not in present:
            several = ", ".join(f"({rate:g}, {length:g})" for rate, length in present)
            raise DataError(
                f"{scenario}: expected cells at one rate and length, or at the scenario's own, found {several}; choose "
                "with results.where(rate=…, length=…)"
            )
    records = tuple(
        record
        for record in results.records
        for cell in [record["cell"]]
        if (cell["rate"], cell["length"]) == _OWN_STRENGTH or _OWN_STRENGTH not in strengths[cell["scenario"]]
    )
    return replace(results, records=records)


def scenario_labels(results: Results, scenarios: Sequence[str]) -> list[str]:
    """Return the label of each scenario: its name, with its strength in the results unless that is its own."""
    strengths = _strengths(results)
    return [at_strength(scenario, *strengths[scenario][0]) for scenario in scenarios]


def _strengths(results: Results) -> dict[str, list[tuple[float, float]]]:
    """Return the rates and lengths of each scenario, in the order of the records."""
    strengths: dict[str, dict[tuple[float, float], None]] = {}
    for record in results.records:
        cell = record["cell"]
        strengths.setdefault(cell["scenario"], {})[cell["rate"], cell["length"]] = None
    return {scenario: list(present) for scenario, present in strengths.items()}


def at_strength(scenario: str, rate: float, length: float) -> str:
    """Return the name of a scenario, with its rate and length unless both are the scenario's own.

    Example:
        >>> at_strength("poison-10", 1.0, 1.0), at_strength("poison-10", 4.0, 0.1)
        ('poison-10', 'poison-10, rate 4×, steps 0.1×')
    """
    if (rate, length) == _OWN_STRENGTH:
        return scenario
    return f"{scenario}, rate {multiple_text(rate)}, steps {multiple_text(length)}"


def multiple_text(multiple: float) -> str:
    """Return a multiple as text, such as ``"4×"``."""
    return f"{multiple:g}×"


def arms_of(results: Results) -> list[str]:
    """Return the names of the arms in the order of the records."""
    return list(dict.fromkeys(record["cell"]["arm"] for record in results.records))


def chosen_arms(all_arms: list[str], arms: Sequence[str] | None) -> list[str]:
    """Return the chosen arms without duplicates, or all arms if ``arms`` is ``None``.

    Raises:
        DataError: If no arm is chosen, or an arm is not known.
    """
    if arms is None:
        return all_arms
    if not arms:
        raise DataError(
            f"expected at least one arm among {', '.join(all_arms)}, found none; name some, or leave arms= out"
        )
    if unknown := [name for name in arms if name not in all_arms]:
        raise DataError(f"expected arms among {', '.join(all_arms)}, found {', '.join(map(repr, unknown))}")
    return list(dict.fromkeys(arms))


def at_most_nine(names: list[str]) -> list[str]:
    """Return the names of arms unchanged, if there are at most :data:`FEW_ARMS`.

    Raises:
        DataError: If there are more arms than a panel can show.
    """
    if len(names) > FEW_ARMS:
        raise DataError(f"expected at most {FEW_ARMS} arms in a panel, found {len(names)}; choose some with arms=[…]")
    return names


# ---------------------------------------------------------------------------------------------------------- looks


def arm_looks(names: Sequence[str]) -> dict[str, Look]:
    """Return the look of each arm: its fixed look if it has one, else the next look that no arm in ``names`` has."""
    fixed = _fixed_looks()
    free = [look for name, look in fixed.items() if name not in names] + [spare_look()]
    unnamed = [name for name in names if name not in fixed]
    drawn = {name: free[number % len(free)] for number, name in enumerate(unnamed)}
    return {name: fixed.get(name) or drawn[name] for name in names}


def add_legend(
    figure: go.Figure, names: Sequence[str], mode: str = "markers", looks_of: Mapping[str, Look] | None = None
) -> None:
    """Add a legend entry for each arm, independent of the panels, since the first panel may lack an arm.

    Args:
        figure: The figure.
        names: The arms.
        mode: Plotly's mode of the entries.
        looks_of: The look of each arm; :func:`arm_looks` if left out.
    """
    for name, look in (looks_of or arm_looks(names)).items():
        figure.add_trace(
            go.Scatter(
                **LEGEND_ONLY,
                name=name,
                legendgroup=name,
                mode=mode,
                marker={"color": look.colour, "symbol": look.symbol, "size": 9},
                line={"color": look.colour, "dash": look.dash, "width": 2},
            )
        )
