import math

import pytest

from geomkit.analysis.claims import Claim, claims_frame, claims_table


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


CLAIMS = [
    Claim("rank?", "low", -3.0, (-4.0, -2.0)),
    Claim("one?", "much", 0.5, (0.4, 0.6), 0.8, above=True),
]


def test_a_frame_has_a_row_for_each() -> None:
    frame = claims_frame(CLAIMS)
    assert list(frame["verdict"]) == ["holds", "reversed"]
    assert list(frame.columns) == ["question", "claim", "value", "low", "high", "bound", "verdict"]


def test_a_table_is_to_be_read() -> None:
    assert claims_table(CLAIMS).to_numpy().tolist() == [
        ["low", "-3 [-4, -2]", "holds"],
        ["much", "0.5 [0.4, 0.6]", "reversed"],
    ]
