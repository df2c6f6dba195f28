"""Writing a figure to a file: a picture, which kaleido draws in Chromium, or a page that needs no network."""

from importlib.util import find_spec
from pathlib import Path

import plotly.graph_objects as go

from geomkit.errors import DataError
from geomkit.utils.figures import FIGURE_SUFFIXES
from geomkit.utils.files import write_atomically

_WIDTH = 900
"""Width of a picture, in pixels of a page; a PNG has twice as many."""

PAGE = {"displaylogo": False, "responsive": True, "showSendToCloud": False, "plotlyServerURL": ""}
"""Options of a figure on a page; without the last two, plotly 7 adds a button that sends the figure's data away."""


def save_figure(figure: go.Figure, path: Path) -> Path:
    """Write a figure to a file, replacing it if it exists; missing folders are made.

    Args:
        figure: The figure.
        path: The file, whose name ends in ``.png``, ``.svg``, ``.pdf`` or ``.html``.

    Raises:
        DataError: If the name ends otherwise, a picture is asked for and kaleido or Chromium is missing, or the file
            cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix not in FIGURE_SUFFIXES:
        raise DataError(
            f"expected a file that ends in {', '.join(FIGURE_SUFFIXES)}, found '{path.name}'; rename it, or write the "
            "numbers with to_frame().to_csv(…)"
        )
    page = figure.to_html(include_plotlyjs=True, config=PAGE).encode() if suffix == ".html" else None
    content = page or _picture(figure, suffix.removeprefix("."), path.name)
    write_atomically(path, content)
    return path


def _picture(figure: go.Figure, kind: str, name: str) -> bytes:
    if find_spec("kaleido") is None:
        raise DataError(
            f"expected kaleido to draw {name}, found none; pip install 'geomkit[figures]', or save an .html"
        )
    try:
        picture = figure.to_image(kind, width=_WIDTH, scale=2)
    # kaleido and plotly change between versions what they raise where the browser is missing or fails to start.
    except Exception as error:
        found = "none" if "chrome" in str(error).casefold() else " ".join(str(error).split())[:200]
        raise DataError(
            f"expected Chrome or Chromium to draw {name}, found {found}; install one, for instance with "
            "plotly_get_chrome, or save an .html"
        ) from None
    return bytes(picture)
