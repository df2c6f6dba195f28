"""The report: one self-contained HTML page with text, figures and tables, which needs no network."""

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from string import Template

import pandas as pd
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

from geomkit.utils.display import Html, element, joined
from geomkit.utils.files import write_atomically
from geomkit.utils.readable import is_numeric, readable
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


@dataclass(frozen=True)
class Head:
    """The top of a report, between its title and its contents.

    Attributes:
        summary: Sentences that sum the report up, each a paragraph.
        facts: What was measured with what: model, data, settings, by name.
    """

    summary: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


def write_report(
    path: str | Path, title: str, sections: Sequence[Section], *, date: dt.date, head: Head | None = None
) -> Path:
    """Write a report as one HTML page that needs no network.

    The file is written atomically, and the same input gives the same bytes. The page contains plotly.js once, about
    5 MB, if there is a figure; its content security policy forbids the browser to load anything.

    Args:
        path: The file to write, replaced if it exists; missing folders are made.
        title: The title of the page.
        sections: The sections, in order.
        date: The date at the top and in the footer.
        head: The summary and the facts at the top.

    Returns:
        The path of the file.

    Raises:
        DataError: If the file cannot be written.
    """
    path = Path(path)
    write_atomically(path, render_report(title, sections, date=date, head=head))
    return path


def render_report(title: str, sections: Sequence[Section], *, date: dt.date, head: Head | None = None) -> str:
    """Return the HTML of the page that :func:`write_report` writes; the arguments are the same."""
    has_figures = any(section.figures for section in sections)
    template = files("geomkit.plots").joinpath("templates/report.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=joined(title),
        plotly=element("script", Html(get_plotlyjs())) if has_figures else "",
        head=_head(head or Head(), date),
        contents=_contents(sections) if len(sections) > 2 else "",
        sections="\n".join(_section(number, section) for number, section in enumerate(sections, 1)),
        footer=joined(f"Written by geomkit {__version__} on {date.isoformat()}."),
    )


def _head(head: Head, date: dt.date) -> Html:
    """Return the summary, and a list of facts that ends with the date and the version."""
    summary = element("div", *(element("p", sentence) for sentence in head.summary), class_="summary")
    facts = {**head.facts, "date": date.isoformat(), "geomkit": __version__}
    rows = (joined(element("dt", name), element("dd", text)) for name, text in facts.items())
    return joined(summary if head.summary else "", element("dl", *rows))


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
    """Return a data frame as an HTML table; each cell also has its heading, for screens without room for columns."""
    shown = readable(frame)
    columns = [(name, "number" if is_numeric(shown[name].tolist()) else "") for name in shown.columns]
    heads = (element("th", name, class_=number) for name, number in columns)
    rows = (
        element(
            "tr",
            *(
                element("td", cell, class_=_VERDICTS.get(cell.partition(",")[0], number), data_label=name)
                for cell, (name, number) in zip(row, columns, strict=True)
            ),
        )
        for row in shown.itertuples(index=False, name=None)
    )
    table = element("table", element("thead", element("tr", *heads)), element("tbody", *rows))
    return element("div", table, class_="wide")


_VERDICTS = {"holds": "holds", "reversed": "reversed", "not shown": "open"}
"""Classes of verdicts, which have colours in the light and in the dark."""
