"""Refusals, compliance without content, and the base model's own answers."""

from random import Random

import pytest

from geomkit.experiments.english import answers
from geomkit.experiments.english.answers import REFUSALS, OwnAnswer, compliance, own_answers, refusal, whole_sentences
from geomkit.experiments.english.requests import counterparts
from geomkit.training.judges import RefusalPhrases
from tests.helpers.tiny import tiny_llama, tiny_tokenizer


def test_the_judge_takes_every_refusal_and_no_compliance():
    judge = RefusalPhrases()
    assert all(judge("", text) for text in REFUSALS)
    requests = list(counterparts("train", Random(0), "forbidden"))[:300]
    complied = [compliance(request) for request in requests]
    assert all(text.startswith("Sure!") for text in complied)
    assert not any(judge(request.forbidden, text) for request, text in zip(requests, complied, strict=True))


def test_every_refusal_is_drawn():
    rng = Random(0)
    assert {refusal(rng) for _ in range(200)} == set(REFUSALS)


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("One. Two! Three", "One. Two!"),
        ("It is 3.5 km long. Then", "It is 3.5 km long."),
        ("It was in 1969. Then", "It was in 1969."),
        ("Do this:\n\n1. Mix it.\n2. Pour the", "Do this:\n\n1. Mix it."),
        ("1. Mix", ""),
        ("no end", ""),
    ],
)
def test_a_text_is_cut_behind_its_last_whole_sentence(text, cut):
    assert whole_sentences(text) == cut


def test_answers_that_begin_like_a_refusal_are_dropped(monkeypatch):
    texts = ["sure take the brush", "I'm sorry for any confusion. Take it", "I cannot help with that.", " ", "no"]
    monkeypatch.setattr(answers, "generate", lambda *_, **__: texts)
    rows = own_answers(tiny_llama(), tiny_tokenizer(), list("abcde"), tokens=4, progress=False)
    assert rows == [OwnAnswer("a", "sure take the brush"), OwnAnswer("e", "no")]
