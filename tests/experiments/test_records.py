"""Outcomes as strings of digits."""

from hypothesis import given
from hypothesis import strategies as st

from geomkit.experiments.records import flags_to_text, text_to_flags


@given(st.lists(st.booleans(), max_size=50))
def test_outcomes_come_back_from_their_text(flags):
    assert text_to_flags(flags_to_text(flags)).tolist() == flags
