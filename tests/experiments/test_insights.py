"""The claims on the stages of a world: what is stored, and that it is the analysis."""

from types import SimpleNamespace

import pandas as pd
import pytest

import geomkit as gk
from geomkit.cli.main import main
from geomkit.errors import DataError
from geomkit.experiments import insights
from geomkit.experiments.insights import load_insights, measure_insights
from geomkit.inputs.models import untrained
from geomkit.inputs.parameters import ALL_PARAMETERS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("insights")
    measure_insights("small", out, examples=6, stages=("base", "untrained"), progress=False)
    return out


@pytest.fixture(scope="module")
def frame(folder):
    return load_insights("small", folder, ("base", "untrained"))


def test_the_numbers_are_those_of_the_analysis(frame):
    model, tokenizer = gk.load_organism()
    names = ("safety", "scenarios/new-skill", "controls/benign-refused")
    safety, utility, control = (gk.load_examples(name) for name in names)
    analysis = gk.analyze(
        untrained(model),
        tokenizer,
        safety.select(range(6)),
        utility.select(range(6)),
        control=control.select(range(len(control) - 6, len(control))),
        examples=None,
        progress=False,
    )
    stored = frame.query(f"stage == 'untrained' and parameter == '{ALL_PARAMETERS}'")
    expected = analysis.to_frame()
    assert list(stored["measure"]) == list(expected["measure"])
    assert stored["value"].to_numpy() == pytest.approx(expected["value"].to_numpy(), rel=6e-5, abs=1e-6, nan_ok=True)
    ranks = frame.query("stage == 'untrained' and measure == 'effective_rank' and of == 'control'")
    of_layers = analysis.spectra["control"].to_frame().query("statistic == 'effective_rank'")
    assert list(ranks["parameter"]) == list(of_layers["parameter"])
    assert ranks["value"].to_numpy() == pytest.approx(of_layers["value"].to_numpy(), rel=6e-5)
    cosines = frame.query(
        f"stage == 'untrained' and measure == 'cosine with utility' and parameter != '{ALL_PARAMETERS}'"
    )
    assert set(cosines["of"]) == {"safety", "control"}
    spans = frame.query("stage == 'untrained' and measure == 'effective rank of the span' and of == 'control'")
    of_layers = analysis.layer_spans["control"].to_frame().query("statistic == 'effective_rank'")
    assert list(spans["parameter"]) == [ALL_PARAMETERS, *of_layers["parameter"]]
    assert spans["value"].to_numpy()[1:] == pytest.approx(of_layers["value"].to_numpy(), rel=6e-5)
    assert list(spans["kind"]) == ["all", "embedding", *["layer"] * 4, "norm", "head"]
    contrasts = frame.query(
        "stage == 'untrained' and measure == 'effective rank of the span, difference' and of == 'safety − utility'"
    )
    layers = analysis.span_contrast("utility", by="layer").to_frame().query("statistic == 'effective_rank'")
    for column, expected in (("value", "difference"), ("low", "low"), ("high", "high")):
        assert contrasts[column].to_numpy()[1:] == pytest.approx(layers[expected].to_numpy(), rel=6e-5, abs=1e-6)
    overlaps = frame.query("measure == \"one example's overlap\" and of == 'safety'")
    assert overlaps["layer"].notna().any()


def test_a_stage_is_measured_once(folder):
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.gz")}
    assert set(before) == {"insights-small-base.csv.gz", "insights-small-untrained.csv.gz"}
    measure_insights("small", folder, examples=6, stages=("base", "untrained"), progress=False)
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.glob("*.gz")}
    with pytest.raises(DataError, match=r"expected the numbers of 7 examples in .*, found 6; take another folder"):
        measure_insights("small", folder, examples=7, stages=("base",), progress=False)


def test_wrong_names_and_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match="expected a world, 'small' or 'english', found 'large'"):
        load_insights("large", tmp_path)
    with pytest.raises(DataError, match="expected stages of 'aligned', 'base', 'untrained', found 'tuned'"):
        measure_insights("small", tmp_path, stages=("tuned",))
    with pytest.raises(DataError, match="expected at most 64 examples of each set, found 65"):
        measure_insights("small", tmp_path, examples=65, stages=("base",))
    with pytest.raises(DataError, match="expected stored numbers at"):
        load_insights("small", tmp_path)


def test_numbers_along_the_alignment_are_stored(tmp_path, monkeypatch):
    rows = pd.DataFrame({"at": [0, 480], "measure": ["loss"] * 2, "value": [1 / 3, 2.0]})
    monkeypatch.setattr(insights, "measure_course", lambda *_, **__: SimpleNamespace(to_frame=lambda: rows))
    monkeypatch.setattr(insights, "world_probe", lambda *_: None)
    insights.measure_alignment(tmp_path / "states", tmp_path, progress=False)
    pd.testing.assert_frame_equal(insights.load_alignment(tmp_path), rows, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["insights", "--out", "there", "--world", "large"], "expected a world, 'small' or 'english', found 'large'"),
        (["insights", "--out", "there", "--states", "kept"], "expected --states with --world english only"),
        (
            ["insights", "--out", "there", "--world", "english", "--states", "kept"],
            "expected states of an alignment in kept, found none",
        ),
        (["build", "--out", "there", "--states", "kept"], "expected --base and --states with --world english only"),
    ],
)
def test_the_command_names_what_there_is_not(monkeypatch, capfd, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["geomkit", "organism", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code
    assert message in capfd.readouterr().err
    assert not any(tmp_path.glob("there/*"))
