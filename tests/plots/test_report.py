"""The report: one file that loads nothing, shows everything and trusts no text."""

import datetime as dt
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from geomkit.plots.report import Head, Section, render_report, write_report
from geomkit.version import __version__

DATE = dt.date(2025, 3, 1)
EVIL = "</script><script>alert(1)</script> & <b>"


HEAD = Head((EVIL, "Second sentence."), {EVIL: EVIL, "model": "a/b"})


class Page(HTMLParser):
    """Collects what a browser would load, run and show."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in {"src", "href", "srcset", "data", "action"}]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def sections() -> list[Section]:
    figure = go.Figure(go.Scatter(x=[1, 2], y=[0.25, 4.5], name=EVIL), layout_title_text=EVIL)
    table = pd.DataFrame({"parameter": ["a", EVIL], "cosine": [0.123456, np.nan], "n": [12, 34567]})
    return [
        Section("Spectra", "First paragraph.\nStill the first.\n\nSecond.", (figure, figure)),
        Section(f"Conflict {EVIL}", EVIL, (figure,), (table,)),
        Section("Nothing"),
    ]


@pytest.fixture(scope="module")
def page(sections: list[Section]) -> str:
    return render_report(f"A report {EVIL}", sections, date=DATE, head=HEAD)


def test_nothing_is_loaded(page: str) -> None:
    assert Page(page).loaded == ["#section-1", "#section-2", "#section-3"]
    assert "@import" not in page.split("<script", maxsplit=1)[0]
    assert "default-src 'none'" in page


def test_plotly_is_embedded_once_and_only_with_figures(page: str) -> None:
    assert page.count("plotly.js v") == 1
    bare = render_report("Bare", [Section("Text only", "Short.")], date=DATE)
    assert "plotly.js v" not in bare
    assert len(bare) < 12_000


def test_figures_offer_to_send_nothing(page: str) -> None:
    figures = page.split("<h1>", maxsplit=1)[1]
    assert figures.count('"showSendToCloud": false') == 3
    assert "http" not in figures


def test_text_is_escaped_everywhere(page: str) -> None:
    parsed = Page(page)
    assert "b" not in parsed.tags
    assert "alert(1)</script>" not in page
    # title twice, summary, fact and its name, contents, h2, p, td
    assert parsed.text.count("</script><script>alert(1)</script> & <b>") == 9


def test_every_figure_has_its_place(page: str) -> None:
    assert re.findall(r'<div id="(figure-[\d-]+)"', page) == ["figure-1-1", "figure-1-2", "figure-2-1"]
    assert page.count("0.25,4.5") == 3


def test_blank_lines_part_paragraphs(page: str) -> None:
    assert "<p>First paragraph.\nStill the first.</p>\n<p>Second.</p>" in page


def test_numbers_are_rounded_and_aligned(page: str) -> None:
    for name, text in (("cosine", "0.1235"), ("cosine", "–"), ("n", "34567")):
        assert f'<td class="number" data-label="{name}">{text}</td>' in page
    assert '<th class="number">cosine</th>' in page
    assert "<th>parameter</th>" in page


def test_the_head_has_the_summary_the_facts_the_date_and_the_version(page: str) -> None:
    assert "<p>Second sentence.</p></div><dl>" in page
    assert f"<dt>model</dt><dd>a/b</dd><dt>date</dt><dd>2025-03-01</dd><dt>geomkit</dt><dd>{__version__}</dd>" in page
    assert page.index("<dl>") < page.index("<nav")
    assert 'class="summary"' not in render_report("Bare", [], date=DATE)


def test_verdicts_have_classes_and_empty_columns_are_left_out() -> None:
    table = pd.DataFrame({"verdict": ["holds", "not shown, perhaps"], "none": [None, None]})
    found = render_report("Claims", [Section("Claims", "", (), (table,))], date=DATE)
    assert '<td class="holds" data-label="verdict">holds</td>' in found
    assert '<td class="open" data-label="verdict">not shown, perhaps</td>' in found
    assert "none</th>" not in found


def test_footer_says_version_and_date(page: str) -> None:
    assert f"<footer>Written by geomkit {__version__} on 2025-03-01.</footer>" in page


def test_same_input_gives_the_same_bytes(sections: list[Section], page: str) -> None:
    assert render_report(f"A report {EVIL}", sections, date=DATE, head=HEAD) == page


def test_the_file_is_replaced_whole(tmp_path: Path) -> None:
    path = write_report(tmp_path / "new" / "report.html", "First", [], date=DATE)
    assert write_report(str(path), "Zweiter Bericht: σ₁", [], date=DATE) == path
    assert "Zweiter Bericht: σ₁" in path.read_text(encoding="utf-8")
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    path = write_report(tmp_path / "report.html", "First", [], date=DATE)
    old = path.read_bytes()
    with pytest.raises(UnicodeEncodeError):
        write_report(path, "\ud800", [], date=DATE)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
