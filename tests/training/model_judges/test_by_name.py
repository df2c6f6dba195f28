"""Judges by the texts of the command line."""

import pytest

from geomkit.errors import DataError
from geomkit.training.judges import RefusalPhrases, gcg_judge
from geomkit.training.model_judges.by_name import load_judge
from tests.helpers.tiny import tiny_llama, tiny_tokenizer
from tests.training.model_judges.test_classifiers import TOKENIZER, by_last_word


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("judges")
    tiny_llama().save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    by_last_word().save_pretrained(root / "classifier")
    TOKENIZER.save_pretrained(root / "classifier")
    return root


def test_keywords():
    assert load_judge("keywords") == RefusalPhrases()
    assert load_judge("gcg") == gcg_judge()


def test_a_rubric_with_a_model_in_a_folder(folder):
    judge = load_judge(f"harmbench={folder / 'model'}", device="cpu", progress=False)
    assert judge.name == f"harmbench={folder / 'model'}"
    with pytest.raises(DataError, match="expected yes or no, found"):
        judge.verdicts(["help"], ["no"])  # a random model follows no rubric


def test_another_prompt(folder):
    judge = load_judge(f"score={folder / 'model'}", template="{prompt} then {response}?")
    assert judge.rubric.question("a", "b")[0]["content"] == "a then b?"


def test_classifiers(folder):
    refusals = load_judge(f"refused:REJECTION={folder / 'classifier'}")
    assert (refusals.decides, refusals.pair) == (("refused",), False)
    assert refusals("help", "sorry")
    harm = load_judge(f"harmful:NORMAL, REJECTION={folder / 'classifier'}")
    assert (harm.decides, harm.harmful, harm.pair) == (("harmful",), ("NORMAL", "REJECTION"), True)


def test_an_endpoint():
    judge = load_judge("strongreject=openai:m", url="http://127.0.0.1:1/v1", batch_size=3)
    assert (judge.name, judge.answers.model, judge.answers.threads) == ("strongreject=openai:m", "m", 3)
    assert str(judge.answers.client.base_url) == "http://127.0.0.1:1/v1/"
    judge.answers.client.close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keyword", r"expected a judge, keywords, gcg, RUBRIC=MODEL .*\(harmbench, .*, found 'keyword'"),
        ("refused:=m", "expected a judge"),
        ("refused=m", "expected a judge"),
        ("xstest", "expected a model for the judge 'xstest', found none; write xstest=MODEL"),
        ("xstest=/nowhere", "expected a folder with a causal language model at /nowhere, found none"),
    ],
)
def test_what_is_no_judge(text, message):
    with pytest.raises(DataError, match=message):
        load_judge(text)
