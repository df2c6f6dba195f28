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
    assert Claim("q", "c", "o", "n", 0.0, interval, above=above).verdict == verdict
    shifted = (interval[0] + 5, interval[1] + 5)
    assert Claim("q", "c", "o", "n", 5.0, shifted, bound=5.0, above=above).verdict == verdict


CLAIMS = [
    Claim("rank?", "It is low.", "It is high.", "rank, a − b", -3.0, (-4.0, -2.0)),
    Claim("one?", "It is much.", "It is little.", "overlap", 0.5, (0.4, 0.6), 0.8, above=True, caveat="perhaps"),
    Claim("one?", "It is much.", "It is little.", "overlap", 0.8, (0.7, 0.9), 0.8, above=True),
]


def test_a_frame_has_a_row_for_each() -> None:
    frame = claims_frame(CLAIMS)
    assert list(frame["verdict"]) == ["holds", "reversed, perhaps", "not shown"]
    assert list(frame.columns) == ["question", "claim", "number", "value", "low", "high", "bound", "verdict"]


def test_a_table_is_to_be_read() -> None:
    assert claims_table(CLAIMS).to_numpy().tolist() == [
        ["It is low.", "holds", "rank, a − b: -3.0 [-4.0, -2.0]"],
        ["It is much.", "reversed, perhaps", "overlap: +0.50 [+0.40, +0.60]"],
        ["It is much.", "not shown", "overlap: +0.80 [+0.70, +0.90]"],
    ]


def test_a_finding_is_the_claim_its_opposite_or_neither() -> None:
    assert [claim.finding for claim in CLAIMS] == ["It is low.", "It is little.", "It is not shown that it is much."]
