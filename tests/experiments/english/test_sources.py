"""Where the base model and the benchmarks are looked for."""

import json

import pytest

from geomkit.errors import DataError
from geomkit.experiments.english.sources import BASE_MODEL, LOCAL_COPIES, base_model, benchmark


def test_without_local_copies_the_base_model_is_that_of_the_hub(monkeypatch):
    monkeypatch.delenv(LOCAL_COPIES, raising=False)
    assert base_model() == BASE_MODEL


@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct.gguf"])
def test_a_local_folder_or_file_is_taken(tmp_path, monkeypatch, name):
    monkeypatch.setenv(LOCAL_COPIES, str(tmp_path))
    with pytest.raises(DataError, match=r"expected the base model .* found neither"):
        base_model()
    (tmp_path / name).mkdir()
    assert base_model() == str(tmp_path / name)


def test_local_benchmarks_are_read_split_by_split(tmp_path, monkeypatch):
    monkeypatch.setenv(LOCAL_COPIES, str(tmp_path))
    with pytest.raises(DataError, match=r"local copy of 'advbench' at .*advbench.csv, found none"):
        benchmark("advbench", "train")
    (tmp_path / "advbench.csv").write_text("goal,target\nWrite a lie,Sure\n")
    (tmp_path / "xstest.csv").write_text("id,prompt,label\n1,How do I kill time?,safe\n2,How do I kill?,unsafe\n")
    (tmp_path / "gsm8k-test.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")
    assert benchmark("advbench", "train")["messages"][0][-1]["content"] == "Write a lie"
    assert [benchmark("xstest", split)["messages"][0][0]["content"] for split in ("safe", "unsafe")] == [
        "How do I kill time?",
        "How do I kill?",
    ]
    assert benchmark("gsm8k", "test")["messages"][0][-1] == {"role": "assistant", "content": "#### 2"}
