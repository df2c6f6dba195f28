"""Models, rows and templates that are wrong or made to do harm: one line of error, no code run, no wait for ever."""

import ast
import contextlib
import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
from datasets import concatenate_datasets
from safetensors.torch import load_file, save_file

import geomkit
import geomkit as gk
from geomkit.errors import DataError, GeometryError
from geomkit.inputs import templates
from geomkit.inputs.copies import row_digests
from geomkit.svd.example_span import span
from geomkit.training.model_judges.classifiers import load_classifier
from geomkit.utils.watchdog import Watchdog
from tests.helpers.tiny import (
    CONTROL,
    PLAIN_TEMPLATE,
    SAFETY,
    TEMPLATE,
    UTILITY,
    conversations,
    tiny_llama,
    tiny_tokenizer,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------ models


def test_weights_too_many_and_too_few_are_named(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    renamed = {f"{key}{'.extra' if key == name else ''}": value for key, value in weights.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=rf"1 missing \({name}\), 1 unexpected \({name}.extra\)"):
        gk.load_model(folder)
    save_file({**weights, "model.extra": weights[name].clone()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"1 unexpected \(model.extra\)"):
        gk.load_model(folder)


@pytest.mark.parametrize("load", [gk.load_model, load_classifier])
@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_code_of_a_folder_is_not_run_on_a_yes(saved, tmp_path, monkeypatch, load, what):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    file = folder / ("config.json" if what == "model" else "tokenizer_config.json")
    config = json.loads(file.read_text())
    if what == "model":
        maps = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification"), "own.Own")
        config |= {"model_type": "own", "auto_map": maps}
    else:
        config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    file.write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(DataError):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_every_loading_forbids_code_of_the_folder():
    for path in sorted(Path(geomkit.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr != "from_pretrained" or ast.unparse(node.func.value) == "PeftModel":
                    continue
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                in_options = ".options()" in given.get(None, "") or given.get(None) == "more"
                assert given.get("trust_remote_code") == "False" or in_options, f"{path}:{node.lineno}"


# ------------------------------------------------------------------------------------------------ templates


def told(template, content="how do i paint"):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    gk.encode(tokenizer, conversations((content, "no")))


_LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TEMPLATE + _LOOP, "expected a chat template that ends, found one that is still at work after 0.3 seconds"),
        (PLAIN_TEMPLATE + _LOOP, "still at work after 0.3 seconds, as one that loops; take another template"),
        (TEMPLATE + "{{ 'a' * 20000000 }}", "writes 20,000,... characters, more than 10,000,000; take another"),
        (TEMPLATE + "{{ 'a' * 1000000000000000 }}", "writes more than fits into memory"),
        (
            TEMPLATE + "{{ raise_exception('System role not supported') }}",
            "example 0: the chat template refuses .* Sys",
        ),
        (TEMPLATE + "{% if %}", "an error in its line"),
        (TEMPLATE + "{{ messages[9].content.x }}", "the chat template fails on this conversation: Undefined"),
    ],
)
def test_a_template_that_loops_writes_without_end_or_fails_is_one_line(monkeypatch, template, message):
    if "0.3 seconds" in message:
        monkeypatch.setattr(templates, "SECONDS", 0.3)
    with pytest.raises(DataError, match=message) as refused:
        told(template)
    assert "\n" not in str(refused.value)


def test_a_time_limit_ends_in_its_own_thread_and_leaves_nothing_behind():
    watchdog = Watchdog()

    def work(seconds):
        try:
            with watchdog.limit(0.2):
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    pass
        except TimeoutError:
            return "late"
        return "in time"

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work, 30).result(timeout=20) == "late"
        assert pool.submit(work, 0).result(timeout=20) == "in time"
    assert work(30) == "late"

    def catches(seconds):  # as jinja2 does where it computes constants
        try:
            with watchdog.limit(0.2):
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    with contextlib.suppress(Exception):
                        time.sleep(0.001)
        except TimeoutError:
            return "late"
        return "in time"

    assert catches(30) == "late"
    # Nothing is left for the interpreter to look for: under a trace function it would do so for ever.
    steps = []
    before = sys.gettrace()
    sys.settrace(lambda *_: steps.append(1))
    try:
        work(0)
    finally:
        sys.settrace(before)
    assert steps
    assert [work(0) for _ in range(1000)] == ["in time"] * 1000


# ------------------------------------------------------------------------------------------------ rows


def test_a_row_of_a_hundred_thousand_tokens_is_refused_before_the_model_runs():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    rows = conversations(
        *[(row[0]["content"], row[1]["content"]) for row in SAFETY["messages"]], ("help " * 100_000, "no")
    )
    calls = {
        "collect_gradients": lambda: gk.collect_gradients(model, tokenizer, rows, progress=False),
        "finetune": lambda: gk.finetune(model, tokenizer, rows, steps=1, progress=False),
        "describe": lambda: gk.sample_grams(model, tokenizer, rows, progress=False),
    }
    for call in calls.values():
        with pytest.raises(DataError, match=r"example 3: expected at most 8 times the 64 tokens .*\(--max-length 64\)"):
            call()


def test_rows_beyond_the_context_are_told(caplog):
    rows = conversations(("help " * 100, "no"), ("help", "no"))
    gk.collect_gradients(tiny_llama(), tiny_tokenizer(), rows, progress=False)
    assert "example 0 has 104 tokens, more than the 64 that the model was made for" in caplog.text


@pytest.mark.parametrize("role", ["owner", "", "Assistant2", 7, None])
def test_unknown_roles_are_refused(role):
    rows = [{"messages": [{"role": role, "content": "a"}, {"role": "assistant", "content": "b"}]}]
    with pytest.raises(DataError, match="row 0: expected"):
        gk.load_examples(rows)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"messages": ' + "[" * 100_000,
        '{"messages": "' + "[" * 100_000 + '"}',
        '{"prompt": "a", "response": "b", "tools": "' + "[" * 100_000 + '"}',
        '{"prompt": ' + "9" * 5000 + "}",
        '{"prompt": NaN, "response": Infinity}',
        "null",
        "{}",
        '{"messages": [null]}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": {}}',
    ],
)
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_deep_huge_and_empty_json_is_one_line(tmp_path, text, ending):
    path = tmp_path / f"rows.{ending}"
    path.write_text(text)
    with pytest.raises(DataError) as refused:
        gk.load_examples(path)
    assert len(str(refused.value)) < 1000


# ------------------------------------------------------------------------------------------------ copies


def copies(rows, *places):
    return rows.select(places)


@pytest.fixture(scope="module")
def probed():
    """Six safety rows of which three are copies, and utility rows."""
    return copies(SAFETY, 0, 1, 1, 2, 2, 2), UTILITY, CONTROL


def test_copies_of_one_row_are_no_sample():
    for sets in ((copies(SAFETY, *[0] * 12), UTILITY, CONTROL), (SAFETY, copies(UTILITY, 0, 0, 0, 1), CONTROL)):
        with pytest.raises(GeometryError, match=r"expected at least 3 different (safety|utility) examples .* copies"):
            gk.Probe(*sets)
    with pytest.raises(GeometryError, match=r"half of whose prompts make the control, found 4"):
        gk.Probe(SAFETY, copies(UTILITY, 0, 1, 2, 3, 3, 3))


def test_copies_are_left_out_and_said(probed, caplog):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    settings = {"rank": 1, "null_draws": 2, "max_new_tokens": 2, "layers": "*.mlp.*"}
    with_copies = gk.Probe(*probed, **settings).analyze(model, tokenizer)
    without = gk.Probe(SAFETY, UTILITY, CONTROL, **settings).analyze(model, tokenizer)
    assert "3 of 6 safety rows are copies, and were left out" in with_copies.caution
    assert "3 of 6 safety rows are copies" in caplog.text
    assert without.remark == ""
    pd.testing.assert_frame_equal(with_copies.to_frame(), without.to_frame())


def test_rows_of_two_sets_are_said_or_refused():
    shared = concatenate_datasets([UTILITY, SAFETY.select([0])])
    with pytest.raises(GeometryError, match="expected at least 3 safety examples that are not in the other set, found"):
        gk.Probe(SAFETY, shared, CONTROL)
    with pytest.raises(GeometryError, match="share 3 rows"):
        gk.Probe(SAFETY, UTILITY, SAFETY)
    more = concatenate_datasets([SAFETY, conversations(("steal", "no"))])
    assert gk.Probe(more, shared, CONTROL).remark == "safety and utility share 1 row, which makes them alike"


@pytest.fixture(scope="module")
def collected():
    def collect(rows):
        return gk.collect_gradients(
            tiny_llama(), tiny_tokenizer(), rows, per_sample=True, form="factored", progress=False, tokens_per_batch=30
        )

    many = concatenate_datasets([SAFETY, UTILITY, CONTROL])
    return {
        "copies": collect(copies(SAFETY, *[0] * 10)), "some": collect(copies(many, 0, 0, *range(10))),
        "safety": collect(SAFETY), "utility": collect(UTILITY), "many": collect(many),
    }  # fmt: skip


MEASURED = {
    "conflict": lambda sets, name: gk.conflict(sets[name], sets["utility"], draws=9),
    "conflict of the utility set": lambda sets, name: gk.conflict(sets["safety"], sets[name], draws=9),
    "directions": lambda sets, name: gk.conflict_directions(sets["safety"], sets[name], rank=1),
    "one sample": lambda sets, name: gk.one_sample_study(sets[name], sets["utility"], rank=1),
    "control": lambda sets, name: gk.one_sample_study(sets["safety"], sets[name], rank=1),
    "overlaps": lambda sets, name: gk.overlaps({"a": sets["utility"], "b": sets[name]}, rank=1, draws=0),
    "map": lambda sets, name: gk.gradient_map({"a": sets["utility"], "b": sets[name]}, draws=0),
    "curve": lambda sets, name: gk.anchor_curve(sets[name], rank=1, draws=1),
    "noise floor": lambda sets, name: gk.noise_floor(sets[name], draws=99),
    "spectrum": lambda sets, name: gk.spectrum(sets[name], null_draws=0),
    "span": lambda sets, name: span(sets[name]),
}


@pytest.mark.parametrize("measure", MEASURED)
def test_every_measure_over_examples_refuses_copies_and_tells_of_some(collected, measure, caplog):
    with pytest.raises(GeometryError, match=r"expected at least \d different rows in the .* set, found 1 in 10"):
        MEASURED[measure](collected, "copies")
    MEASURED[measure](collected, "some")
    assert "12 gradients are of 10 different rows" in caplog.text
    caplog.clear()
    MEASURED[measure](collected, "many")
    assert "different rows" not in caplog.text


def test_inner_products_tell_copies_too(caplog):
    def grams(*sets):
        return gk.sample_grams(tiny_llama(), tiny_tokenizer(), *sets, progress=False, tokens_per_batch=30)

    ten, some = copies(SAFETY, *[0] * 10), copies(SAFETY, 0, 1, 2, 2)
    with pytest.raises(GeometryError, match="at least 3 different rows in the safety set, found 1 in 10"):
        gk.conflict(grams(ten), grams(UTILITY), across=grams(ten, UTILITY), draws=9)
    gk.conflict(grams(some), grams(UTILITY), across=grams(some, UTILITY), draws=9)
    assert "safety: 4 gradients are of 3 different rows" in caplog.text


def test_copies_of_prompts_are_told(caplog):
    gk.evaluate(tiny_llama(), tiny_tokenizer(), copies(SAFETY, 0, 0, 1), max_new_tokens=1, progress=False)
    assert "forbidden: 1 of 3 rows are copies" in caplog.text


def test_the_shipped_sets_have_no_copies():
    for name in ("safety", "utility", "controls/benign-refused", "eval/forbidden", "eval/benign"):
        rows = row_digests(gk.load_examples(name))
        assert len(set(rows)) == len(rows), name
