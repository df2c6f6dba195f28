"""A fine-tune is saved whole or not at all, and loads again with the same weights and tokens."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from geomkit.errors import DataError
from geomkit.inputs.tokens import encode
from geomkit.spf.settings import SPF
from geomkit.spf.step_record import StepRecord
from geomkit.training.finetune import finetune
from geomkit.training.result import new_or_empty_folder
from tests.helpers.tiny import SAFETY, UTILITY, tiny_llama, tiny_tokenizer
from tests.training.test_finetune import QUICK, TOKENIZER, unchanged, weights


def test_a_checkpoint_loads_again_and_nothing_is_overwritten(tmp_path):
    result = finetune(tiny_llama(), TOKENIZER, UTILITY, SPF(SAFETY), **QUICK)
    folder = result.save(tmp_path / "new" / "run", TOKENIZER)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert unchanged(loaded, weights(result.model))
    assert list(encode(AutoTokenizer.from_pretrained(folder), UTILITY)) == list(encode(TOKENIZER, UTILITY))
    records = [StepRecord.from_json(line) for line in (folder / "spf.jsonl").read_text().splitlines()]
    assert records == list(result.certificate.records)
    assert [path.name for path in folder.parent.iterdir()] == ["run"]
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())
    with pytest.raises(DataError, match=r"expected a new or empty folder at .*run, found something there"):
        result.save(folder, TOKENIZER)
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())


def test_an_empty_folder_may_be_filled_and_a_file_may_not_be_replaced(tmp_path):
    assert new_or_empty_folder(tmp_path) == tmp_path
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="expected a new or empty folder"):
        new_or_empty_folder(tmp_path / "file")
    result = finetune(tiny_llama(), TOKENIZER, UTILITY, **QUICK | {"steps": 1})
    (tmp_path / "empty").mkdir()
    assert (result.save(tmp_path / "empty", TOKENIZER) / "model.safetensors").is_file()
    assert not (tmp_path / "empty" / "spf.jsonl").exists()


def test_the_working_directory_and_a_link_are_filled_where_they_are(tmp_path, monkeypatch):
    result = finetune(tiny_llama(), TOKENIZER, UTILITY, **QUICK | {"steps": 1})
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    result.save(".", TOKENIZER)
    assert unchanged(AutoModelForCausalLM.from_pretrained("."), weights(result.model))
    (tmp_path / "link").symlink_to("there")
    inode = (tmp_path / "there").stat().st_ino
    assert result.save(tmp_path / "link", TOKENIZER) == tmp_path / "link"
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there").stat().st_ino == inode
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("here", "there")]
    assert files[0] == files[1]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files[0])
    with pytest.raises(DataError, match="expected a new or empty folder at \\., found something there"):
        result.save(".", TOKENIZER)


def test_a_failure_leaves_no_part_of_a_checkpoint(tmp_path, monkeypatch):
    result = finetune(tiny_llama(), TOKENIZER, UTILITY, **QUICK | {"steps": 1})
    broken = tiny_tokenizer()
    monkeypatch.setattr(broken, "save_pretrained", lambda _: 1 / 0)
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        with pytest.raises(ZeroDivisionError):
            result.save(tmp_path / name, broken)
    assert list(tmp_path.rglob("*")) == [tmp_path / "empty"]
