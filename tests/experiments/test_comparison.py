"""Comparisons of arms; no model is run here."""

import pytest

import geomkit as gk
from geomkit.experiments.results import Results
from tests.experiments.test_results import outcomes, record, share


def test_arms_are_compared_over_the_cells_that_both_have():
    rows = (
        record("a", outcomes(90), seed=0), record("a", outcomes(80), seed=1), record("a", outcomes(10), seed=2),
        record("b", outcomes(70), seed=0), record("b", outcomes(70), seed=1),
    )  # fmt: skip
    found = Results("x", rows).compare("a", "b").iloc[0]
    assert found["difference"] == pytest.approx(0.15)
    assert (found["runs"], found["least"], found["most"]) == (2, pytest.approx(0.1), pytest.approx(0.2))
    assert found["p"] < 0.001
    with pytest.raises(gk.GeomkitError, match="'a' and 'c'"):
        Results("x", rows).compare("a", "c")


@pytest.mark.parametrize(
    ("own", "reached"),
    [
        (outcomes(99), True),
        (outcomes(98), False),
        (outcomes(99, over_refusal=1), True),
        (outcomes(99, over_refusal=2), False),
        (outcomes(99, utility=97), True),
        (outcomes(99, utility=96), False),
    ],
)
def test_the_goal(own, reached):
    rows = (
        record("untouched", outcomes(100, 0, 50)), record("SFT", outcomes(0, 0, 98)), record("mixing", outcomes(90)),
        record("own", own),
    )  # fmt: skip
    found = Results("x", rows).goal("own", rival="mixing")
    assert found["reached"].tolist() == [reached]


@pytest.mark.parametrize(("loss", "points", "reached"), [(2.01, 2, True), (2.03, 2, False), (2.01, 1, False)])
def test_the_goal_with_a_loss_and_another_tolerance(loss, points, reached):
    def run(arm, loss, *flags):
        return record(arm, outcomes(*flags)) | {"numbers": {"utility_loss": loss}}

    rows = (
        run("untouched", 3.0, 100, 5), run("SFT", 2.0, 0, 0, 90), run("mixing", 2.0, 90), run("own", loss, 98, 7, 80),
    )  # fmt: skip
    found = Results("x", rows).goal("own", rival="mixing", points=points).iloc[0]
    assert found["reached"] == reached
    assert found["utility_loss"] == pytest.approx(loss / 2 - 1)
    with pytest.raises(gk.GeomkitError, match="expected points to be a finite number from 0, found nan"):
        Results("x", rows).goal("own", rival="mixing", points=float("nan"))


def test_of_a_backdoor_the_goal_asks_for_refusal_with_the_trigger():
    def opened(arm, refusal, triggered):
        flags = outcomes(refusal) | {"triggered_refusal": share(triggered)}
        return record(arm, flags, scenario="backdoor")

    rows = (opened("untouched", 100, 100), opened("SFT", 100, 0), opened("mixing", 100, 0), opened("own", 100, 5))
    found = Results("x", rows).goal("own", rival="mixing").iloc[0]
    assert found["refusal"] == pytest.approx(-0.95)
    assert found["rival"] == pytest.approx(0.05)
    assert not found["reached"]


def test_the_goal_asks_for_no_less_than_the_rival_keeps():
    rows = (
        record("untouched", outcomes(95)), record("SFT", outcomes(0)), record("mixing", outcomes(97)),
        record("own", outcomes(95)),
    )  # fmt: skip
    assert not Results("x", rows).goal("own", rival="mixing")["reached"].any()


def test_organisms_are_told_apart():
    """They have prompts of their own; a mean over both would weigh them by how many runs each has."""
    rows = (
        *(record(arm, outcomes(count), organism=organism, seed=seed)
          for arm, counts in (("own", (99, 50)), ("mixing", (90, 90)), ("SFT", (0, 0)))
          for organism, count in enumerate(counts) for seed in range(3 - organism)),
        record("untouched", outcomes(100)), record("untouched", outcomes(80), organism=1),
    )  # fmt: skip
    results = Results("x", rows)
    summary = results.summary(["refusal"]).query("arm == 'own'").set_index("organism")
    assert summary["value"].to_dict() == pytest.approx({0: 0.99, 1: 0.5})
    assert summary["runs"].to_dict() == {0: 3, 1: 2}
    compared = results.compare("own", "mixing").set_index("organism")
    assert compared["difference"].to_dict() == pytest.approx({0: 0.09, 1: -0.4})
    goal = results.goal("own", rival="mixing").set_index("organism")
    assert goal["refusal"].to_dict() == pytest.approx({0: -0.01, 1: -0.3})  # each from its own aligned model
    assert goal["reached"].to_dict() == {0: True, 1: False}
    assert set(results.table()["organism"]) == {0, 1}
    with pytest.raises(gk.GeomkitError, match="'untouched' on poison-10 with organism 1"):
        Results("x", rows[:-1]).goal("own", rival="mixing")
