import math

import pytest

from geomkit.claims import Claim, claims_frame


@pytest.mark.parametrize(
    ("interval", "above", "verdict"),
    [
        ((-2.0, -1.0), False, "holds"),
        ((1.0, 2.0), False, "reversed"),
        ((-1.0, 1.0), False, "not shown"),
        ((-1.0, 0.0), False, "not shown"),
        ((1.0, 2.0), True, "holds"),
        ((-2.0, -1.0), True, "reversed"),
        ((0.0, 2.0), True, "not shown"),
        ((math.nan, math.nan), True, "not shown"),
        ((math.nan, math.nan), False, "not shown"),
    ],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(interval, above, verdict) -> None:
    assert Claim("q", "c", 0.0, interval, above=above).verdict == verdict
    shifted = (interval[0] + 5, interval[1] + 5)
    assert Claim("q", "c", 5.0, shifted, bound=5.0, above=above).verdict == verdict


def test_a_frame_has_a_row_for_each() -> None:
    frame = claims_frame(
        [Claim("rank?", "low", -3.0, (-4.0, -2.0)), Claim("one?", "much", 0.5, (0.4, 0.6), 0.8, above=True)]
    )
    assert list(frame["verdict"]) == ["holds", "reversed"]
    assert list(frame.columns) == ["question", "claim", "value", "low", "high", "bound", "verdict"]
