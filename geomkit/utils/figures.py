"""The one link from results to figures: plots import results, so results name their figure instead of importing it."""

from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def draw(name: str, *results: object, **options: object) -> "Figure":
    """Draw results with a function of :mod:`geomkit.plots`, which is imported when this is called.

    Args:
        name: Name of the function, such as ``"plot_spectrum"``.
        *results: What it draws.
        **options: Its keyword arguments.

    Returns:
        The figure.
    """
    return cast("Figure", getattr(import_module("geomkit.plots"), name)(*results, **options))
