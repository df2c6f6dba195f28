"""Tables for people: no word is cut, no number is lost, and what says nothing is left out."""

import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geomkit.utils.readable import readable, text_table, with_interval, wrapped_cells

NAN = float("nan")
words = st.text("abcdefgh", min_size=1, max_size=12)
intervals = st.builds("[-{}, {}]".format, words, words)
cells = st.lists(words | intervals, max_size=8).map(" ".join)
tables = st.integers(1, 5).flatmap(
    lambda columns: st.lists(st.lists(cells, min_size=columns, max_size=columns), min_size=1, max_size=5)
)


@given(rows=tables, width=st.integers(1, 100))
def test_cells_are_broken_between_words_only_and_fit_where_words_allow(rows, width):
    lines = wrapped_cells(rows, width)
    for row, wrapped in zip(rows, lines, strict=True):
        for cell, parts in zip(row, wrapped, strict=True):
            assert " ".join(parts) == cell
            assert not any(part.count("[") != part.count("]") for part in parts)
    columns = list(zip(*lines, strict=True))
    needed = [max(len(line) for cell in column for line in cell) for column in columns]
    longest = [max((len(word) for row in rows for word in row[place].replace(", ", ",_").split()), default=0)
               for place in range(len(columns))]  # fmt: skip
    assert sum(needed) <= max(width, sum(longest))


def test_a_table_of_text_fits_eighty_columns():
    rows = [("claim", "verdict"), ("a word and " * 20, "not shown, perhaps not about alignment")]
    assert max(map(len, text_table(rows))) <= 80


@given(value=st.floats(-1e6, 1e6), below=st.floats(1e-8, 1e5), above=st.floats(1e-8, 1e5), sign=st.booleans())
def test_a_number_is_rounded_to_two_digits_of_half_its_interval(value, below, above, sign):
    low, high = value - below, value + above
    text = with_interval(value, (low, high), sign=sign)
    number, ends = text.split(" ", 1)
    shown = [float(number), *(float(end) for end in ends.strip("[]").split(", "))]
    step = 10.0 ** (math.floor(math.log10((high - low) / 2)) - 1)
    for exact, rounded in zip((value, low, high), shown, strict=True):
        # Large intervals are shown up to the decimal point.
        assert abs(exact - rounded) <= 0.5 * step * (1 + 1e-6) + 1e-9 * abs(exact)
    assert number.startswith(("+", "-")) or not sign


def test_a_number_without_interval_has_three_digits():
    assert with_interval(0.123456, (NAN, NAN)) == "0.123"
    assert with_interval(NAN, (-1.0, 1.0)) == "– [-1.0, 1.0]"
    assert with_interval(NAN, (NAN, NAN)) == "–"


def test_intervals_join_the_number_before_them_and_empty_columns_go():
    frame = pd.DataFrame(
        {
            "parameter": ["a", "a", "b"], "statistic": ["x", "y", "x"], "cosine": [0.5, 0.25, 1.0],
            "corrected": [0.2, -0.1, NAN], "low": [0.1, -0.2, NAN], "high": [0.3, 0.0, NAN],
            "null_low": [-0.1, -0.1, -0.1], "null_high": [0.1, 0.1, 0.1], "note": ["", None, ""], "q": [NAN] * 3,
            "difference": [1.0, -1.0, 0.0], "difference_low": [0.5, -1.5, -0.5], "difference_high": [1.5, -0.5, 0.5],
            "layer": [0.0, NAN, 1.0], "n": [12345, 1, 2],
        }
    )  # fmt: skip
    shown = readable(frame)
    assert shown.to_dict("list") == {
        "parameter": ["a", "", "b"],
        "statistic": ["x", "y", "x"],
        "cosine": ["0.5", "0.25", "1"],
        "corrected": ["0.20 [0.10, 0.30]", "-0.10 [-0.20, 0.00]", "–"],
        "null": ["[-0.10, 0.10]"] * 3,
        "difference": ["+1.00 [+0.50, +1.50]", "-1.00 [-1.50, -0.50]", "+0.00 [-0.50, +0.50]"],
        "layer": ["0", "–", "1"],
        "n": ["12345", "1", "2"],
    }


def test_a_label_is_repeated_where_a_label_at_its_left_is_new():
    frame = pd.DataFrame({"set": ["a", "b", "b"], "kind": ["k", "k", "k"], "n": [1, 2, 3]})
    assert readable(frame)["kind"].tolist() == ["k", "k", ""]


@pytest.mark.parametrize("frame", [pd.DataFrame(), pd.DataFrame({"a": []}), pd.DataFrame({"a": [NAN, NAN]})])
def test_a_frame_without_values_has_no_columns(frame):
    assert list(readable(frame).columns) == []
