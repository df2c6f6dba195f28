"""Display of results: the base class of results, HTML, tables in HTML, and numbers as text.

All HTML of geomkit is built by :func:`element`, which escapes every text that it is given: names of layers, sets, rules
and files come from elsewhere, and a notebook or a browser runs what is written in them.
"""

from abc import ABC, abstractmethod
from html import escape
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

from geomkit.utils.readable import is_numeric, readable

if TYPE_CHECKING:
    import pandas as pd


class Result(ABC):
    """Base class of results: a sentence (``str``), a data frame (``to_frame``), and both together in a notebook."""

    @abstractmethod
    def to_frame(self) -> "pd.DataFrame":
        """Return the numbers of the result as a tidy data frame."""

    def shown_frame(self) -> "pd.DataFrame":
        """Return the numbers that a notebook shows, which are those of a conclusion; often a part of the frame."""
        return self.to_frame()

    def report(self, path: str | Path, *, title: str = "") -> Path:
        """Write the result as one HTML page that needs no network: figures, tables, and what they say in sentences.

        Args:
            path: The file, replaced if it exists; missing folders are made.
            title: The title of the page; made from the result when left out.

        Returns:
            The path of the file.

        Raises:
            DataError: If the file cannot be written.
        """
        # Reports are above results, which cannot import them.
        pages = import_module("geomkit.plots.report_pages")
        return cast("Path", pages.write_result(self, path, title))

    def _repr_html_(self) -> str:
        return html_table(str(self), self.shown_frame())


class Html(str):
    """HTML that :func:`element` or a library made, and that is put into an element as it is."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: str) -> Html:
    """Return an HTML element, in which every child and attribute is escaped, except children that are HTML.

    Args:
        tag: Name of the element, such as ``"p"``.
        *children: Texts, and :class:`Html`.
        **attributes: Attributes by name; an underscore at the end, as in ``class_``, is left out, another one is a
            hyphen, and an attribute without text is left out.

    Example:
        >>> print(element("p", "1 < 2, ", element("b", "surely"), class_="note"))
        <p class="note">1 &lt; 2, <b>surely</b></p>
    """
    texts = (f' {name.rstrip("_").replace("_", "-")}="{escape(text)}"' for name, text in attributes.items() if text)
    return Html(f"<{tag}{''.join(texts)}>{joined(*children)}</{tag}>")


def joined(*children: str) -> Html:
    """Return texts and HTML one after the other as HTML, the texts escaped.

    Example:
        >>> print(joined("a & b", element("i", "c")))
        a &amp; b<i>c</i>
    """
    return Html("".join(child if isinstance(child, Html) else escape(child, quote=False) for child in children))


def html_table(title: str, frame: "pd.DataFrame", *, rows: int = 20) -> Html:
    """Return a heading and the first rows of a data frame as HTML, with intervals beside their numbers.

    See :func:`geomkit.utils.readable.readable` for what a cell shows.
    """
    parts = [element("p", element("b", title)), html_rows(frame.head(rows))]
    if len(frame) > rows:
        parts.append(element("p", f"… {counted(len(frame) - rows, 'more row')}: ", element("code", ".to_frame()")))
    return element("div", *parts)


def html_rows(frame: "pd.DataFrame") -> Html:
    """Return a data frame as an HTML table: texts at the left, numbers at the right, verdicts in their colours."""
    shown = readable(frame)
    columns = [(name, is_numeric(shown[name].tolist())) for name in shown.columns]
    heads = (element("th", name, style=_style(name, numeric=numeric)) for name, numeric in columns)
    body = (
        element(
            "tr",
            *(
                element("td", cell, style=_style(cell, numeric=numeric))
                for cell, (_, numeric) in zip(row, columns, strict=True)
            ),
        )
        for row in shown.itertuples(index=False, name=None)
    )
    return element("table", element("thead", element("tr", *heads)), element("tbody", *body))


def _style(text: str, *, numeric: bool) -> str:
    colour = verdict_colour(text)
    verdict = f"; color: {colour}; font-weight: 600" if colour else ""
    return f"text-align: {'right' if numeric else 'left'}; vertical-align: top{verdict}"


_COLOURS = {
    "holds": "#2a8a57", "ok": "#2a8a57", "reversed": "#d6455a", "fails": "#d6455a", "not shown": "#8f7a1f",
}  # fmt: skip
"""Colours of verdicts, of which each can be read on white and on black."""


def verdict_colour(text: str) -> str:
    """Return the colour of a verdict, perhaps followed by its caveat, as a hexadecimal code; empty for other texts.

    Example:
        >>> verdict_colour("holds, not about alignment"), verdict_colour("it holds")
        ('#2a8a57', '')
    """
    return _COLOURS.get(text.partition(",")[0], "")


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number followed by its noun, in the singular or the plural.

    Example:
        >>> counted(1, "moment"), counted(2, "matrix", "matrices")
        ('1 moment', '2 matrices')
    """
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def signed(interval: tuple[float, float]) -> str:
    """Return an interval as text, both ends with a sign and three decimals.

    Example:
        >>> signed((-0.25, 0.5))
        '[-0.250, +0.500]'
    """
    return f"[{interval[0]:+.3f}, {interval[1]:+.3f}]"


def human_bytes(size: int) -> str:
    """Return a size in bytes as text, with a binary unit and three digits.

    Example:
        >>> human_bytes(1023), human_bytes(16 * 2**30)
        ('1023 B', '16 GiB')
    """
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            return f"{size / 2**power:.3g} {unit}"
    return f"{size} B"


def human_seconds(seconds: float) -> str:
    """Return a duration as text, with two or three digits.

    Example:
        >>> human_seconds(0.0123), human_seconds(34.2), human_seconds(312), human_seconds(20_000)
        ('0.012 s', '34 s', '5.2 min', '5.6 h')
    """
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def human_count(number: int) -> str:
    """Return a number of parameters as text, with a decimal unit and three digits.

    Example:
        >>> human_count(999), human_count(8_030_261_248)
        ('999', '8.03B')
    """
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
