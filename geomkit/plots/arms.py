"""What figures of experiments share: which arms and strengths are drawn, how arms look, where panels stand."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from geomkit.errors import DataError
from geomkit.plots.style import COLOURS, TEMPLATE, Look, legend_room

if TYPE_CHECKING:
    from geomkit.experiments.results import Results

_PER_ROW = 3
NARROW_PER_ROW = 4
FEW_ARMS = 9
"""More arms than this do not fit into one panel; the caller chooses some then."""

_LOOKS: Mapping[str, Look] = MappingProxyType(
    {
        "untouched": Look("#444444", "solid", "circle"),
        "SFT": Look(COLOURS["SFT"], "dash", "square"),
        "mixing": Look("#E69F00", "dashdot", "diamond"),
        "mixing + benign": Look("#8A8A8A", "dot", "pentagon"),
        "paper": Look(COLOURS["utility"], "longdash", "x"),
        "rank1": Look(COLOURS["SPF"], "solid", "triangle-up"),
        "mixing, 2048": Look("#7A5C00", "longdashdot", "diamond-wide"),
        "mixed-left": Look(COLOURS["safety"], "dot", "cross"),
        "mixed-left, 2048": Look(COLOURS["safety"], "solid", "star"),
        "left": Look(COLOURS["control"], "dashdot", "triangle-down"),
        "left + fence": Look("#56B4E9", "longdash", "hourglass"),
    }
)
"""Of arms that are drawn often, so that they look alike in all figures, whichever others stand beside them."""

SPARE = Look(COLOURS["null"], "dot", "hexagon")
"""Of arms that have no look of their own."""

LEGEND_ONLY = {"x": [None], "y": [None], "hoverinfo": "skip"}
"""Of a trace that has an entry in the legend and nothing in a panel."""


def of_one_organism(results: "Results") -> "Results":
    """Keep the first organism's cells: prompts differ between organisms, so no panel shows two."""
    return results.where(organism=results.records[0]["cell"]["organism"]) if results.records else results


def comparable(results: "Results") -> "Results":
    """Keep one organism, and each scenario's own rate and length where there are others, else a single other one."""
    results = of_one_organism(results)
    strengths = _strengths(results)
    own = (1.0, 1.0)
    for scenario, found in strengths.items():
        if len(found) > 1 and own not in found:
            several = ", ".join(f"({rate:g}, {length:g})" for rate, length in found)
            raise DataError(
                f"{scenario}: expected cells at one rate and length, or at the scenario's own, found {several}; choose "
                "with results.where(rate=…, length=…)"
            )
    kept = tuple(
        record
        for record in results.records
        for cell in [record["cell"]]
        if (cell["rate"], cell["length"]) == own or own not in strengths[cell["scenario"]]
    )
    return replace(results, records=kept)


def _strengths(results: "Results") -> dict[str, list[tuple[float, float]]]:
    found: dict[str, dict[tuple[float, float], None]] = {}
    for record in results.records:
        cell = record["cell"]
        found.setdefault(cell["scenario"], {})[cell["rate"], cell["length"]] = None
    return {scenario: list(each) for scenario, each in found.items()}


def scenario_labels(results: "Results", scenarios: Sequence[str]) -> list[str]:
    """Return the label of each scenario: its name, and its strength where the results have another than 1 × 1."""
    strengths = _strengths(results)
    return [at_strength(scenario, *strengths[scenario][0]) for scenario in scenarios]


def at_strength(scenario: str, rate: float, length: float) -> str:
    """Name a scenario, and its strength where that is not its own.

    Example:
        >>> at_strength("poison-10", 1.0, 1.0), at_strength("poison-10", 4.0, 0.1)
        ('poison-10', 'poison-10, rate 4×, steps 0.1×')
    """
    return scenario if (rate, length) == (1.0, 1.0) else f"{scenario}, rate {times(rate)}, steps {times(length)}"


def times(multiple: float) -> str:
    """Return a multiple as text, such as ``"4×"``."""
    return f"{multiple:g}×"


def arms_of(results: "Results") -> list[str]:
    """Return the names of the arms in the order of the records, each once."""
    return list(dict.fromkeys(record["cell"]["arm"] for record in results.records))


def among(known: list[str], arms: Sequence[str] | None) -> list[str]:
    """Return the chosen arms, all known arms when ``None``; raise DataError for none or an unknown arm."""
    if arms is None:
        return known
    if not arms:
        raise DataError(f"expected at least one arm among {', '.join(known)}, found none")
    if unknown := [name for name in arms if name not in known]:
        raise DataError(f"expected arms among {', '.join(known)}, found {', '.join(map(repr, unknown))}")
    return list(dict.fromkeys(arms))


def few(names: list[str]) -> list[str]:
    """Return the arm names unchanged; raise DataError where they are more than a panel can show."""
    if len(names) > FEW_ARMS:
        raise DataError(f"expected at most {FEW_ARMS} arms in a panel, found {len(names)}; choose some with arms=[…]")
    return names


def arm_looks(names: Sequence[str]) -> dict[str, Look]:
    """Give each arm its look: its own where it has one, otherwise the next that no arm here has."""
    free = [look for name, look in _LOOKS.items() if name not in names] + [SPARE]
    others = [name for name in names if name not in _LOOKS]
    drawn = {name: free[place % len(free)] for place, name in enumerate(others)}
    return {name: _LOOKS.get(name) or drawn[name] for name in names}


def columns_for(panels: int, most: int = _PER_ROW) -> int:
    """Return how many panels stand in a row, so that no row is much shorter than the others.

    Example:
        >>> [columns_for(panels) for panels in (1, 3, 4, 5, 6, 7)]
        [1, 3, 2, 3, 3, 3]
    """
    return -(-panels // -(-panels // most))


def panels_for(names: Sequence[str]) -> go.Figure:
    """Return a figure with one empty panel for each name."""
    columns = columns_for(len(names))
    rows = -(-len(names) // columns)
    return make_subplots(
        rows, columns, subplot_titles=list(names), horizontal_spacing=0.08, vertical_spacing=0.28 / rows
    )


def panel_at(place: int, columns: int) -> dict[str, int]:
    """Return the row and column of a panel, from 1, as plotly takes them."""
    return {"row": place // columns + 1, "col": place % columns + 1}


def add_legend(
    figure: go.Figure, names: Sequence[str], mode: str = "markers", looks_of: Mapping[str, Look] | None = None
) -> None:
    """Add an entry per arm that stands in no panel, so that it has one also where the first panel lacks it."""
    for name, look in (looks_of or arm_looks(names)).items():
        figure.add_trace(
            go.Scatter(
                **LEGEND_ONLY, name=name, legendgroup=name, mode=mode,
                marker={"color": look.colour, "symbol": look.symbol, "size": 9},
                line={"color": look.colour, "dash": look.dash, "width": 2},
            )
        )  # fmt: skip


def name_lowest(figure: go.Figure, panels: int, columns: int, text: str) -> None:
    """Write what is along the axis below the last panel of each column."""
    for column in range(columns):
        figure.update_xaxes(title=text, row=(panels - 1 - column) // columns + 1, col=column + 1)


def lay_out(
    figure: go.Figure, panels: int, legend: Sequence[str], words: dict[str, object], below: str, beside: str
) -> None:
    """Set the size, legend, title and axis titles of a figure with several panels."""
    columns = columns_for(panels)
    rows = -(-panels // columns)
    room = legend_room(legend)
    figure.update_layout(
        template=TEMPLATE, title=words, height=150 + 235 * rows + room, margin={"t": 104, "b": 90 + room}
    )
    figure.update_annotations(font_size=13)
    figure.update_yaxes(title=beside, col=1)
    name_lowest(figure, panels, columns, below)
