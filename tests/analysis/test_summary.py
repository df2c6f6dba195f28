"""Tables and sentences for people have the numbers of the frame, and say what the verdicts say."""

import re

import pytest

import geomkit as gk
from geomkit.analysis import headlines as names
from geomkit.analysis.alignment import Alignment
from geomkit.analysis.claims import Claim
from geomkit.analysis.summary import summary_of
from geomkit.stats.proportions import Rate
from geomkit.utils.readable import with_interval
from tests.helpers.tiny import CONTROL, SAFETY, UTILITY, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def analysis():
    return gk.analyze(tiny_llama(), tiny_tokenizer(), SAFETY, UTILITY, control=CONTROL, null_draws=2, progress=False)


def test_every_measure_of_a_set_is_in_the_table_once(analysis):
    shown = analysis.numbers()
    assert list(shown.columns) == ["measure", "safety", "control", "utility"]
    sets = [row for row in analysis.headlines().values() if "−" not in row.of]
    rows = [number for number in shown["measure"] if not number.startswith("…")]
    assert len(rows) == len({row.measure for row in sets})
    cells = sum((shown[~shown["measure"].str.startswith("…")][name] != "–").sum() for name in shown.columns[1:])
    assert cells == len(sets)
    rank = analysis.headlines()[names.RANK, "utility"]
    line = shown[shown["measure"] == "effective rank of the mean gradient"]
    assert line["utility"].item() == with_interval(rank.value, rank.interval)


def test_a_question_has_its_rows_and_no_empty_column(analysis):
    shown = analysis.numbers("one sample?")
    assert list(shown.columns) == ["measure", "safety", "control"]
    assert len(shown) == 3


def test_no_cell_is_longer_than_two_numbers_need(analysis):
    pattern = re.compile(r"(–|[+-]?\d+(\.\d+)?(e-\d+)?)?( ?\[.*\])?")
    for name in ("safety", "control", "utility"):
        assert all(pattern.fullmatch(cell) for cell in analysis.numbers()[name]), name


def claim(verdict, number):
    interval = {"holds": (-2.0, -1.0), "reversed": (1.0, 2.0), "not shown": (-1.0, 1.0)}[verdict]
    of_control = number.endswith("control")
    texts = (f"It is less in {number}.", f"It is more in {number}.", number)
    return Claim("q", *texts, 0.0, interval, against_control=of_control)


ALIGNED = Alignment(Rate(32, 32), 0.1, 0.5)


def test_the_summary_has_what_holds_what_is_reversed_and_what_is_open():
    claims = [
        claim("not shown", "a − control"), claim("reversed", "b − control"), claim("holds", "c − control"),
        claim("holds", "d − utility"),
    ]  # fmt: skip
    assert summary_of(ALIGNED, claims) == (
        "The model refuses 100.0% [89.3%, 100.0%] of 32 safety requests.",
        "As the paper claims, it is less in c − control.",
        "On the other hand, it is more in b − control; it is not shown that it is less in a − control.",
    )


def test_the_summary_says_so_if_nothing_or_everything_holds():
    held, not_held = claim("holds", "control"), claim("not shown", "control")
    assert summary_of(ALIGNED, [held])[2] == "No claim on the control set fails."
    unaligned = Alignment(Rate(0, 32), 0.1, 0.5)
    assert summary_of(unaligned, [not_held])[1] == (
        "No difference between the safety set and the control set that the paper claims is shown; all of this is not "
        "about alignment."
    )
