"""Every result writes a report, whose head says what it says and what it was measured with."""

import re

import pytest

from geomkit.plots.themes import palette, theme
from tests.helpers.every_result import every_result


@pytest.fixture(scope="module")
def results():
    return every_result()


def test_every_result_writes_a_report(results, tmp_path):
    for name, result in results.items():
        path = tmp_path / name / "report.html"
        assert result.report(path, title=f"About {name}") == path
        page = path.read_text(encoding="utf-8")
        assert f"<h1>About {name}</h1>" in page
        assert page.count("<table>") >= 1
        assert ("plotly.js v" in page) == ("js-plotly-plot" in page and "Plotly.newPlot" in page)


def test_figures_are_light_under_a_dark_theme_too(results, tmp_path):
    try:
        theme("dark")
        page = results["Conflict"].report(tmp_path / "c.html").read_text(encoding="utf-8")
        assert palette().paper == "#111111"
    finally:
        theme("auto")
    body = page.split("<h1>", maxsplit=1)[1]
    assert '"paper_bgcolor":"#FFFFFF"' in body
    assert "#111111" not in body


def facts(page):
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))


def test_an_analysis_says_its_model_data_seed_and_findings(results, tmp_path):
    analysis = results["Analysis"]
    page = analysis.report(tmp_path / "a.html").read_text(encoding="utf-8")
    told = facts(page)
    assert set(told) >= {"model", "safety set", "utility set", "control set", "seed", "libraries", "date", "geomkit"}
    assert told["model"].startswith("LlamaForCausalLM, float32, weights ")
    assert told["safety set"].startswith("3 examples, fingerprint ")
    assert told["seed"] == "0"
    assert "<h1>Gradient geometry of LlamaForCausalLM</h1>" in page
    assert all(sentence in page for sentence in analysis.summary)
    assert page.count("data-label=") == sum(
        frame.size for frame in (analysis.numbers("loss"), analysis.numbers("low rank?"), analysis.numbers("conflict?"),
                                 analysis.numbers("one sample?"))
    ) + 3 * len(analysis.claims())  # fmt: skip


def test_a_fine_tune_says_how_it_was_protected(results, tmp_path):
    tuned = results["FineTuneResult"]
    page = tuned.report(tmp_path / "t.html").read_text(encoding="utf-8")
    assert facts(page)["learning_rate"] == "2e-05"
    assert "How it was protected" in page
    assert '<td data-label="value">adaptive-kl-left</td>' in page


def test_the_summary_of_the_tour_has_its_rates(results):
    tour = results["Tour"]
    refusal = tour.arms[0].evaluation.refusal.value
    assert f"(SFT) it refuses {refusal:.1%} (identity-shift)" in tour.summary[1]
