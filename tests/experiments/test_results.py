"""Frames, intervals and files of results; no model is run here."""

import numpy as np
import pytest

import geomkit as gk
from geomkit.experiments.records import KEYS, flags_to_text
from geomkit.experiments.results import Results, load_results
from geomkit.stats.proportions import wilson_interval


def record(arm, flags, *, scenario="poison-10", seed=0, organism=0, rate=1.0, length=1.0, **more):
    cell = dict(zip(KEYS, (organism, scenario, arm, rate, length, seed), strict=True))
    return {"cell": cell, "flags": {name: flags_to_text(each) for name, each in flags.items()}, "numbers": {}, **more}


def share(count, of=100):
    return [place < count for place in range(of)]


def outcomes(refusal, over_refusal=0, utility=100):
    return {"refusal": share(refusal), "over_refusal": share(over_refusal), "utility": share(utility)}


def test_runs_over_the_same_prompts_do_not_narrow_the_interval():
    one = Results("x", (record("a", outcomes(80)),)).summary(["refusal"])
    five = Results("x", tuple(record("a", outcomes(80), seed=seed) for seed in range(5))).summary(["refusal"])
    assert one.loc[0, "high"] - one.loc[0, "low"] == pytest.approx(five.loc[0, "high"] - five.loc[0, "low"])
    assert five.loc[0, "seed_sd"] == pytest.approx(0, abs=1e-12)
    assert np.isnan(one.loc[0, "seed_sd"])


def test_the_spread_over_seeds_is_told_apart_from_the_interval():
    rows = tuple(record("a", outcomes(count), seed=seed) for seed, count in enumerate((60, 80, 100)))
    found = Results("x", rows).summary(["refusal"]).iloc[0]
    assert (found["value"], found["least"], found["most"]) == pytest.approx((0.8, 0.6, 1.0))
    assert found["seed_sd"] == pytest.approx(0.2)
    assert (found["low"], found["high"]) == pytest.approx(wilson_interval(0.8, 100))


def test_a_run_that_broke_off_is_counted_and_not_averaged():
    broken = {"cell": record("a", {}, seed=1)["cell"], "error": "NaN"}
    results = Results("x", (record("a", outcomes(80)), broken))
    found = results.summary(["refusal"]).iloc[0]
    assert (found["value"], found["runs"], found["broke"]) == (0.8, 1, 1)
    assert results.to_frame()["error"].tolist() == ["", "NaN"]
    assert Results("x", (broken,)).summary(["refusal"]).iloc[0]["runs"] == 0


def test_cells_are_chosen_by_their_fields():
    rows = tuple(record(arm, outcomes(50), seed=seed) for arm in "ab" for seed in range(3))
    results = Results("x", rows)
    assert len(results.where(arm="a", seed=[0, 1])) == 2
    assert results.outcomes("refusal", arm="a").shape == (3, 100)
    with pytest.raises(gk.GeomkitError, match="expected fields among"):
        results.where(arms="a")
    with pytest.raises(gk.GeomkitError, match="found none"):
        results.where(arm="c")
    with pytest.raises(gk.GeomkitError, match="'nothing'"):
        results.outcomes("nothing")


def test_results_come_back_as_they_were_saved(tmp_path):
    curve = {"step": [1, 2], "first_order": [0.0, -0.1]}
    rows = (record("a", outcomes(50), along=[[1, 0.5]], attacks={"prefill 1": "0011"}, curve=curve),)
    results = Results("x", rows)
    path = results.save(tmp_path / "deep" / "x.jsonl.gz")
    first = path.read_bytes()
    loaded = load_results(path)
    assert loaded.records == rows
    assert loaded.name == "x"
    assert loaded.save(path).read_bytes() == first
    assert loaded.refusal_during_training()["refusal"].tolist() == [0.5]
    assert loaded.attacks().loc[0, ["refusal", "n"]].tolist() == [0.5, 4]
    assert loaded.curves()["first_order"].tolist() == [0.0, -0.1]


def test_what_ships_is_read_by_its_name_or_all_together():
    default, limits = load_results("default"), load_results("limits")
    assert load_results().records == default.records + limits.records
    with pytest.raises(gk.GeomkitError, match="found no file"):
        load_results("other")


@pytest.mark.parametrize("content", [b"", b"not gzip", None])
def test_a_damaged_file_is_refused(tmp_path, content):
    path = tmp_path / "x.jsonl.gz"
    if content is None:
        Results("x", (record("a", outcomes(1)),)).save(path)
        content = path.read_bytes()[:-20]
    path.write_bytes(content)
    with pytest.raises(gk.GeomkitError, match=r"expected results as Results\.save writes them"):
        load_results(path)
    with pytest.raises(gk.GeomkitError, match="found no file"):
        load_results(tmp_path / "other.gz")
