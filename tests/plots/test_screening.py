"""The figures of a screen and of its study show their numbers, and read no token as mark-up."""

from dataclasses import replace

import numpy as np
import pytest

from geomkit import plots
from geomkit.correlation.token_conflict import ExampleTokens
from geomkit.experiments.screening.results import ScreeningStudy
from geomkit.screening.row_scores import RowScores
from geomkit.screening.screening import Screening


def scores(cosine, tokens=9):
    nothing = np.zeros(len(cosine))
    return RowScores(nothing, np.asarray(cosine), nothing, nothing, nothing, nothing, nothing + tokens, nothing + 20)


@pytest.fixture(scope="module")
def screening():
    generator = np.random.default_rng(0)
    null, rows = generator.normal(size=200), generator.normal(size=50) / 2
    rows[7] = 40
    example = ExampleTokens(
        (0, 1, 2, 3), ("<|user|>", "<b>Sure", " &lt;", "!"), np.array([False, True, True, True]), np.ones(4),
        np.array([np.nan, -0.4, 0.3, -0.001]),
    )  # fmt: skip
    return Screening("cosine", scores(rows), scores(null), "benign", (7,), (example,), "", "", None)


def test_scores_null_and_top_rows_are_drawn(screening):
    figure = plots.plot_screening(screening)
    null, rows, marks = figure.data
    assert null.name == "null: 200 benign rows"
    assert rows.name == "50 training rows"
    assert int(np.sum(rows.customdata)) == 50
    assert marks.customdata[:, 0].tolist() == [7]
    assert "Which rows raise the loss on refusals?" in figure.layout.title.text
    with_obeyed = plots.plot_screening(replace(screening, obeyed=3)).layout.title.text.replace("<br>", " ")
    assert "Which rows make obeying likelier than refusing?" in with_obeyed
    assert "1 row at a false-discovery level of 10 %" in figure.layout.title.subtitle.text
    (text,) = [annotation.text for annotation in figure.layout.annotations]
    assert text.startswith(f"<b>{screening.scores[7]:+.1f}</b>  row 7: ")
    assert '<span style="color:#B2182B"><b>&lt;b&gt;Sure</b></span>' in text
    assert '<span style="color:#2166AC"><b> &amp;lt;</b></span>' in text
    assert '<span style="color:#555555">!</span>' in text


def test_without_a_flagged_row_and_without_tokens(screening):
    calm = replace(screening, rows=scores(np.zeros(30)), top=(), top_tokens=())
    figure = plots.plot_screening(calm)
    assert len(figure.data) == 2
    assert not figure.layout.annotations


@pytest.fixture(scope="module")
def study():
    detections = tuple(
        {"case": case, "ranking": ranking, "auroc": value, "low": value - 0.1, "high": value, "precision": value / 2,
         "precision_low": 0.0, "precision_high": 1.0}
        for case, value in (("poison 1 %", 0.9), ("backdoor, with trigger", 0.8)) for ranking in ("screen", "loss")
    )  # fmt: skip
    false_positives = tuple(
        {"rows": "task rows", "null": null, "method": "cosine", "length": length, "shortest": 5.0, "longest": 50.0,
         "level": 0.05, "share": 0.06, "low": 0.05, "high": 0.07}
        for null, length in (("task rows", "all"), ("task rows", "fifth"), ("benign rows", "all"))
    )  # fmt: skip
    outcomes = tuple(
        {"scenario": "poison-10", "arm": arm, "seed": seed, "rows": 270, "of": 300, "refusal": refusal + seed / 10}
        for arm, refusal in (("all rows", 0.0), ("screened", 0.8)) for seed in (0, 1)
    )  # fmt: skip
    return ScreeningStudy("small", detections, (), false_positives, outcomes)


def test_the_table_of_detections(study):
    (table,) = plots.plot_screening_detection(study).data
    assert list(table.y) == ["screen", "loss"]
    assert np.array(table.z).tolist() == [[0.9, 0.8], [0.9, 0.8]]
    assert np.array(table.customdata)[0, 1] == pytest.approx([0.7, 0.8])
    (precision,) = plots.plot_screening_detection(study, "precision").data
    assert np.array(precision.z)[0].tolist() == [0.45, 0.4]


def test_shares_of_clean_rows(study):
    parts, whole = plots.plot_screening_null(study).data
    assert list(parts.x) == [6]
    assert list(whole.x) == [6, 6]
    assert whole.error_x.array == pytest.approx([1, 1])


def test_outcomes_are_means_over_seeds(study):
    every, screened = plots.plot_screening_outcomes(study).data
    assert list(every.y) == pytest.approx([5])
    assert list(screened.y) == pytest.approx([85])
    assert screened.customdata.tolist() == [[270, 300]]


def test_of_a_backdoor_the_refusal_with_the_trigger_is_drawn(study):
    row = study.outcomes[0] | {"scenario": "backdoor", "refusal": 1.0, "triggered_refusal": 0.25}
    figure = plots.plot_screening_outcomes(replace(study, outcomes=(*study.outcomes, row)))
    assert list(figure.data[0].x) == ["poison-10", "backdoor, with trigger"]
    assert list(figure.data[0].y) == pytest.approx([5, 25])
