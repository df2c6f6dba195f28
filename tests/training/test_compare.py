"""Evaluations are compared prompt by prompt; p-values against scipy's binomial and flips written out here."""

from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from geomkit.errors import DataError
from geomkit.stats.proportions import Rate
from geomkit.training.compare import compare_evaluations
from geomkit.training.evaluation import Evaluation, load_evaluation

SETTINGS = {"judges": ["keywords"], "metrics": {"sum": "rouge1"}, "max_new_tokens": 8}
BEFORE = {"refused": [1, 1, 1, 1, 1, 1, 0, 0], "value": [0.2, 0.9, 0.4, 0.5]}
AFTER = {"refused": [1, 0, 0, 0, 0, 0, 0, 1], "value": [0.3, 0.4, 0.1, 0.5]}


def made(values, *, prompts="abcdefgh", **settings):
    rows = [
        {"set": "forbidden", "prompt": prompt, "response": "", "reference": None, "refused": bool(flag)}
        for prompt, flag in zip(prompts, values["refused"], strict=True)
    ]
    rows += [
        {"set": "sum", "prompt": "same", "response": "", "reference": str(place), "refused": False, "value": value}
        for place, value in enumerate(values["value"])
    ]
    return Evaluation(Rate(0, 0), Rate(0, 0), {}, pd.DataFrame(rows), settings=SETTINGS | settings)


def test_paired_tests_by_hand():
    frame = compare_evaluations({"before": made(BEFORE), "after": made(AFTER)}).to_frame().set_index("measure")
    refusal, rouge = frame.loc["refusal"], frame.loc["rouge1: sum"]
    assert refusal[["baseline", "value", "difference"]].tolist() == [0.75, 0.25, -0.5]
    assert refusal[["n", "more", "less", "test"]].tolist() == [8, 1, 5, "McNemar"]
    assert refusal["p"] == pytest.approx(binomtest(1, 6).pvalue)
    assert rouge[["n", "more", "less", "test"]].tolist() == [4, 1, 2, "sign flips"]
    differences = np.array([0.1, -0.5, -0.3])
    flips = np.array(list(product([-1, 1], repeat=3))) @ differences
    assert rouge["p"] == pytest.approx((np.abs(flips) >= abs(differences.sum()) - 1e-12).mean())
    assert frame["q"].max() == pytest.approx(frame["p"].max())


def test_the_order_of_prompts_does_not_matter():
    other = made(AFTER)
    shuffled = replace(other, responses=other.responses.sample(frac=1, random_state=0))
    frames = [compare_evaluations({"before": made(BEFORE), "after": after}).to_frame() for after in (other, shuffled)]
    pd.testing.assert_frame_equal(*frames)


def test_a_prompt_that_comes_twice_is_two_prompts():
    found = compare_evaluations({"a": made(BEFORE, prompts="aacdefgh"), "b": made(AFTER, prompts="aacdefgh")})
    assert found.to_frame()["n"].tolist() == [8, 4]
    with pytest.raises(DataError, match="found 1 of 8 in a that b lacks, the first 'a'"):
        compare_evaluations({"a": made(BEFORE, prompts="aacdefgh"), "b": made(AFTER, prompts="abcdefgh")})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            made(AFTER, prompts="abcdefgx"),
            "refusal: expected the same prompts in a and b, found 1 of 8 in a that b lacks",
        ),
        (made(AFTER, judges=["gcg"]), r"expected the same judges in a and b, found \['keywords'\] and \['gcg'\]"),
        (made(AFTER, max_new_tokens=9), "expected the same max_new_tokens in a and b, found 8 and 9"),
        (made(AFTER, metrics={"sum": "rouge2"}), "expected the same metrics"),
    ],
)
def test_what_cannot_be_compared(other, message):
    with pytest.raises(DataError, match=message):
        compare_evaluations({"a": made(BEFORE), "b": other})


def test_other_sets_too_few_evaluations_and_none():
    some = made(BEFORE)
    forbidden = replace(some, responses=some.responses[some.responses["set"] == "forbidden"])
    with pytest.raises(DataError, match="expected the same sets in a and b, found refusal, rouge1: sum and refusal"):
        compare_evaluations({"a": some, "b": forbidden})
    with pytest.raises(DataError, match="expected two evaluations or more to compare, found 1"):
        compare_evaluations({"a": some})
    with pytest.raises(DataError, match="expected outcomes of prompts in a, found none"):
        compare_evaluations({"a": replace(some, responses=some.responses[:0]), "b": some})


def test_files_that_are_no_evaluations(tmp_path):
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "torn.json").write_text("{")
    (tmp_path / "other.json").write_text('{"format": "x"}')
    for name, message in (
        ("nowhere.json", "found No such file"),
        ("torn.json", "found no JSON"),
        ("list.json", "found format 'list'"),
        ("other.json", "found format 'x'"),
    ):
        with pytest.raises(DataError, match=message):
            load_evaluation(tmp_path / name)
