"""No text of a result, wherever it comes from, becomes an element of a notebook's output or of a report."""

import datetime as dt
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest

import geomkit
from geomkit.plots.report import Section, render_report
from geomkit.utils.display import Html, element, html_table, joined
from tests.helpers.every_result import every_result, result_classes, text_fields, with_text

EVIL = "\"'><img src=x onerror=alert(1)>"


class Elements(HTMLParser):
    """Collects the tags and attributes that a browser would see."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)


def assert_harmless(html: str) -> None:
    seen = Elements(html)
    assert seen.tags <= {
        "div", "p", "b", "span", "code", "table", "thead", "tbody", "tr", "th", "td", "section", "h2",
    }  # fmt: skip
    assert seen.attributes <= {"border", "class", "style", "title", "id"}


@pytest.fixture(scope="module")
def results():
    return every_result()


def test_every_class_of_results_is_tried(results):
    assert set(results) == {cls.__name__ for cls in result_classes()}


def with_evil(result, place, kept):
    """Return a result whose texts at a place end in what a browser would run, all but those that are kept."""
    return with_text(result, "", lambda text, where: f"{text}{EVIL}" if where == place and text not in kept else text)


def test_every_text_of_every_result_is_escaped(results):
    shown = set()
    for result in results.values():
        assert_harmless(result._repr_html_())
        for place in text_fields(result):
            for kept in ((), ("safety",)):  # a name that geomkit looks up cannot be another
                try:
                    html = with_evil(result, place, kept)._repr_html_()
                except (KeyError, ValueError, AttributeError):  # nothing is shown
                    continue
                assert_harmless(html)
                if "&lt;img src=x" in html:
                    shown.add(place)
    # What is known to come from outside is shown, and so this test has tried it.
    assert shown >= {
        "Certificate.rule", "Results.name", "Coverage.notes/values", "GradientSet.layers/keys", "Subspace.layers/keys",
        "Evaluation.skills/keys", "OneSample.groups/keys", "EvaluationComparison.baseline", "ExampleTokens.tokens",
        "Trajectory.moments/keys",
    }, shown  # fmt: skip


def test_a_report_shows_texts_and_runs_nothing():
    table = pd.DataFrame({EVIL: [EVIL]})
    figure = go.Figure(go.Scatter(x=[1], y=[1], name=EVIL), layout_title_text=EVIL)
    sections = [Section(EVIL, f"{EVIL}\n\n{EVIL}", (figure,), (table,)), Section("b"), Section("c")]
    page = Elements(render_report(EVIL, sections, date=dt.date(2025, 3, 1)))
    assert "img" not in page.tags
    assert not any(name.startswith("on") for name in page.attributes)


def test_the_helper_escapes_all_but_its_own():
    assert element("p", EVIL, title=EVIL) == (
        '<p title="&quot;&#x27;&gt;&lt;img src=x onerror=alert(1)&gt;">"\'&gt;&lt;img src=x onerror=alert(1)&gt;</p>'
    )
    assert_harmless(html_table(EVIL, pd.DataFrame({EVIL: [EVIL, 1.0]})))
    assert joined(Html("<b>") + "<i>") == "&lt;b&gt;&lt;i&gt;"  # a sum is a text again


def test_html_is_made_in_one_place():
    markup = re.compile(r"""["']<\w+[^"']*>|</\w+>|\bimport escape\b|from html\b""")
    allowed = {
        "utils/display.py",  # the helper
        "plots/labels.py",  # the texts of figures, whose few tags plotly itself reads
        # What models read.
        "inputs/answer_spans.py", "inputs/marked_spans.py", "inputs/templates.py", "training/model_judges/presets.py",
    }  # fmt: skip
    # plotly's own notation in figures: <b>, <br>, <sub> and <extra>, which it reads as text styles.
    figures = re.compile(r"</?(b|sub|extra|br)>")
    root = Path(geomkit.__file__).parent
    for path in sorted(root.rglob("*.py")):
        where = path.relative_to(root).as_posix()
        text = path.read_text(encoding="utf-8")
        if where.startswith("plots/"):
            text = figures.sub("", text)
        if where not in allowed:
            assert not markup.findall(text), where
