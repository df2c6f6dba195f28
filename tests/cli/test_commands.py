"""The command line: good input writes files, bad input one line on stderr and a status that is not 0."""

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from geomkit.cli.columns import columns_by_text
from geomkit.cli.inputs import layers_by_text
from geomkit.cli.main import main
from geomkit.cli.outputs import write_json
from geomkit.errors import DataError
from geomkit.experiments.results import load_results
from geomkit.inputs.models import load_model
from geomkit.inputs.tokens import encode
from geomkit.screening.screen import screen
from geomkit.screening.screening import Screening, load_screening
from geomkit.version import __version__
from tests.helpers.tiny import BENIGN, CONTROL, PLAIN_TEMPLATE, SAFETY, TEMPLATE, UTILITY, tiny_llama, tiny_tokenizer


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model and what is needed around it, good and bad, by name."""
    root = tmp_path_factory.mktemp("files")
    tokenizers = {"model": tiny_tokenizer(), "unmarked": tiny_tokenizer(), "silent": tiny_tokenizer()}
    tokenizers["unmarked"].chat_template = PLAIN_TEMPLATE
    tokenizers["silent"].chat_template = TEMPLATE.replace("'assistant'", "'bot'")
    tokenizers["unpadded"], tokenizers["untold"] = tiny_tokenizer(), tiny_tokenizer()
    tokenizers["unpadded"].pad_token = None
    tokenizers["untold"].chat_template = None
    for name, tokenizer in tokenizers.items():
        tiny_llama().save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for name, examples in (("safety", SAFETY), ("utility", UTILITY), ("control", CONTROL), ("benign", BENIGN)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
    pairs = [{"prompt": row[0]["content"], "response": row[1]["content"]} for row in UTILITY["messages"]]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (root / "empty.jsonl").write_text("")
    (root / "corrupt.jsonl").write_text(json.dumps(SAFETY[0]) + "\n{\n")
    (root / "columns.jsonl").write_text('{"frage": "how", "antwort": "no"}\n' * 6)
    (root / "requests.txt").write_text("how\nhelp\n")
    return root


def run(monkeypatch, capfd, *arguments):
    """Run the command line here; return its status and what it wrote to stdout and stderr."""
    monkeypatch.setattr("sys.argv", ["geomkit", *map(str, arguments)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code or 0, *capfd.readouterr()


def names(folder):
    return [path.name for path in Path(folder).iterdir()]


def finetuning(files, **changes):
    options = {"model": "model", "train": "utility.jsonl", "anchors": "safety.jsonl"} | changes
    paths = {name: files / value for name, value in options.items() if value}
    return ["finetune", *(part for name, path in paths.items() for part in (f"--{name}", path)), "--out", "run"]


def analysis(files, **changes):
    options = {
        "model": "model",
        "safety": "safety.jsonl",
        "utility": "utility.jsonl",
        "control": "control.jsonl",
    } | changes
    return ["analyze", *(part for name, value in options.items() for part in (f"--{name}", files / value))]


def checking(files, **changes):
    options = {"model": "model", "examples": "utility.jsonl"} | changes
    return ["check", *(part for name, value in options.items() for part in (f"--{name}", files / value))]


# ------------------------------------------------------------------------------------------------ good input


def test_check_says_what_it_needs_and_whether_it_can_be_trusted(files, monkeypatch, capfd):
    status, out, err = run(monkeypatch, capfd, *checking(files), "--layers", "*.mlp.*")
    assert status == 0, err
    assert "LlamaForCausalLM: 5.2k parameters" in out
    assert "mlp        6 of 6" in out
    assert "complete       ok" in out
    assert "all measured checks are ok" in out
    assert names(".") == []


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("*", ["*"]),
        ("*.mlp.*", ["*.mlp.*"]),
        ("10,20", [10, 20]),
        ("0", [0]),
        (" 4, 5 ", [4, 5]),
        ("*.mlp.*, lm_head*", ["*.mlp.*", "lm_head*"]),
        ("-1", ["-1"]),
    ],
)
def test_layers_are_numbers_or_patterns(text, layers):
    assert layers_by_text(text) == layers


@pytest.mark.parametrize("text", ["1,x", "", "*.mlp.*,", "1,,2"])
def test_layers_that_are_both_or_neither_are_refused(text):
    with pytest.raises(DataError, match=r"expected --layers as numbers like 10,20 or as patterns"):
        layers_by_text(text)


def test_layers_of_a_number_are_measured(files, monkeypatch, capfd):
    status, out, err = run(monkeypatch, capfd, *checking(files), "--layers", "1")
    assert status == 0, err
    assert "mlp        3 of 6" in out
    assert "head       0 of 1" in out
    status, out, err = run(monkeypatch, capfd, *analysis(files), "--layers", "0,1")
    assert status == 0, err
    err = one_line(*run(monkeypatch, capfd, *checking(files), "--layers", "7"), ["geomkit-analysis"])
    assert "expected decoder layers among 0 to 1, found [7]" in err


def test_finetune_writes_a_checkpoint_that_loads(files, monkeypatch, capfd):
    status, out, err = run(monkeypatch, capfd, *finetuning(files), "--steps", 2, "--learning-rate", 0.01)
    assert status == 0, err
    assert "rule 'adaptive-kl-left': 0 of 2 steps broke the promise" in out
    assert out.endswith("wrote run\n")
    trained, start = (AutoModelForCausalLM.from_pretrained(path) for path in ("run", files / "model"))
    assert any(bool((a != b).any()) for a, b in zip(trained.parameters(), start.parameters(), strict=True))
    assert list(encode(AutoTokenizer.from_pretrained("run"), SAFETY)) == list(encode(tiny_tokenizer(), SAFETY))
    assert names(".") == ["run"]


def test_finetune_takes_pairs_prefixes_a_pad_token_and_no_anchors(files, monkeypatch, capfd):
    bare = [*finetuning(files, model="unmarked", train="pairs.jsonl", anchors=None), "--assistant-mask", "prefix"]
    status, out, err = run(monkeypatch, capfd, *bare, "--epochs", 1, "--pad-token", "[end]")
    assert status == 0, err
    assert out.startswith("Fine-tune of ")
    assert out.endswith(" s.\nwrote run\n")
    assert "Map:" not in err
    assert AutoTokenizer.from_pretrained("run").pad_token == "[end]"  # noqa: S105
    assert "spf.jsonl" not in names("run")


@pytest.mark.parametrize(
    ("checkpoints", "said"),
    [
        ((), "wrote run"),
        (("--checkpoints", "kept"), "The same command begins anew: no checkpoint yet."),
        (("--checkpoints", "kept", "--save-steps", 2), "The same command goes on from the last checkpoint."),
    ],
)
def test_an_interrupted_finetune_writes_what_was_trained_or_goes_on_later(files, monkeypatch, capfd, checkpoints, said):
    def press(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("geomkit.training.callbacks.LossCheck.on_log", press)
    status, out, err = run(monkeypatch, capfd, *finetuning(files), "--steps", 4, *checkpoints)
    assert status == 130, err
    assert "Fine-tune of 3 steps" in " ".join(out.split())  # logs are written after a step
    assert Path("run").exists() is not bool(checkpoints)
    assert " ".join(out.split()).endswith(said)


def test_analyze_writes_a_report_and_the_promised_numbers(files, monkeypatch, capfd):
    status, out, err = run(monkeypatch, capfd, *analysis(files), "--out", "a/b", "--json", "c/numbers.json")
    assert status == 0, err
    assert "wrote a/b/report.html\nwrote c/numbers.json\n" in out
    page = Path("a/b/report.html").read_text(encoding="utf-8")
    assert "<h1>Gradient geometry of" in page
    assert "<dt>command</dt><dd>geomkit analyze --model " in page
    assert "<dt>seed</dt><dd>0</dd>" in page
    numbers = json.loads(Path("c/numbers.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert set(numbers) == {
        "alignment",
        "losses",
        "largest_example",
        "spectrum",
        "span",
        "conflict",
        "one_sample",
        "claims",
    }
    for side in ("safety", "utility"):
        measured = {"tokens", "effective_rank", "cer10", "null_effective_rank", "null_cer10"}
        low, high = numbers["spectrum"][side].pop("effective_rank_interval")
        assert low < numbers["spectrum"][side]["effective_rank"] < high
        assert set(numbers["spectrum"][side]) == measured
        assert all(value > 0 for value in numbers["spectrum"][side].values())
    assert set(numbers["conflict"]) >= {"cosine", "negative_share", "interval", "null_interval"}
    assert -1 <= numbers["conflict"]["cosine"] <= 1
    assert set(numbers["one_sample"]) >= {"overlap", "interval", "control", "null"}
    assert names("c") == ["numbers.json"]


@pytest.mark.parametrize("columns", [80, 120])
def test_tables_fit_the_terminal_and_cut_no_word(files, monkeypatch, capfd, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    status, out, err = run(monkeypatch, capfd, *analysis(files))
    assert status == 0, err
    assert max(map(len, out.splitlines())) <= columns
    words = out.split()
    assert not any(word.endswith("…") and word != "…" for word in words)
    for whole in ("effective", "dimensions,", "control", "verdict", "measured", "not"):
        assert whole in words


def test_bench_runs_a_grid_and_goes_on_with_it(monkeypatch, capfd):
    Path("mine.toml").write_text(
        'name = "mine"\nprompts = 6\n[arms]\nuntouched = { method = "untouched" }\n'
        '[[block]]\nscenarios = ["new-skill"]\n'
    )
    for _ in range(2):
        status, said, _ = run(monkeypatch, capfd, "bench", "--grid", "mine.toml", "--out", "out", "--processes", 1)
        assert status == 0
        assert "1 cells of the grid 'mine'" in said
        assert "100.0 [61.0, 100.0]" in said
    assert load_results("out/results.jsonl.gz").name == "mine"
    status, said, problem = run(monkeypatch, capfd, "bench", "--grid", "other", "--out", "out")
    assert (status, said) == (1, "")
    assert problem.startswith(
        "geomkit: expected a TOML file or a shipped grid (default, english, limits, smoke), found 'other'"
    )


def test_bench_in_shards(monkeypatch, capfd):
    Path("mine.toml").write_text(
        'name = "mine"\nprompts = 6\n[arms]\nuntouched = { method = "untouched" }\n'
        '[[block]]\nscenarios = ["new-skill", "harmful-10", "poison-10"]\n'
    )
    command = ("bench", "--grid", "mine.toml", "--out", "out", "--processes", 1)
    status, said, _ = run(monkeypatch, capfd, *command, "--shard", "2/2")
    assert (status, said) == (
        0, "ran the 1 cells of shard 2/2; 2 of 3 cells are not run yet: the call that runs the last one writes "
        "out/results.jsonl.gz\n",
    )  # fmt: skip
    assert names("out") == ["cells"]
    status, said, _ = run(monkeypatch, capfd, *command, "--shard", "1/2")
    assert status == 0
    assert "3 cells of the grid 'mine'" in said
    joined = load_results("out/results.jsonl.gz").records
    status, said, _ = run(monkeypatch, capfd, *command)
    assert status == 0
    assert load_results("out/results.jsonl.gz").records == joined


@pytest.mark.parametrize("shard", ["3", "1-2", "a/b", "1/", "0/2", "3/2", "1/0"])
def test_a_shard_that_is_not_there(monkeypatch, capfd, shard):
    status, said, problem = run(monkeypatch, capfd, "bench", "--grid", "smoke", "--out", "out", "--shard", shard)
    assert (status, said) == (1, "")
    assert problem.startswith("geomkit: expected")
    assert problem.count("\n") == 1
    assert not Path("out").exists()


def test_numbers_that_are_not_finite_are_null(capfd):
    numbers = {"a": {"b": [math.nan, 1.5]}, "c": math.inf, "d": None, "e": "x", "f": 2}
    write_json(Path("numbers.json"), numbers)
    written = json.loads(Path("numbers.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert written == {"a": {"b": [None, 1.5]}, "c": None, "d": None, "e": "x", "f": 2}
    assert capfd.readouterr().out == "wrote numbers.json\n"


def test_version_and_help(monkeypatch, capfd):
    assert run(monkeypatch, capfd, "--version") == (0, f"{__version__}\n", "")
    status, out, _ = run(monkeypatch, capfd, "--help")
    assert status == 0
    assert all(command in out for command in ("tour", "check", "analyze", "finetune", "organism"))


@pytest.mark.parametrize("command", [checking, analysis, finetuning])
def test_a_template_without_markers_is_taken_and_said_once(files, monkeypatch, capfd, caplog, command):
    monkeypatch.setattr("geomkit.inputs.templates._TOLD", set())
    steps = ["--steps", "1"] if command is finetuning else []
    status, _, err = run(monkeypatch, capfd, *command(files, model="unmarked"), *steps)
    assert status == 0, err
    assert sum("no {% generation %} markers" in message for message in caplog.messages) == 1


def test_columns_are_named_on_the_command_line(files, monkeypatch, capfd):
    columns = ["--columns", "prompt=frage,response=antwort"]
    status, out, err = run(monkeypatch, capfd, *checking(files, examples="columns.jsonl"), *columns)
    assert status == 0, err
    assert "all measured checks are ok" in out
    # The anchors do not have these columns, and are read by their own.
    status, _, err = run(monkeypatch, capfd, *finetuning(files, train="columns.jsonl"), *columns, "--steps", "1")
    assert status == 0, err
    assert columns_by_text("prompt=0, response=b") == {"prompt": 0, "response": "b"}


# ------------------------------------------------------------------------------------------------- bad input


def one_line(status, out, err, files=()):
    assert status == 1
    assert out == ""
    assert err.startswith("geomkit: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert names(".") == list(files)
    return err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"safety": "missing.jsonl"}, "missing.jsonl, found none; shipped sets:"),
        ({"utility": "missing.jsonl"}, "missing.jsonl, found none; shipped sets:"),
        ({"safety": "empty.jsonl"}, "expected at least one example in"),
        ({"safety": "corrupt.jsonl"}, "corrupt.jsonl, line 2: expected one JSON object a line"),
        ({"utility": "columns.jsonl"}, "found ['frage', 'antwort']; say which column is what"),
        ({"model": "missing"}, "missing, found none"),
        (
            {"utility": "requests.txt"},
            "requests.txt, row 0: expected an assistant message to take the loss on, found none",
        ),
        ({"model": "untold"}, "expected a tokenizer with a chat template, found none"),
        ({"model": "silent"}, " tokens, all masked)"),
        ({"model": "unpadded"}, "expected a tokenizer with a pad token, found none"),
    ],
)
def test_bad_input_gets_one_line(files, monkeypatch, capfd, changes, message):
    assert message in one_line(*run(monkeypatch, capfd, *analysis(files, **changes), "--json", "numbers.json"))
    instead = {{"safety": "anchors", "utility": "train"}.get(name, name): value for name, value in changes.items()}
    assert message in one_line(*run(monkeypatch, capfd, *finetuning(files, **instead)))


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (finetuning, ["--rule", "none"], "expected one of the rules rank1"),
        (finetuning, ["--rule", "rank1", "--rank", "3"], "expected a rank for"),
        (finetuning, ["--pad-token", "<none>"], "expected a pad token from the vocabulary"),
        (
            finetuning,
            ["--assistant-mask", "guess"],
            "--assistant-mask auto, template or prefix, found 'guess'",
        ),
        (analysis, ["--assistant-mask", "guess"], "--assistant-mask auto, template or prefix, found 'guess'"),
        (finetuning, ["--columns", "frage"], "expected --columns as prompt=NAME,response=NAME, found 'frage'"),
        (checking, ["--columns", "prompt=frage"], "expected a column 'frage', found ['messages']"),
        (analysis, ["--max-length", "3"], "found none within the first 3 tokens"),
        (
            analysis,
            ["--layers", "*.none.*"],
            "parameters that match layers=['*.none.*'], found none",
        ),
        (analysis, ["--dtype", "float7"], "float7"),
    ],
)
def test_bad_options_get_one_line(files, monkeypatch, capfd, command, options, message):
    assert message in one_line(*run(monkeypatch, capfd, *command(files), *options))


@pytest.mark.parametrize(
    "option", [("--rule", "left"), ("--rank", 3), ("--anchors-per-step", 2), ("--benign", "safety")]
)
def test_an_option_of_spf_without_anchors_is_refused(files, monkeypatch, capfd, option):
    message = one_line(*run(monkeypatch, capfd, *finetuning(files, anchors=None), *option))
    assert f"expected anchors for {option[0]} {option[1]}, found none; give --anchors" in message


def test_lora_adapters_are_trained_and_saved_and_load_back(files, monkeypatch, capfd):
    status, out, err = run(monkeypatch, capfd, *finetuning(files), "--lora", 2, "--steps", 2, "--learning-rate", "1e-2")
    assert status == 0, err
    assert "0 of 2 steps broke the promise" in out
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "spf.jsonl"} <= set(names("run"))
    loaded, _ = load_model("run", device="cpu")
    base = load_model(files / "model", device="cpu")[0]
    assert all(torch.equal(a, b) for a, b in zip(loaded.unload().parameters(), base.parameters(), strict=True))
    moved = load_model("run", device="cpu")[0]
    assert all(bool(weight.any()) for name, weight in moved.named_parameters() if "lora_B" in name)
    # The adapter goes on training from where it is.
    arguments = finetuning(files, model=Path("run").resolve())[:-1]
    assert run(monkeypatch, capfd, *arguments, "again", "--steps", 1)[0] == 0
    assert "adapter_config.json" in names("again")
    status, _, err = run(monkeypatch, capfd, *arguments, "third", "--lora", 2)
    assert (status, err.count("\n")) == (1, 1)
    assert "expected a model without adapters" in err


def test_a_device_that_is_not_there_is_refused(files, monkeypatch, capfd):
    for command in (finetuning(files), analysis(files)):
        assert "such as cpu" in one_line(*run(monkeypatch, capfd, *command, "--device", "cuda:99"))


def screening(files, **changes):
    options = {"model": "model", "train": "utility.jsonl", "safety": "safety.jsonl", "benign": "benign.jsonl"} | changes
    return ["screen", *(part for name, value in options.items() for part in (f"--{name}", files / value))]


def test_a_screen_writes_what_it_found_and_resumes(files, monkeypatch, capfd):
    status, out, err = run(monkeypatch, capfd, *screening(files), "--out", "found")
    assert status == 0, err
    assert "of 4 rows raise the safety loss beyond 24 benign rows" in out
    kept = [json.loads(line) for line in Path("found/clean.jsonl").read_text().splitlines()]
    assert all(row in list(UTILITY) for row in kept)
    assert {"clean.jsonl", "parts", "report.html", "rows.csv", "screening.json"} < set(names("found"))
    assert len(Path("found/rows.csv").read_text().splitlines()) == 5
    rows = Path("found/rows.csv").read_text()
    status, _, err = run(monkeypatch, capfd, *screening(files), "--out", "found")
    assert (status, Path("found/rows.csv").read_text()) == (0, rows)


def test_a_screen_with_obeyed_requests_is_that_of_python(files, monkeypatch, capfd):
    status, out, err = run(monkeypatch, capfd, *screening(files, obeyed="control.jsonl"), "--out", "found")
    assert status == 0, err
    assert "of 4 rows make obeying likelier than refusing beyond 24 benign rows" in out
    model, tokenizer = load_model(files / "model", device="cpu")
    expected = screen(model, tokenizer, UTILITY, SAFETY, benign=BENIGN, obeyed=CONTROL, progress=False)
    np.testing.assert_allclose(load_screening(Path("found")).rows.cosine, expected.rows.cosine, atol=1e-6)


def test_a_screen_that_leaves_no_row_leaves_no_older_rows(files, monkeypatch, capfd):
    Path("found").mkdir()
    Path("found/clean.jsonl").write_text("{}\n")
    monkeypatch.setattr(Screening, "clean", _nothing_left)
    status, _, err = run(monkeypatch, capfd, *screening(files), "--out", "found")
    assert (status, err.splitlines()[-1]) == (1, "geomkit: expected a row that is left, found none")
    assert "report.html" in names("found")
    assert "clean.jsonl" not in names("found")


def _nothing_left(*_):
    raise DataError("expected a row that is left, found none")


def test_a_screen_of_rows_that_are_no_json_is_reported_first(files, monkeypatch, capfd):
    UTILITY.add_column("raw", [b"a"] * len(UTILITY)).to_parquet(files / "bytes.parquet")
    status, _, err = run(monkeypatch, capfd, *screening(files, train="bytes.parquet"), "--out", "found")
    assert status == 1
    assert "geomkit: expected columns of texts and numbers for clean.jsonl, found: Object of type bytes" in err
    assert {"report.html", "rows.csv"} < set(names("found"))


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, ["--method", "cos"], "expected a method among cosine, raw, adam, found 'cos'"),
        ({"benign": "utility.jsonl"}, [], "expected at least 20 different benign rows to compare with, found 4"),
        ({"train": "requests.txt"}, [], "expected"),
    ],
)
def test_a_wrong_screen_is_one_line(files, monkeypatch, capfd, changes, arguments, message):
    assert message in one_line(*run(monkeypatch, capfd, *screening(files, **changes), *arguments, "--out", "found"))


def test_an_analysis_says_first_whether_the_model_refuses(files, monkeypatch, capfd):
    status, out, err = run(monkeypatch, capfd, *analysis(files), "--json", "numbers.json")
    assert status == 0, err
    assert out.startswith("The model refuses 0.0% [0.0%, ")
    assert json.loads(Path("numbers.json").read_text())["alignment"]["refusal_rate"] == 0


def test_a_folder_is_never_overwritten(files, monkeypatch, capfd):
    Path("run").mkdir()
    Path("run/mine").write_text("kept")
    status, _, err = run(monkeypatch, capfd, *finetuning(files))
    assert (status, err.count("\n")) == (1, 1)
    assert "expected a new or empty folder at run" in err
    assert names("run") == ["mine"]


def test_results_that_cannot_be_written_get_one_line_before_the_work(files, monkeypatch, capfd):
    Path("file").write_text("kept")
    long = f"{'x' * 300}/inside"
    for command in (
        [*analysis(files), "--out", "file/inside"],
        [*analysis(files), "--json", "file/numbers.json"],
        [*finetuning(files), "--out", "file/inside"],
        ["organism", "build", "--out", "file/inside"],
        ["organism", "build", "--out", long],
        ["tour", "--out", long],
    ):
        status, out, err = run(monkeypatch, capfd, *command)
        assert (status, out, err.count("\n")) == (1, "", 1), err
        assert "expected a folder that can be written to at" in err
    assert names(".") == ["file"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a folder that not even its owner can write to")
def test_a_folder_that_nobody_can_write_to_is_refused(monkeypatch, capfd):
    message = one_line(*run(monkeypatch, capfd, "organism", "build", "--out", "/proc/organism"))
    assert "expected a folder that can be written to at /proc/organism, found none (" in message


def test_a_ruined_model_is_not_written(files, monkeypatch, capfd):
    options = ["--steps", 1, "--learning-rate", 1e30]
    status, out, err = run(monkeypatch, capfd, *finetuning(files, anchors=None), *options)
    assert (status, out) == (1, "")
    assert "expected a finite loss after training, found nan on example 0; lower the learning rate" in err
    assert names(".") == []


def test_finetune_trains_in_fp32_unless_told_otherwise(files, tmp_path_factory, monkeypatch, capfd, caplog):
    half = tmp_path_factory.mktemp("half") / "model"
    tiny_llama().bfloat16().save_pretrained(half)
    tiny_tokenizer().save_pretrained(half)
    for options, dtype in (([], torch.float32), (["--dtype", "auto"], torch.bfloat16)):
        out = "-".join(["run", *options])
        arguments = finetuning(files, model=half, anchors=None)[:-1]
        status, _, err = run(monkeypatch, capfd, *arguments, out, "--steps", 1, *options)
        assert status == 0, err
        assert AutoModelForCausalLM.from_pretrained(out).dtype == dtype
        assert ("rounds most small updates away" in caplog.text) == (dtype == torch.bfloat16)


def test_a_checkpoint_may_go_to_the_working_directory(files, monkeypatch, capfd):
    status, out, err = run(monkeypatch, capfd, *finetuning(files, anchors=None)[:-1], ".", "--steps", 1)
    assert status == 0, err
    assert out.startswith("Fine-tune of 1 step, ")
    assert out.endswith("\nwrote .\n")
    assert AutoModelForCausalLM.from_pretrained(".")


@pytest.mark.parametrize(
    "arguments", [["analyze"], ["finetune", "--steps", "0"], ["tour", "--seed", "x"], ["none"], ["analyze", "--none"]]
)
def test_wrong_usage_says_so_with_status_2(monkeypatch, capfd, arguments):
    status, out, err = run(monkeypatch, capfd, *arguments)
    assert (status, out) == (2, "")
    assert "Usage: " in err
