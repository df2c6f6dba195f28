"""A sequence classifier whose label depends on the last word of what it reads."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from geomkit.errors import DataError
from geomkit.training.judges import Verdict
from geomkit.training.model_judges.classifiers import ClassifierJudge, load_classifier
from tests.helpers.tiny import tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPTS = ["how do i paint", "help sorry", "steal"]
RESPONSES = ["sorry no way sorry", "sure", "take a brush sorry"]


def by_last_word(positions=64):
    """Of no layers: the embedding of "sorry" points along the first axis, of all other words along the second."""
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=4, intermediate_size=4, num_hidden_layers=0, num_attention_heads=1,
        max_position_embeddings=positions, pad_token_id=0, id2label={0: "REJECTION", 1: "NORMAL"},
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        words = model.model.embed_tokens.weight
        words.copy_(torch.tensor([0.0, 1, 0, 0]).expand_as(words))
        words[TOKENIZER.convert_tokens_to_ids("sorry")] = torch.tensor([1.0, 0, 0, 0])
        model.score.weight.copy_(torch.eye(2, 4))
    return model


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_responses_alone(batch_size):
    judge = ClassifierJudge(by_last_word(), TOKENIZER, refused=("REJECTION",), source="tiny", batch_size=batch_size)
    assert judge.verdicts(PROMPTS, RESPONSES) == [
        Verdict(refused=True, label="REJECTION"),
        Verdict(refused=False, label="NORMAL"),
        Verdict(refused=True, label="REJECTION"),
    ]
    assert judge(PROMPTS[0], RESPONSES[0]) is True
    assert (judge.name, judge.decides) == ("refused:REJECTION=tiny", ("refused",))


def test_pairs_show_the_prompt_first():
    judge = ClassifierJudge(by_last_word(), TOKENIZER, harmful=("NORMAL",), pair=True)
    assert [verdict.harmful for verdict in judge.verdicts(PROMPTS, RESPONSES)] == [False, True, False]
    assert judge.verdicts(["sorry"], [""])[0].harmful is False
    assert judge.verdicts([""], ["help"])[0].harmful is True


def test_a_text_that_is_cut_is_counted_in_the_log(caplog):
    judge = ClassifierJudge(by_last_word(positions=3), TOKENIZER, refused=("REJECTION",))
    assert [verdict.refused for verdict in judge.verdicts(PROMPTS, RESPONSES)] == [False, False, False]
    assert "2 of 3 texts were cut to 3 tokens" in caplog.text


def test_labels_are_checked():
    with pytest.raises(DataError, match=r"labels of the classifier, \['REJECTION', 'NORMAL'\], found 'refusal'"):
        ClassifierJudge(by_last_word(), TOKENIZER, refused=("refusal",))
    with pytest.raises(DataError, match="expected labels that mean a refusal or harm, found none"):
        ClassifierJudge(by_last_word(), TOKENIZER)


def test_loading(tmp_path):
    by_last_word().save_pretrained(tmp_path / "good")
    tiny_llama().save_pretrained(tmp_path / "headless")
    for name in ("good", "headless"):
        TOKENIZER.save_pretrained(tmp_path / name)
    model, tokenizer = load_classifier(tmp_path / "good", device="cpu")
    assert ClassifierJudge(model, tokenizer, refused=("REJECTION",))("help", "sorry")
    with pytest.raises(DataError, match=r"expected a trained classifier at .*headless', found no weights for score"):
        load_classifier(tmp_path / "headless")
    with pytest.raises(DataError, match=r"expected a sequence classifier at .*nowhere', found"):
        load_classifier(tmp_path / "nowhere")


def test_a_classifier_without_a_pad_token_is_named_as_the_judge():
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.pad_token = None
    with pytest.raises(DataError, match=r"expected a classifier whose tokenizer has a pad token.*of the judge") as told:
        ClassifierJudge(by_last_word(), tokenizer, refused=("REJECTION",))
    assert "--pad-token" not in str(told.value)
