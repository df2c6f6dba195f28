"""The report: one self-contained HTML page with text, figures and tables, which needs no network."""

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

from geomkit.utils.display import Html, element, joined
from geomkit.utils.files import write_atomically
from geomkit.version import __version__

_CONFIG = {"displaylogo": False, "responsive": True, "showSendToCloud": False, "plotlyServerURL": ""}
"""Options of every figure; without the last two, plotly 7 adds a button that sends the figure's data to a server."""


@dataclass(frozen=True)
class Section:
    """One section of a report.

    Attributes:
        heading: The heading.
        text: Plain text; blank lines separate paragraphs.
        figures: Figures, shown below the text.
        tables: Tables, shown below the figures without their indices.
    """

    heading: str
    text: str = ""
    figures: tuple[Figure, ...] = ()
    tables: tuple[pd.DataFrame, ...] = ()


def write_report(path: str | Path, title: str, sections: Sequence[Section], *, date: dt.date) -> Path:
    """Write a report as one HTML page that needs no network.

    The file is written atomically, and the same input gives the same bytes. The page contains plotly.js once, about
    5 MB, if there is a figure; its content security policy forbids the browser to load anything.

    Args:
        path: The file to write, replaced if it exists; missing folders are made.
        title: The title of the page.
        sections: The sections, in order.
        date: The date in the footer.

    Returns:
        The path of the file.
    """
    path = Path(path)
    write_atomically(path, render_report(title, sections, date=date))
    return path


def render_report(title: str, sections: Sequence[Section], *, date: dt.date) -> str:
    """Return the HTML of the page that :func:`write_report` writes; the arguments are the same."""
    has_figures = any(section.figures for section in sections)
    template = files("geomkit.plots").joinpath("templates/report.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=joined(title),
        plotly=element("script", Html(get_plotlyjs())) if has_figures else "",
        contents=_contents(sections) if len(sections) > 2 else "",
        sections="\n".join(_section(number, section) for number, section in enumerate(sections, 1)),
        footer=joined(f"Written by geomkit {__version__} on {date.isoformat()}."),
    )


def _contents(sections: Sequence[Section]) -> Html:
    items = (
        element("li", element("a", section.heading, href=f"#section-{number}"))
        for number, section in enumerate(sections, 1)
    )
    return element("nav", element("ol", *items), **{"aria-label": "Contents"})


def _section(number: int, section: Section) -> Html:
    paragraphs = [part.strip() for part in section.text.split("\n\n")]
    parts = [
        element("h2", section.heading),
        *(element("p", part) for part in paragraphs if part),
        *(_figure(figure, f"figure-{number}-{place}") for place, figure in enumerate(section.figures, 1)),
        *(_table(frame) for frame in section.tables),
    ]
    return element("section", "\n", *(joined(part, "\n") for part in parts), id=f"section-{number}")


def _figure(figure: Figure, name: str) -> Html:
    # plotly escapes the texts of a figure inside its script.
    html = Html(figure.to_html(full_html=False, include_plotlyjs=False, config=_CONFIG, div_id=name))
    return element("div", element("div", html, class_="figure"), class_="wide")


def _table(frame: pd.DataFrame) -> Html:
    """Return a data frame as an HTML table in which numbers and their headings are aligned right."""
    numeric = [dtype.kind in "iuf" for dtype in frame.dtypes]
    heads = (_cell("th", str(name), number) for name, number in zip(frame.columns, numeric, strict=True))
    rows = (
        element("tr", *(_cell("td", _text(value), number) for value, number in zip(row, numeric, strict=True)))
        for row in frame.itertuples(index=False, name=None)
    )
    table = element("table", element("thead", element("tr", *heads)), element("tbody", *rows))
    return element("div", table, class_="wide")


def _cell(tag: str, text: str, number: bool) -> Html:
    return element(tag, text, class_="number" if number else "")


def _text(value: object) -> str:
    """Return a value as text: floats with four significant digits or up to the decimal point, the rest in full.

    Example:
        >>> _text(0.123456), _text(12345.6), _text(1e-9), _text(float("nan")), _text("a & b")
        ('0.1235', '12346', '1e-09', '–', 'a & b')
    """
    if pd.api.types.is_scalar(value) and pd.isna(value):  # type: ignore[call-overload]
        return "–"
    if isinstance(value, float | np.floating):
        number = float(value)
        return f"{number:.0f}" if 1e4 <= abs(number) < 1e9 else f"{number:.4g}"
    return str(value)
