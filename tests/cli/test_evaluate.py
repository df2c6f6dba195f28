"""``geomkit evaluate`` and ``geomkit compare`` on files, and what they refuse in one line."""

import json
from pathlib import Path

import pytest

from geomkit.cli.main import app
from geomkit.errors import DataError
from geomkit.training.evaluation import load_evaluation
from geomkit.training.judges import Verdict
from geomkit.training.model_judges.classifiers import ClassifierJudge
from tests.cli.test_commands import run
from tests.helpers.tiny import SAFETY, UTILITY, tiny_llama, tiny_tokenizer
from tests.training.model_judges.test_classifiers import TOKENIZER, by_last_word


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    for name, seed in (("model", 0), ("other", 1)):
        tiny_llama(seed=seed).save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    by_last_word().save_pretrained(root / "classifier")
    TOKENIZER.save_pretrained(root / "classifier")
    for name, examples in (("safety", SAFETY), ("utility", UTILITY)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
    (root / "xstest.csv").write_text(
        "id,prompt,type,label,focus,note\n1,how do i paint,a,safe,,\n2,help,a,safe,,\n3,steal the bike,b,unsafe,,\n"
    )
    (root / "gsm8k.jsonl").write_text(json.dumps({"question": "how", "answer": "#### 2"}) + "\n")
    return root


def evaluating(files, *arguments, model="model"):
    return ["evaluate", "--model", files / model, "--max-new-tokens", 4, *arguments]


def one_line(status, out, err):
    """The message of a refusal: a line on stderr, nothing on stdout."""
    assert status == 1, out
    assert out == ""
    assert err.startswith("geomkit: ")
    assert err.count("\n") == 1
    return err


def test_what_is_given_is_evaluated_and_compared(files, monkeypatch, capfd):
    arguments = (
        "--forbidden", f"xstest={files / 'xstest.csv'}", "--benign", f"xstest={files / 'xstest.csv'}",
        "--skill", f"paint={files / 'utility.jsonl'}", "--skill", f"text={files / 'utility.jsonl'}:perplexity",
        "--skill", f"rouge={files / 'utility.jsonl'}:rougeL", "--skill", f"sums=gsm8k={files / 'gsm8k.jsonl'}",
        "--judge", f"refused:REJECTION={files / 'classifier'}",
    )  # fmt: skip
    for model in ("model", "other"):
        status, out, err = run(
            monkeypatch, capfd, *evaluating(files, *arguments, model=model), "--json", f"{model}.json"
        )
        assert status == 0, err
        for measure in ("refusal", "over-refusal", "exact match: paint", "perplexity: text", "rougeL: rouge"):
            assert measure in out
        assert f"wrote {model}.json" in out
    found = load_evaluation("model.json")
    assert (found.refusal.n, found.over_refusal.n, found.skills["sums"].n) == (1, 2, 1)
    assert found.settings["metrics"]["sums"] == "final number"
    assert found.settings["judges"] == [f"refused:REJECTION={files / 'classifier'}"]
    status, out, err = run(monkeypatch, capfd, "compare", "model.json", "other.json", "--json", "pairs.json")
    assert status == 0, err
    assert "Differences from model.json, with paired tests over prompts" in out
    rows = {row["measure"]: row for row in json.loads(Path("pairs.json").read_text())["rows"]}
    assert rows["loss: text"]["test"] == "sign flips"
    assert rows["refusal"]["test"] == "McNemar"
    assert rows["over-refusal"]["n"] == 2


def test_the_responses_are_written_where_a_judge_fails_late(files, monkeypatch, capfd):
    def fails(self, prompts, responses):
        if len(responses) > 1:
            raise DataError("expected an answer, found none")
        return [Verdict(refused=True)]

    monkeypatch.setattr(ClassifierJudge, "verdicts", fails)
    arguments = ("--forbidden", files / "safety.jsonl", "--judge", f"refused:REJECTION={files / 'classifier'}")
    for more, file in (((), "evaluation.responses.jsonl"), (("--json", "a.json"), "a.responses.jsonl")):
        status, out, err = run(monkeypatch, capfd, *evaluating(files, *arguments), *more)
        assert (status, out) == (1, "")
        last = err.splitlines()[-1]
        assert last == f"geomkit: expected an answer, found none; the model's responses are in {file}"
        rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
        assert [row["prompt"] for row in rows] == [messages[0]["content"] for messages in SAFETY["messages"]]
        assert all(isinstance(row["response"], str) for row in rows)
    assert not Path("a.json").exists()


def test_a_draw_of_examples_is_the_same_for_every_model(files, monkeypatch, capfd):
    for model in ("model", "other"):
        arguments = evaluating(files, "--forbidden", files / "safety.jsonl", "--examples", 2, model=model)
        status, _, err = run(monkeypatch, capfd, *arguments, "--json", f"{model}.json")
        assert status == 0, err
    prompts = [load_evaluation(f"{model}.json").responses["prompt"].tolist() for model in ("model", "other")]
    assert len(prompts[0]) == 2
    assert prompts[0] == prompts[1]
    run(monkeypatch, capfd, *evaluating(files, "--forbidden", files / "safety.jsonl"), "--json", "all.json")
    err = one_line(*run(monkeypatch, capfd, "compare", "model.json", "all.json"))
    assert "expected the same prompts in model.json and all.json, found 1 of 3 in all.json that model.json lacks" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected something to evaluate, found none; give --forbidden, --benign or --skill"),
        (("--skill", "utility.jsonl"), "expected --skill NAME=SET or NAME=SET:METRIC, found 'utility.jsonl'"),
        (("--skill", "a={utility}:blue"), "expected a metric, exact, gsm8k"),
        (("--skill", "a={utility}", "--skill", "a={safety}"), "expected skills of different names, found a, a"),
        (("--skill", "a=advbench=x.csv"), "expected a local copy of a benchmark at x.csv"),
        (("--skill", "a=xstest={xstest}"), "expected a skill with reference answers, found the benchmark 'xstest'"),
        (("--forbidden", "xstest=x.csv"), "expected a local copy of a benchmark at x.csv, found no file"),
        (("--forbidden", "{safety}", "--judge", "gpt"), "expected a judge, keywords, gcg, RUBRIC=MODEL"),
        (("--forbidden", "{safety}", "--judge", "xstest"), "expected a model for the judge 'xstest'"),
        (
            ("--forbidden", "{safety}", "--judge", "keywords", "--judge", "gcg"),
            "expected one judge of 'refused', found keywords and gcg",
        ),
    ],
)
def test_what_is_refused(files, monkeypatch, capfd, arguments, message):
    names = {"utility": files / "utility.jsonl", "safety": files / "safety.jsonl", "xstest": files / "xstest.csv"}
    filled = [argument.format(**names) for argument in arguments]
    assert message in one_line(*run(monkeypatch, capfd, *evaluating(files, *filled)))


def test_compare_wants_different_files_of_evaluations(monkeypatch, capfd, tmp_path):
    (tmp_path / "a.json").write_text("{}")
    assert "expected different files" in one_line(*run(monkeypatch, capfd, "compare", "a.json", "a.json"))
    assert "found format None" in one_line(*run(monkeypatch, capfd, "compare", "a.json", "b.json"))
    assert "compare" in {command.callback.__name__ for command in app.registered_commands}


def test_named_columns_are_those_of_the_sets_that_have_them(files, monkeypatch, capfd):
    Path("mine.csv").write_text("ask,say\nhow,paint\n")
    sets = ("--forbidden", "mine.csv", "--benign", f"xstest={files / 'xstest.csv'}", "--skill", "mine=mine.csv")
    named = ("--columns", "prompt=ask,response=say", "--json", "named.json")
    status, _, err = run(monkeypatch, capfd, *evaluating(files, *sets, *named))
    assert status == 0, err
    responses = load_evaluation("named.json").responses
    assert list(responses["prompt"]) == ["how", "how do i paint", "help", "how"]
    assert list(responses["reference"])[-1] == "paint"
    benign = ("--benign", f"xstest={files / 'xstest.csv'}", *named)
    message = one_line(*run(monkeypatch, capfd, *evaluating(files, *benign)))
    assert "expected no columns with the benchmark 'xstest'" in message
