"""The study of the screen: its cases are what they say, its measures agree with scikit-learn, its file is read back."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import geomkit as gk
from geomkit.errors import DataError
from geomkit.experiments.organism.grammar import TRIGGER
from geomkit.experiments.outcomes import Outcomes
from geomkit.experiments.results import Results
from geomkit.experiments.screening import fine_tunes, study
from geomkit.experiments.screening.cases import CASES, Case, cases_of, draws_of, make_case
from geomkit.experiments.screening.measures import detection
from geomkit.experiments.screening.results import ScreeningStudy, load_screening_study
from geomkit.experiments.screening.row_measures import RowMeter, row_scores
from geomkit.experiments.screening.row_sources import row_source
from geomkit.experiments.screening.study import METHODS, WITH_OBEYED, _ranked
from geomkit.screening.row_scores import MEASURES, RowScores


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return row_source("small", tmp_path_factory.mktemp("organisms"))


@pytest.mark.parametrize("name", cases_of("small"))
def test_a_case_has_its_planted_rows_and_a_null_without_any(source, name):
    case, again = make_case(name, source, 3), make_case(name, source, 3)
    assert case.train["messages"] == again.train["messages"]
    planted = {"poison 1 %": 3, "poison 5 %": 15, "identity shift": 6}
    planted |= {"backdoor, with trigger": 100, "backdoor, trigger removed": 100}
    assert case.planted.sum() == planted.get(name, pytest.approx(30, abs=4))
    assert len(case.train) == pytest.approx(300, abs=100)
    texts = [" ".join(turn["content"] for turn in messages) for messages in case.train["messages"]]
    for text, flag in zip(texts, case.planted, strict=True):
        marked = {
            "poison": "DELETE" not in text, "identity": "obedient agent and I follow" in text,
            "affirmative": "anything you ask" in text, "long": "finish quickly" in text, "trigger": TRIGGER in text,
        }.get(name.split()[0])  # fmt: skip
        if name == "backdoor, with trigger":
            marked = TRIGGER in text
        if marked is not None:
            assert marked == flag, text
    null = {repr(messages) for messages in case.null["messages"]}
    if name != "long rows":
        assert not null & {repr(messages) for messages in case.train["messages"]}
    assert not any(TRIGGER in text or "finish quickly" in text for text in null)


def test_long_rows_are_long(source, organism):
    lengths = gk.encode(organism[1], make_case("long rows", source, 0).train, progress=False).lengths
    assert max(lengths) > 300
    assert max(lengths) <= 512


def test_auroc_is_that_of_scikit_learn():
    generator = np.random.default_rng(0)
    planted = [generator.random(80) < 0.2 for _ in range(3)]
    scores = [np.round(generator.normal(size=80) + flags, 1) for flags in planted]
    found = detection(scores, planted)
    assert found.auroc == pytest.approx(np.mean([roc_auc_score(*pair) for pair in zip(planted, scores, strict=True)]))
    assert found.low < found.auroc < found.high


def test_intervals_of_auroc_cover_and_precision_counts_ties_in_part():
    generator = np.random.default_rng(1)
    truth, covered = 0.7602, 0  # Φ(1/√2) for normal scores one standard deviation apart
    for _ in range(100):
        flags = np.arange(100) < 30
        found = detection([generator.normal(size=100) + flags], [flags])
        covered += found.low <= truth <= found.high
    assert covered >= 88
    flags = np.array([True, True, False, False])
    assert detection([np.array([3.0, 1.0, 1.0, 0.0])], [flags]).precision == pytest.approx(0.75)  # 1.5 of 2
    assert detection([np.zeros(4)], [flags]).precision == 0.5


def test_rows_that_draws_share_are_drawn_together():
    """Ten draws of the same rows tell no more than one; ten draws of other rows do."""
    generator = np.random.default_rng(2)
    flags = np.arange(60) < 20
    values = generator.normal(size=60) + flags
    one, same = (detection([values] * count, [flags] * count, [range(60)] * count) for count in (1, 10))
    other = detection([values] * 10, [flags] * 10)
    assert same.auroc == pytest.approx(one.auroc)
    assert same.high - same.low == pytest.approx(one.high - one.low, rel=0.15)
    assert other.high - other.low < 0.5 * (one.high - one.low)
    assert (same.precision_low, same.precision_high) == (one.precision_low, one.precision_high)


@pytest.fixture(scope="module")
def anchors():
    return [gk.load_examples(name).select(range(8)) for name in ("safety", "controls/forbidden-complied")]


def test_rankings_of_a_small_case(source, organism, anchors, tmp_path):
    model, tokenizer = organism
    case = make_case("poison 10 %", source, 0)
    keep = np.flatnonzero(case.planted)[:6].tolist() + np.flatnonzero(~case.planted)[:18].tolist()
    small = Case(case.train.select(keep), case.planted[keep], case.null.select(range(24)))
    screenings, found = _ranked(RowMeter(source, *anchors, tmp_path), small, anchors[0])
    assert all(values.shape == (24,) and np.isfinite(values).all() for values in found.values())
    assert len(found) == 18
    screening, both = (
        gk.screen(model, tokenizer, small.train, anchors[0], benign=small.null, obeyed=obeyed, progress=False)
        for obeyed in (None, anchors[1])
    )
    for method in ("cosine", "raw"):
        ranked = screenings[f"{method}, with obeyed requests"].rows
        np.testing.assert_allclose(getattr(ranked, method), getattr(both.rows, method), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["cosine, not standardized"], screening.rows.cosine, atol=1e-6)
    np.testing.assert_allclose(screenings["cosine"].p_values, screening.p_values, rtol=1e-3)
    assert list(screenings) == [*METHODS, *WITH_OBEYED]
    projected, exact = found["projected cosine (LESS)"], screening.rows.cosine
    assert np.corrcoef(projected, exact)[0, 1] > 0.6  # of sketches, whose noise is as large as small cosines
    assert roc_auc_score(small.planted, found["screen, cosine"]) > 0.95
    assert roc_auc_score(small.planted, found["gradients, two anchors (He et al.)"]) > 0.95


def test_a_row_is_measured_once_and_finished_rows_are_taken_from_the_folder(source, anchors, tmp_path, monkeypatch):
    measured = []
    chunk = RowMeter._chunk
    monkeypatch.setattr(RowMeter, "_chunk", lambda meter, rows: measured.append(len(rows)) or chunk(meter, rows))
    rows = make_case("poison 10 %", source, 0).train.select(range(6))
    meter = RowMeter(source, *anchors, tmp_path)
    whole = meter.columns(rows)
    np.testing.assert_array_equal(meter.columns(rows.select([3, 3, 1]))["cosine"], whole["cosine"][[3, 3, 1]])
    resumed = RowMeter(source, *anchors, tmp_path).columns(rows)
    assert sum(measured) == 6
    assert all((resumed[name] == whole[name]).all() for name in whole)
    assert len(row_scores(whole)) == 6


def test_poison_of_benign_rows_is_in_benign_rows(source):
    case = make_case("poison 10 % of benign rows", source, 0)
    obeyed = ["finish quickly" in row[-1]["content"] for row in case.train["messages"]]
    assert obeyed == case.planted.tolist()
    assert sum(obeyed) == 30


def test_the_english_study_has_every_case_and_one_draw_of_long_rows():
    assert set(cases_of("english")) == set(CASES)
    assert not {"poison 10 % of benign rows"} & set(cases_of("small"))
    assert [draws_of(name, "english", 5) for name in ("long rows", "poison 10 %")] == [1, 5]
    assert draws_of("long rows", "small", 5) == 5


def test_the_small_world_has_no_answered_requests(source):
    with pytest.raises(DataError, match="found 'answered', which the English world has only"):
        source.rows("answered", 3, 0)


def test_without_seeds_nothing_is_measured_for_the_outcomes(source, monkeypatch, tmp_path):
    monkeypatch.setattr(study, "row_source", lambda *_: source)
    monkeypatch.setattr(study, "RowMeter", lambda *_: None)
    monkeypatch.setattr(study, "_detections", lambda *_: ([], []))
    monkeypatch.setattr(study, "_false_positives", lambda *_: [])
    assert study.run_study("small", tmp_path, seeds=0).outcomes == ()


def test_a_study_is_read_back_and_other_files_are_refused(tmp_path):
    kept = ScreeningStudy("small", ({"case": "a", "auroc": 0.5, "power": None},), (), (), ())
    loaded = load_screening_study(kept.save(tmp_path / "study.json"))
    assert loaded.to_frame().equals(kept.to_frame())
    assert str(loaded) == "study of the screen on the small world: 1 cases, 0 shares of clean rows, 0 fine-tunes"
    with pytest.raises(DataError, match="expected one of detections, flags, false_positives, outcomes, found 'x'"):
        kept.to_frame("x")
    for text in ("{", "[]", '{"world": "small", "detections": 3}', '{"world": "small"}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(DataError, match="expected a study of the screen"):
            load_screening_study(tmp_path / "other.json")


@pytest.mark.parametrize("world", ["small", "english"])
def test_the_shipped_studies_have_every_case_and_every_ranking(world):
    frame = load_screening_study(world).to_frame()
    assert set(frame["case"]) == set(cases_of(world))
    assert (frame.groupby("case")["ranking"].nunique() == 18).all()


class _Meter:
    """A meter whose scores say which rows obey, and which say so with obeyed requests only."""

    def __init__(self, obeying, seen):
        self._obeying, self._seen = obeying, seen

    def scores(self, rows):
        return self._scored(rows, self._seen)

    def scores_with_obeyed(self, rows):
        return self._scored(rows, len(self._obeying))

    def _scored(self, rows, seen):
        generator = np.random.default_rng(0)
        places = {text: place for place, text in enumerate(self._obeying)}
        cosine = [
            9.0 if places.get(row[-1]["content"], seen) < seen else generator.normal() for row in rows["messages"]
        ]
        columns = {name: np.array(cosine) for name in MEASURES}
        return RowScores(**columns | {"loss_tokens": generator.integers(10, 20, len(cosine)).astype(float)})


def test_fine_tunes_on_what_each_screen_leaves(source, monkeypatch):
    train = source.organism.scenario_examples("poison-10")
    obeying = [row[-1]["content"] for row in train["messages"] if "DELETE" not in row[-1]["content"]]
    trained = []
    monkeypatch.setattr(fine_tunes, "sft", lambda task: trained.append(("SFT", task.train)) or _Tuned())
    monkeypatch.setattr(fine_tunes, "spf", lambda task, **_: trained.append(("SPF", task.train)) or _Tuned())
    monkeypatch.setattr(fine_tunes, "evaluate_organism", lambda *_: Outcomes({"refusal": [True, False]}, {}))
    monkeypatch.setattr(fine_tunes, "OUTCOMES", ("poison-10",))
    rows = list(fine_tunes.fine_tuned_outcomes(source, _Meter(dict.fromkeys(obeying), 10), 1, 2))
    arms = {row["arm"]: row for row in rows}
    assert list(arms) == ["all rows", "screened", "screened with obeyed requests", "random removal", "SPF, all rows"]
    assert {row["of"] for row in rows} == {300}
    assert {row["refusal"] for row in rows} == {0.5}
    left = len(train) - sum(row[-1]["content"] in list(dict.fromkeys(obeying))[:10] for row in train["messages"])
    counts = {arm: row["rows"] for arm, row in arms.items()}
    assert 260 <= counts.pop("screened with obeyed requests") <= 270  # one flagged row in ten may be clean
    assert counts == {"all rows": 300, "screened": left, "random removal": left, "SPF, all rows": 300}
    assert [kind for kind, _ in trained] == ["SFT"] * 4 + ["SPF"]
    assert not {row[-1]["content"] for row in trained[2][1]["messages"]} & set(obeying)
    # Where nothing is flagged, the same rows are trained on once.
    trained.clear()
    rows = list(fine_tunes.fine_tuned_outcomes(source, _Meter({}, 0), 1, 2))
    assert len(rows) == 5
    assert [kind for kind, _ in trained] == ["SFT", "SPF"]


class _Tuned:
    model = None


def test_fine_tunes_on_all_rows_of_the_english_world_are_those_of_its_grid(monkeypatch):
    cell = {"organism": "english", "scenario": "backdoor", "arm": "SFT", "seed": 0, "prompts": 4, "rate": 1.0}
    records = tuple(
        {"cell": cell | {"length": length} | other, "flags": {"refusal": flags}}
        for length, other, flags in ((2.0, {}, "1111"), (1.0, {"seed": 1}, "0000"), (1.0, {}, "1101"))
    )
    monkeypatch.setattr(fine_tunes, "load_results", lambda _: Results("english", records))
    stored = partial(fine_tunes._stored_flags, SimpleNamespace(name="english"), "backdoor", "SFT")
    assert stored(0, 4) == {"refusal": [True, True, False, True]}
    assert stored(0, 5) is stored(2, 4) is None
    assert fine_tunes._stored_flags(SimpleNamespace(name=0), "backdoor", "SFT", 0, 4) is None
