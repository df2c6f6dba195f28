"""The themes: what is light, what is dark, and how the theme is found."""

import json
from collections.abc import Iterator
from pathlib import Path

import plotly.io
import pytest

from geomkit import plots
from geomkit.errors import GeometryError
from geomkit.plots.jupyterlab import jupyterlab_is_dark
from geomkit.plots.themes import TEMPLATES, palette
from geomkit.svd.principal_angles import Angles
from tests.helpers.figures import conflict


@pytest.fixture(autouse=True)
def the_theme_stays() -> Iterator[None]:
    default = plotly.io.templates.default
    yield
    plots.theme("auto")
    plotly.io.templates.default = default


def luminance(colour: str) -> float:
    """Return the relative luminance of a colour, by the definition of the Web Content Accessibility Guidelines 2.1."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours, between 1 and 21."""
    darker, lighter = sorted(map(luminance, (one, other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("name", ["light", "dark"])
def test_text_and_series_are_seen_on_the_background(name: str) -> None:
    plots.theme(name)
    colours = palette()
    assert min(contrast(text, colours.paper) for text in (colours.ink, colours.faint)) > 7
    # Guideline 1.4.11 asks for 3; orange, amber and pink of the light palette are those of Okabe and Ito.
    series = [*colours.series.values(), *colours.others, colours.against, colours.agreeing]
    assert min(contrast(colour, colours.paper) for colour in series) > (5 if name == "dark" else 2.2)


def test_a_figure_gets_the_theme_that_is_in_force_when_it_is_drawn(angles: Angles) -> None:
    light = plots.plot_angles(angles)
    plots.theme("dark")
    dark = plots.plot_angles(angles)
    assert (light.layout.template, dark.layout.template) == (TEMPLATES["light"], TEMPLATES["dark"])
    assert plots.COLOURS["safety"] == palette().series["safety"] != TEMPLATES["light"].layout.colorway[0]
    colours = json.dumps([trace.to_plotly_json() for trace in dark.data], default=str)
    assert "#222222" not in colours
    heat = plots.plot_conflict(conflict()).data[0]
    assert heat.colorscale[1] == (0.5, palette().paper)


def test_by_default_the_theme_follows_plotlys() -> None:
    plotly.io.templates.default = "plotly_dark"
    assert palette().paper == "#111111"
    plotly.io.templates.default = "plotly_white"
    assert palette().paper == "#FFFFFF"
    plots.theme("dark")
    assert palette().paper == "#111111"


def test_an_unknown_theme_is_refused() -> None:
    with pytest.raises(GeometryError, match="expected a theme among auto, light, dark, found 'grey'"):
        plots.theme("grey")


@pytest.mark.parametrize(
    ("saved", "is_dark"),
    [
        ('// a comment\n{\n  // which theme\n  "theme": "JupyterLab Dark"\n}', True),
        ('{"theme": "JupyterLab Light"}', False),
        ("{'theme': 'JupyterLab Dark', }", False),  # JSON5, which only JupyterLab reads
        ("[]", False),
        (None, False),
    ],
)
def test_a_dark_theme_that_is_saved_in_jupyterlab_is_found(tmp_path: Path, saved: str | None, is_dark: bool) -> None:
    folder = tmp_path / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    folder.mkdir(parents=True)
    if saved is not None:
        (folder / "themes.jupyterlab-settings").write_text(saved, "utf-8")
    kernel = {"JPY_SESSION_NAME": "a.ipynb", "JUPYTER_CONFIG_DIR": str(tmp_path)}
    assert jupyterlab_is_dark(kernel) is is_dark
    assert not jupyterlab_is_dark(
        {"JUPYTER_CONFIG_DIR": str(tmp_path)}
    )  # a script, whose figures JupyterLab never shows
