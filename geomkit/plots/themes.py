"""The theme of all figures, light or dark: their colours, and the plotly template that holds them.

A theme is found when a figure is drawn, so :func:`theme` concerns the figures that are drawn after it. plotly cannot
change a figure's colours with the page around it, so a figure that is drawn stays as it is.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import plotly.graph_objects as go
import plotly.io

from geomkit.errors import GeometryError
from geomkit.plots.jupyterlab import jupyterlab_is_dark

Theme = Literal["auto", "light", "dark"]
"""A theme of figures; ``"auto"`` finds out which of the other two."""

Scale = list[tuple[float, str]]
"""A scale of colours as plotly takes it: places between 0 and 1 with their colours."""


@dataclass(frozen=True)
class Palette:
    """The colours of one theme, each as ``#rrggbb``.

    Attributes:
        series: The fixed colours by the name of the series.
        others: Six colours for series without a fixed colour; the fourth and the fifth are those of safety and utility.
        ink: Text, zero lines, and summaries over all series.
        faint: Second lines of titles, and marks of minor series.
        grid: Grid lines.
        frame: Axes and their ticks.
        paper: The background, rims of markers, and the filling of hollow ones.
        unknown: Cells of a map whose value is unknown.
        against: The end of the scale for what is against safety.
        agreeing: The end of the scale for what agrees with safety.
        dense: The end of a scale of magnitudes.
    """

    series: Mapping[str, str]
    others: tuple[str, ...]
    ink: str
    faint: str
    grid: str
    frame: str
    paper: str
    unknown: str
    against: str
    agreeing: str
    dense: str

    def diverging(self, *, rising: str = "agreeing") -> Scale:
        """Return a scale with the background at its middle, whose upper end is ``"agreeing"`` or ``"against"``."""
        ends = (self.against, self.agreeing) if rising == "agreeing" else (self.agreeing, self.against)
        return [(0.0, ends[0]), (0.5, self.paper), (1.0, ends[1])]

    def sequential(self) -> Scale:
        """Return a scale of magnitudes, from the background."""
        return [(0.0, self.paper), (1.0, self.dense)]


# The fixed colours are from the palette of Okabe and Ito (2008), which colour-blind readers can distinguish; on a dark
# background they are lighter versions of the same hues.
_PALETTES = {
    "light": Palette(
        series={
            "safety": "#0072B2",
            "utility": "#D55E00",
            "control": "#8C6BB1",
            "null": "#767676",
            "SFT": "#CC79A7",
            "SPF": "#009E73",
        },
        others=("#444444", "#56B4E9", "#E69F00", "#0072B2", "#D55E00", "#7A5C00"),
        ink="#222222",
        faint="#555555",
        grid="#E6E6E6",
        frame="#8A8A8A",
        paper="#FFFFFF",
        unknown="#D0D0D0",
        against="#B2182B",
        agreeing="#2166AC",
        dense="#08519C",
    ),
    "dark": Palette(
        series={
            "safety": "#4FA3E3",
            "utility": "#F08A4B",
            "control": "#B7A1E0",
            "null": "#9E9E9E",
            "SFT": "#E89AC4",
            "SPF": "#35C99A",
        },
        others=("#D0D0D0", "#8AD0F5", "#F2B632", "#4FA3E3", "#F08A4B", "#CDAE55"),
        ink="#E8E8E8",
        faint="#B4B4B4",
        grid="#333333",
        frame="#8A8A8A",
        paper="#111111",
        unknown="#4A4A4A",
        against="#F4694F",
        agreeing="#5AA9E6",
        dense="#2F6DB5",
    ),
}


def _template(colours: Palette) -> go.layout.Template:
    axis = {
        "showgrid": True,
        "gridcolor": colours.grid,
        "zeroline": False,
        "linecolor": colours.frame,
        "showline": True,
        "ticks": "outside",
        "tickcolor": colours.frame,
        "ticklen": 4,
        "title": {"standoff": 8, "font": {"size": 13}},
        "automargin": True,
    }
    return go.layout.Template(
        layout={
            "font": {"family": "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif", "size": 13},
            "font_color": colours.ink,
            "paper_bgcolor": colours.paper,
            "plot_bgcolor": colours.paper,
            "colorway": [*colours.series.values(), *colours.others[:3]],
            "title": {"x": 0, "xref": "container", "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top"},
            "title_font_size": 16,
            "title_pad": {"t": 14, "l": 12},
            "title_subtitle": {"font": {"size": 12, "color": colours.faint}},
            "margin": {"l": 64, "r": 24, "t": 82, "b": 84},
            "height": 420,
            "hoverlabel": {"bgcolor": colours.paper, "bordercolor": colours.frame, "font_size": 12, "align": "left"},
            "legend": {"orientation": "h", "x": 0, "xanchor": "left", "font_size": 12},
            "legend_y": 0,
            "legend_yref": "container",
            "legend_yanchor": "bottom",
            "xaxis": axis,
            "yaxis": axis,
        }
    )


TEMPLATES = {name: _template(colours) for name, colours in _PALETTES.items()}
"""The template of each theme, registered with plotly as ``"geomkit"`` and ``"geomkit_dark"``."""

plotly.io.templates["geomkit"] = TEMPLATES["light"]
plotly.io.templates["geomkit_dark"] = TEMPLATES["dark"]

_chosen: dict[str, Theme] = {"theme": "auto"}


def theme(name: Theme = "auto") -> None:
    """Choose the theme of all figures that are drawn from now on.

    By default, and with ``"auto"``, figures are dark where plotly's default template has a name with ``dark`` in it, as
    ``plotly.io.templates.default = "plotly_dark"``. Otherwise, in a kernel that JupyterLab started, they are dark where
    a dark theme is saved in JupyterLab's settings.

    A figure gets its colours when it is drawn. So it does not change with JupyterLab's theme afterwards: draw it again.
    Nor is a theme seen that JupyterLab takes from the operating system, that VS Code, Colab or a remote JupyterLab has,
    or that was chosen under another user name: there, call ``theme("dark")``.

    Args:
        name: ``"light"``, ``"dark"``, or ``"auto"``.

    Raises:
        GeometryError: If there is no such theme.

    Example:
        >>> theme("dark")
        >>> palette().paper
        '#111111'
        >>> theme("auto")
    """
    if name not in get_args(Theme):
        raise GeometryError(f"expected a theme among {', '.join(get_args(Theme))}, found {name!r}; give one of these")
    _chosen["theme"] = name


@contextmanager
def drawn_in(name: Theme) -> Iterator[None]:
    """Draw figures in a theme inside the block, whatever theme is chosen outside."""
    before = _chosen["theme"]
    theme(name)
    try:
        yield
    finally:
        theme(before)


def _in_force() -> str:
    """Return ``"light"`` or ``"dark"``, the theme of a figure that is drawn now."""
    if (chosen := _chosen["theme"]) != "auto":
        return chosen
    is_dark = "dark" in str(plotly.io.templates.default or "") or jupyterlab_is_dark(os.environ)
    return "dark" if is_dark else "light"


def palette() -> Palette:
    """Return the colours of the theme in force."""
    return _PALETTES[_in_force()]


def template() -> go.layout.Template:
    """Return plotly's template of the theme in force."""
    return TEMPLATES[_in_force()]


class _SeriesColours(Mapping[str, str]):
    """The fixed colours of the theme in force by the name of the series."""

    def __getitem__(self, name: str) -> str:
        return palette().series[name]

    def __iter__(self) -> Iterator[str]:
        return iter(palette().series)

    def __len__(self) -> int:
        return len(palette().series)


COLOURS: Mapping[str, str] = _SeriesColours()
"""The fixed colours of safety, utility, control, null, plain fine-tuning (SFT) and SPF, in the theme in force."""

TEMPLATE: Any = TEMPLATES["light"]
"""The light template, registered with plotly as ``"geomkit"``."""
