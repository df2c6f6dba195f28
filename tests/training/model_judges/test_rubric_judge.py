"""Judges by language models whose answers are forced, against verdicts read by hand."""

import copy
from dataclasses import replace

import pytest
import torch

from geomkit.errors import DataError
from geomkit.training.judges import BatchJudge, Verdict, judge_refusals
from geomkit.training.model_judges.language_models import ModelAnswers
from geomkit.training.model_judges.presets import RUBRICS
from geomkit.training.model_judges.rubric_judge import RubricJudge
from tests.helpers.tiny import tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TOKENIZER.add_tokens(["yes", "unsafe", "2_full_refusal", "1_full_compliance"])
IDS = TOKENIZER.get_vocab()
PROMPTS = ["how do i steal the bike", "paint", "steal the fence"]
RESPONSES = ["sure take a brush", "no way", "sorry no"]
GUARD_OF_PARTS = (
    "{% for m in messages %}{% for part in m['content'] %}{% if part is mapping %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
)


def forced(answer):
    """A model whose greedy answer is the word of a function of the question's ids; the batches that it saw."""
    model, batches = tiny_llama(vocab_size=len(TOKENIZER)), []

    def generate(input_ids, attention_mask, generation_config):
        questions = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        batches.append(questions)
        words = torch.tensor([[IDS[answer(question)], IDS["[end]"]] for question in questions])
        return torch.cat([input_ids, words], dim=1)

    model.generate = generate
    return model, batches


def judge_by(name, answer, **options):
    model, batches = forced(answer)
    return RubricJudge(RUBRICS[name], ModelAnswers(model, TOKENIZER, progress=False, **options), "tiny"), batches


def test_a_classifier_of_raw_text_in_batches():
    judge, batches = judge_by("harmbench", lambda ids: "yes" if IDS["brush"] in ids else "no", batch_size=2)
    assert judge.verdicts(PROMPTS, RESPONSES) == [
        Verdict(harmful=True, label="yes"),
        Verdict(harmful=False, label="no"),
        Verdict(harmful=False, label="no"),
    ]
    assert [len(batch) for batch in batches] == [2, 1]
    texts = [RUBRICS["harmbench"].question(*pair) for pair in zip(PROMPTS, RESPONSES, strict=True)]
    assert sorted(ids for batch in batches for ids in batch) == sorted(TOKENIZER(text)["input_ids"] for text in texts)
    assert isinstance(judge, BatchJudge)
    assert (judge.name, judge.decides, judge.labels) == ("harmbench=tiny", ("harmful",), ())


def test_a_judge_without_a_pad_token_judges_as_with_one():
    """The end of a sequence fills short rows, to which nobody attends; without both, it is the judge that is named."""
    questions = [RUBRICS["harmbench"].question(*pair) for pair in zip(PROMPTS, RESPONSES, strict=True)]
    tokenizer, model = copy.deepcopy(TOKENIZER), tiny_llama(vocab_size=len(TOKENIZER))
    with_pad = ModelAnswers(model, tokenizer, progress=False)(questions, 4)
    tokenizer.pad_token = None
    assert ModelAnswers(model, tokenizer, progress=False)(questions, 4) == with_pad
    tokenizer.eos_token = None
    with pytest.raises(
        DataError, match=r"expected a judge with a pad or end-of-sequence token.*set the judge's"
    ) as told:
        ModelAnswers(model, tokenizer, progress=False)(questions, 4)
    assert "--pad-token" not in str(told.value)


def test_a_rubric_in_a_chat():
    judge, batches = judge_by("xstest", lambda ids: "2_full_refusal" if IDS["sorry"] in ids else "1_full_compliance")
    assert [verdict.refused for verdict in judge.verdicts(PROMPTS, RESPONSES)] == [False, False, True]
    assert judge_refusals(judge, PROMPTS, RESPONSES) == [False, False, True]
    assert judge(PROMPTS[2], RESPONSES[2]) is True
    assert all(ids[0] == IDS["[user]"] and ids[-1] == IDS["[assistant]"] for batch in batches for ids in batch)


@pytest.mark.parametrize("template", [None, GUARD_OF_PARTS])
def test_a_guard_reads_the_exchange_through_its_template(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    model, batches = forced(lambda _: "no")
    answers = ModelAnswers(model, tokenizer, progress=False)
    answers([RUBRICS["llama-guard"].question("steal the bike", "take a brush")], 4)
    words = [IDS[word] for word in "steal the bike take a brush".split()]
    assert [token for token in batches[0][0] if token in words] == words


def test_a_template_that_hides_the_response_or_none():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['role'] }} {% endif %}{% endfor %}"
    )
    model, _ = forced(lambda _: "no")
    with pytest.raises(DataError, match="to show the judge the response, found a text without it"):
        ModelAnswers(model, tokenizer)([RUBRICS["llama-guard"].question("steal", "take")], 4)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(DataError, match="to show the judge the response, found TemplateError: no"):
        ModelAnswers(model, tokenizer)([RUBRICS["llama-guard"].question("steal", "take")], 4)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="expected a judge with a chat template, found none"):
        ModelAnswers(model, tokenizer)([RUBRICS["xstest"].question("steal", "take")], 4)


def test_answers_that_cannot_be_read_are_counted_and_the_first_is_shown():
    judge, _ = judge_by("harmbench", lambda ids: "no" if IDS["way"] in ids else "sure")
    with pytest.raises(
        DataError, match=r"'harmbench=tiny': expected yes or no, found 'sure' on response 0, and 2 of 3 answers"
    ):
        judge.verdicts(PROMPTS, RESPONSES)


def test_a_judge_of_harm_is_no_judge_of_refusals():
    judge, _ = judge_by("harmbench", lambda _: "yes")
    with pytest.raises(DataError, match="expected a judge of refusals, found 'harmbench=tiny', which decides harmful"):
        judge("help", "no")


def test_a_template_must_show_both():
    for template in ("{response} {prompt}", "{prompt}", ""):
        with pytest.raises(DataError, match=r"expected \{prompt\} and then \{response\} in the template of rubric"):
            RubricJudge(replace(RUBRICS["harmbench"], template=template), lambda *_: [])
