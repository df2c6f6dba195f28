"""Results that can be drawn, and the link from them to figures, by name.

:mod:`geomkit.plots` imports results, so results cannot import it: they reach its functions by name.
"""

from abc import abstractmethod
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

from geomkit.utils.display import Result

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FIGURE_SUFFIXES = (".png", ".svg", ".pdf", ".html")
"""The ends of names of files that a figure is written to."""


_OTHER_PICTURES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".eps", ".ps")
"""Ends of names that are meant as figures, too: they are refused as such, and no folder is made of the name."""


class DrawnResult(Result):
    """Base class of results that have a figure."""

    @abstractmethod
    def plot(self) -> "Figure":
        """Draw the result."""

    def save(self, path: str | Path) -> Path:
        """Write the figure of :meth:`plot` to a file, replacing it if it exists.

        Args:
            path: A file that ends in ``.png``, ``.svg``, ``.pdf``, or in ``.html`` for a page that can be zoomed and
                hovered over and needs no network. Pictures need the extra ``figures`` and Chrome or Chromium.

        Returns:
            The path of the file.

        Raises:
            DataError: If the name ends otherwise, kaleido or Chromium is missing, or the file cannot be written.
        """
        return save_figure(self.plot(), path)


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


def is_figure_file(path: str | Path) -> bool:
    """Return whether a name is meant as that of a file for a figure, also one of a format that is not written.

    Example:
        >>> is_figure_file("x.PNG"), is_figure_file("x.jpg"), is_figure_file("my-model-1.5")
        (True, True, False)
    """
    return Path(path).suffix.lower() in {*FIGURE_SUFFIXES, *_OTHER_PICTURES}


def save_figure(figure: "Figure", path: str | Path) -> Path:
    """Write a figure to a file, see :meth:`DrawnResult.save`."""
    return cast("Path", import_module("geomkit.plots.saving").save_figure(figure, Path(path)))
