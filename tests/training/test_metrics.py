"""Metrics of responses, against numbers read by hand and against formulas written out here."""

from decimal import Decimal

import pytest

from geomkit.errors import DataError
from geomkit.training.metrics import METRICS, exact_match, final_number, final_number_match, find_metric


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", "18"),
        ("16 - 3 - 4 = <<16-3-4=9>>9 eggs a day.\n#### 18", "18"),
        ("#### 1,234,567", "1234567"),
        ("####-5", "-5"),
        ("#### $1,050.00 per day", "1050"),
        ("#### 3\nso 4, then\n#### 7 eggs of 12", "7"),
        ("The answer is -3.50.", "-3.5"),
        ("−5 degrees", "-5"),
        ("a loss of -$5", "-5"),
        ("a loss of $-5", "-5"),
        ("16-3=13", "13"),
        ("10-20", "20"),
        ("7 - 4", "4"),
        ("it is - 4", "-4"),
        (".5 of it", "0.5"),
        ("80%", "80"),
        ("12 or 1, 2", "2"),
        ("#### none, but 3", "3"),
        ("5 #### none", "5"),
        ("no number", None),
        ("####", None),
        ("", None),
    ],
)
def test_the_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("response", "right"),
    [("so it is 1,050.", True), ("1050.00", True), ("#### 1051", False), ("-1050", False), ("none", False)],
)
def test_numbers_are_compared_as_numbers(response, right):
    assert final_number_match(response, "10 * 105 = <<10*105=1050>>1050\n#### 1050") is right


def test_a_reference_without_a_number_is_an_error():
    with pytest.raises(DataError, match=r"expected a number in the answer of a GSM8K example, found 'many'"):
        final_number_match("3", "many")


def test_exact_match_heeds_all_but_white_space_around():
    assert exact_match(" a b\n", "a b")
    assert not exact_match("a  b", "a b")
    assert not exact_match("A b", "a b")


def f_measure(shared, response, reference):
    precision, recall = shared / response, shared / reference
    return 2 * precision * recall / (precision + recall)


def test_rouge_by_hand():
    response, reference = "the cat sat on a mat", "a cat lay on the mat"
    # Shared words: the, cat, on, a, mat; shared pairs: none; longest common subsequence: cat on mat.
    assert METRICS["rouge1"](response, reference) == pytest.approx(f_measure(5, 6, 6))
    assert METRICS["rouge2"](response, reference) == 0
    assert METRICS["rougeL"](response, reference) == pytest.approx(f_measure(3, 6, 6))
    assert METRICS["rouge1"]("", reference) == 0
    assert METRICS["rouge1"]("painted", "painting") == 1  # the stemmer


def test_metrics_are_found_by_name():
    assert find_metric("gsm8k") == ("final number", final_number_match)
    assert find_metric("perplexity") == ("perplexity", None)
    assert find_metric(str.startswith)[0] == "startswith"
    with pytest.raises(DataError, match=r"expected a metric, exact, gsm8k, .*, perplexity, found 'bleu'"):
        find_metric("bleu")


def test_a_missing_package_is_named(monkeypatch):
    from geomkit.training import metrics

    metrics._scorer.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(DataError, match=r"expected the package rouge-score for the metric 'rouge2'.*geomkit\[rouge\]"):
        find_metric("rouge2")
