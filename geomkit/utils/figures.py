"""The link from results to figures, by name: :mod:`geomkit.plots` imports results, so results cannot import it."""

from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def draw(name: str, *results: object, **options: object) -> "Figure":
    """Draw results with a function of :mod:`geomkit.plots`, which is imported at the call.

    Args:
        name: Name of the function, such as ``"plot_spectrum"``.
        *results: Results to draw, the positional arguments of the function.
        **options: Keyword arguments of the function.

    Returns:
        The figure.
    """
    return cast("Figure", getattr(import_module("geomkit.plots"), name)(*results, **options))
