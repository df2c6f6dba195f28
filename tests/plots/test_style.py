"""The template, and the looks of series."""

import plotly.io

from geomkit import plots
from geomkit.plots.style import looks
from geomkit.svd.principal_angles import Angles
from geomkit.svd.spectrum import Spectrum
from tests.helpers.figures import conflict


def test_template_is_registered_but_not_the_default() -> None:
    assert plotly.io.templates["geomkit"] == plots.TEMPLATE
    assert plotly.io.templates.default != "geomkit"


def test_series_get_distinct_colours_and_symbols() -> None:
    chosen = looks(["aligned", "SFT", "mixing", "SPF", "safety"])
    assert len({look.colour for look in chosen}) == len({look.symbol for look in chosen}) == 5


def test_figures_carry_the_template(angles: Angles, safety: Spectrum) -> None:
    for figure in (plots.plot_angles(angles), plots.plot_effective_rank(safety), plots.plot_conflict(conflict())):
        assert figure.layout.template == plots.TEMPLATE
        assert figure.layout.title.text
