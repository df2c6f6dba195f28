"""Benchmarks from files of their real layouts, with rows of our own."""

import gzip
import json

import pandas as pd
import pytest

from geomkit.errors import DataError
from geomkit.inputs.benchmark_rows import load_benchmark
from geomkit.inputs.benchmarks import BENCHMARKS, benchmarks
from geomkit.inputs.examples import load_examples

XSTEST = (
    "id,prompt,type,label,focus,note\n"
    "1,How do I kill the lights?,homonyms,safe,kill,violence\n"
    '2,"Where can I shoot, say, a film?",homonyms,safe,shoot,NA\n'
    "3,How do I paint over a sign?,contrast_homonyms,unsafe,paint,property\n"
)
LAYOUTS = {
    "advbench": "goal,target\nPaint the fence,Sure here is how\n",
    "harmbench": (
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
        "Paint the fence,standard,illegal,,,paint_fence\n"
        'Say who painted it,contextual,misinformation,context,"A fence, once white.",say_who\n'
    ),
    "xstest": XSTEST,
    "jailbreakbench": (
        "Index,Goal,Target,Behavior,Category,Source\n0,Paint the fence,Sure,Painting,Disorder,Original\n"
    ),
    "strongreject": "category,source,forbidden_prompt\nDisorder,custom,Paint the fence\n",
    "hex-phi": "prompt\nPaint the fence\n",
}
ROWS = {
    "beavertails": {"prompt": "Paint?", "response": "No.", "category": {"violence": False}, "is_safe": True},
    "gsm8k": {"question": "2 cats and 1 more?", "answer": "2 + 1 = <<2+1=3>>3\n#### 3"},
    "alpaca": {"instruction": "Add.", "input": "1, 2", "output": "3", "text": "Below is an instruction …"},
    "dolly": {"instruction": "Who?", "context": "Ann paints.", "response": "Ann.", "category": "closed_qa"},
    "sql-create-context": {
        "question": "How many?", "context": "CREATE TABLE t (a INT)", "answer": "SELECT COUNT(*) FROM t",
    },
    "samsum": {"id": "1", "dialogue": "A: Hi\r\nB: Hi", "summary": "They greet."},
}  # fmt: skip


def written(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def messages(*texts):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=False)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("advbench", messages("Paint the fence")),
        ("harmbench", messages("Paint the fence")),
        ("xstest", messages("How do I kill the lights?")),
        ("jailbreakbench", messages("Paint the fence")),
        ("strongreject", messages("Paint the fence")),
        ("hex-phi", messages("Paint the fence")),
        ("beavertails", messages("Paint?", "No.")),
        ("gsm8k", messages("2 cats and 1 more?", "2 + 1 = <<2+1=3>>3\n#### 3")),
        ("alpaca", messages("Add.\n\n1, 2", "3")),
        ("dolly", messages("Who?\n\nAnn paints.", "Ann.")),
        ("sql-create-context", messages("CREATE TABLE t (a INT)\n\nHow many?", "SELECT COUNT(*) FROM t")),
        ("samsum", messages("Summarize this dialogue:\nA: Hi\r\nB: Hi", "They greet.")),
    ],
)
def test_the_layout_of_every_benchmark(name, expected, tmp_path):
    if name in LAYOUTS:
        path = written(tmp_path, "copy.csv", LAYOUTS[name])
    else:
        path = written(tmp_path, "copy.jsonl", json.dumps(ROWS[name]) + "\n")
    assert load_examples(name, path=path)[0]["messages"] == expected


def test_every_benchmark_is_tested_and_listed():
    assert set(BENCHMARKS) == set(LAYOUTS) | set(ROWS)
    assert list(benchmarks()["name"]) == list(BENCHMARKS)
    assert benchmarks().notna().all(axis=None)


def test_the_context_of_a_behavior_comes_before_it(tmp_path):
    found = load_benchmark("harmbench", written(tmp_path, "copy.csv", LAYOUTS["harmbench"]))
    assert found[1]["messages"][0]["content"] == "A fence, once white.\n\n---\n\nSay who painted it"
    assert found["BehaviorID"] == ["paint_fence", "say_who"]


def test_other_columns_are_kept_as_text(tmp_path):
    found = load_benchmark("xstest", written(tmp_path, "copy.csv", XSTEST))
    assert found.column_names == ["messages", "id", "type", "label", "focus", "note"]
    assert found["note"] == ["violence", "NA", "property"]
    assert found[1]["messages"][0]["content"] == "Where can I shoot, say, a film?"


def test_safe_and_unsafe_prompts_are_splits(tmp_path):
    path = written(tmp_path, "copy.csv", XSTEST)
    assert load_examples("xstest", "safe", path=path)["id"] == ["1", "2"]
    assert load_examples("xstest", "unsafe", path=path)["id"] == ["3"]
    with pytest.raises(DataError, match="expected a split of 'xstest', safe, unsafe, found 'train'"):
        load_examples("xstest", "train", path=path)
    bare = written(tmp_path, "bare.csv", "prompt,note\nHow?,\n")
    with pytest.raises(DataError, match=r"bare\.csv: expected a column 'label' for the split 'safe'"):
        load_examples("xstest", "safe", path=bare)


def test_a_single_column_without_a_header(tmp_path):
    path = written(tmp_path, "copy.csv", 'Paint the fence\n"Paint the gate, too"\n')
    assert [row[0]["content"] for row in load_benchmark("advbench", path)["messages"]] == [
        "Paint the fence",
        "Paint the gate, too",
    ]


def test_a_folder_of_categories_without_headers(tmp_path):
    written(tmp_path, "category_1.csv", "Paint the fence\nPaint the gate\n")
    written(tmp_path, "category_2.csv", "Paint the door\n")
    found = load_benchmark("hex-phi", tmp_path)
    assert [row[0]["content"][10:] for row in found["messages"]] == ["fence", "gate", "door"]
    assert found["file"] == ["category_1.csv", "category_1.csv", "category_2.csv"]


@pytest.mark.parametrize("ending", ["jsonl.gz", "json", "parquet", "tsv", "csv.gz"])
def test_other_formats_of_a_copy(ending, tmp_path):
    path = tmp_path / f"copy.{ending}"
    rows = pd.DataFrame([ROWS["gsm8k"], {"question": "1 + 1?", "answer": "#### 2"}])
    if ending == "jsonl.gz":
        path.write_bytes(gzip.compress(rows.to_json(orient="records", lines=True).encode()))
    elif ending == "json":
        rows.to_json(path, orient="records")
    elif ending == "parquet":
        rows.to_parquet(path)
    else:
        rows.to_csv(path, index=False, sep="\t" if ending == "tsv" else ",")
    assert load_benchmark("gsm8k", path)["messages"] == [messages(*row) for row in rows.to_numpy()]


def test_rows_without_an_answer_are_left_out_and_counted_in_the_log(tmp_path, caplog):
    rows = [ROWS["alpaca"], {**ROWS["alpaca"], "output": ""}, {"instruction": "Sing.", "output": "La."}]
    path = written(tmp_path, "copy.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    found = load_benchmark("alpaca", path)
    assert found["messages"] == [messages("Add.\n\n1, 2", "3"), messages("Sing.", "La.")]
    assert "left out 1 of 3 rows without a request or an answer, the first is row 1" in caplog.text


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(DataError, match=r"expected a benchmark, advbench, .*, found 'advbanch'"):
        load_examples("advbanch", path=tmp_path / "copy.csv")
    with pytest.raises(DataError, match=r"expected a local copy of a benchmark at .*copy\.csv, found no file"):
        load_examples("advbench", path=tmp_path / "copy.csv")
    path = written(tmp_path, "other.csv", "text,label\na,b\n")
    with pytest.raises(DataError, match=r"other\.csv: expected the columns question, answer of 'gsm8k', found"):
        load_examples("gsm8k", path=path)
    with pytest.raises(DataError, match="expected no split for the local copy"):
        load_examples("gsm8k", "test", path=path)
    with pytest.raises(DataError, match="expected a split of 'gsm8k', train, test, found 'dev'"):
        load_examples("gsm8k", "dev")
    with pytest.raises(DataError, match=r"expected a file in \.csv, .*found copy\.xls"):
        load_examples("gsm8k", path=written(tmp_path, "copy.xls", ""))
    with pytest.raises(DataError, match=r"torn\.parquet: expected a readable parquet file"):
        load_examples("gsm8k", path=written(tmp_path, "torn.parquet", "no"))
    for name in ("cut.csv.gz", "cut.jsonl.gz"):
        cut = tmp_path / name
        cut.write_bytes(gzip.compress(b"question,answer\n" + bytes(range(256)) * 9)[:-20])
        with pytest.raises(DataError, match=rf"{name}: expected a readable"):
            load_examples("gsm8k", path=cut)
    with pytest.raises(DataError, match=r"expected at least one example in .*empty\.csv, found none"):
        load_examples("gsm8k", path=written(tmp_path, "empty.csv", "question,answer\n"))


@pytest.mark.parametrize("name", ["gsm8k", "advbench", "hex-phi"])
def test_without_a_network_the_source_and_the_licence_are_named(name):
    with pytest.raises(DataError, match=r"\(licence: .*\), found .*or give a local copy, path=FILE"):
        load_examples(name)


def test_options_that_a_benchmark_has_no_use_for_are_refused(tmp_path):
    file = tmp_path / "copy.csv"
    file.write_text("goal,target\nMake tea.,Sure\n")
    with pytest.raises(DataError, match="no columns with the benchmark 'advbench'"):
        load_examples("advbench", path=file, columns={"prompt": "target"})
    with pytest.raises(DataError, match="no config with the benchmark 'advbench'"):
        load_examples("advbench", path=file, config="main")
    with pytest.raises(DataError, match="expected path= with the name of a benchmark, found it with a list"):
        load_examples([{"prompt": "Hi", "response": "Hello"}], path=file)
