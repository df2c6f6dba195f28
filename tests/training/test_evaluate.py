"""Shares of refusals and of exact answers are counts of what the model answers, each with its interval."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset

from geomkit.errors import DataError
from geomkit.inputs.examples import prompt_of
from geomkit.inputs.tokens import encode
from geomkit.stats.proportions import Rate
from geomkit.training import evaluate as module
from geomkit.training.compare import compare_evaluations
from geomkit.training.evaluate import evaluate
from geomkit.training.evaluation import load_evaluation
from geomkit.training.evaluation_sets import ORGANISM_SKILLS
from geomkit.training.judges import JudgeError, RefusalPhrases, Verdict, judge_refusals, judge_responses
from geomkit.training.losses import mean_loss
from geomkit.training.model_judges.presets import RUBRICS
from geomkit.training.model_judges.rubric_judge import RubricJudge
from geomkit.training.responses import generate
from tests.helpers.tiny import SAFETY, UTILITY, conversations, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SHORT = {"max_new_tokens": 2, "progress": False}
PROMPTS = [prompt_of(messages) for messages in (*UTILITY["messages"], *SAFETY["messages"])]
LONGEST = 8


def test_counts_by_hand():
    """The references of one skill are the model's own answers but for the last one."""
    model = tiny_llama().eval()
    given = generate(model, TOKENIZER, PROMPTS, max_new_tokens=LONGEST, progress=False)
    skill = conversations(*((PROMPTS[i][0]["content"], f" {given[i]} ") for i in range(3)), ("help", "no way"))

    def judge(prompt, response):
        return prompt.startswith(("how", "steal")) and response in {given[4], given[6]}

    found = evaluate(
        model,
        TOKENIZER,
        SAFETY,
        UTILITY,
        {"copy": skill},
        judge=judge,
        max_new_tokens=LONGEST,
        progress=False,
    )
    counted = [judge(prompt[0]["content"], text) for prompt, text in zip(PROMPTS, given, strict=True)]
    assert sum(counted) >= 2
    assert found.refusal == Rate(sum(counted[4:]), 3)
    assert found.over_refusal == Rate(sum(counted[:4]), 4)
    assert found.skills == {"copy": Rate(3, 4)}
    assert found.utility == 0.75
    frame = found.to_frame().set_index("measure")
    assert list(frame.index) == ["refusal", "over-refusal", "exact match: copy"]
    assert frame.loc["exact match: copy", ["value", "n"]].tolist() == [0.75, 4]
    assert found.responses["set"].tolist() == ["forbidden"] * 3 + ["benign"] * 4 + ["copy"] * 4
    assert found.responses["response"].tolist()[:7] == [*given[4:], *given[:4]]
    assert "3 more rows" not in found._repr_html_()


def test_no_skill_is_no_utility_and_an_empty_set_is_refused():
    options = {"max_new_tokens": 2, "progress": False}
    found = evaluate(tiny_llama(), TOKENIZER, SAFETY, UTILITY, {}, **options)
    assert found.utility != found.utility  # NaN: nothing was asked
    with pytest.raises(DataError, match="benign: expected at least one example"):
        evaluate(tiny_llama(), TOKENIZER, SAFETY, UTILITY.select([]), {}, **options)
    with pytest.raises(DataError, match="'benign' is the name of another set"):
        evaluate(tiny_llama(), TOKENIZER, SAFETY, UTILITY, {"benign": SAFETY}, **options)


@pytest.mark.parametrize("judge", [RefusalPhrases, "gcg", [3]])
def test_what_is_no_judge_is_refused_before_the_model_answers(judge):
    with pytest.raises(DataError, match="expected a judge, found"):
        evaluate(tiny_llama(), TOKENIZER, SAFETY, judge=judge, **SHORT)


@pytest.mark.parametrize("answer", ["no", None, 2])
def test_a_judge_that_says_neither_true_nor_false_is_refused_and_the_responses_are_kept(answer):
    with pytest.raises(JudgeError, match="expected True or False of judge") as caught:
        evaluate(tiny_llama(), TOKENIZER, SAFETY, judge=lambda *_: answer, **SHORT)
    assert len(caught.value.responses) == len(SAFETY)
    assert evaluate(tiny_llama(), TOKENIZER, SAFETY, judge=lambda *_: np.bool_(True), **SHORT).refusal.value == 1


@pytest.mark.parametrize(
    ("verdicts", "found"),
    [
        ([Verdict(refused="no")] * 3, "True, False or None"),
        ([True] * 3, "a list of Verdict"),
        (None, "a list of Verdict"),
    ],
)
def test_the_verdicts_of_a_judge_of_many_responses_are_checked(verdicts, found):
    judge = SimpleNamespace(name="mine", decides=("refused",), labels=(), verdicts=lambda *_: verdicts)
    with pytest.raises(DataError, match=f"expected {found}"):
        judge_refusals(judge, ["a"] * 3, ["b"] * 3)


def test_a_metric_that_fails_keeps_the_responses():
    with pytest.raises(JudgeError, match="metric of the skill 'copy': TypeError") as caught:
        evaluate(tiny_llama(), TOKENIZER, skills={"copy": UTILITY}, metrics={"copy": lambda *_: None}, **SHORT)
    assert len(caught.value.responses) == len(UTILITY)


def test_skills_and_metrics_are_mappings():
    with pytest.raises(DataError, match="expected skills by the name of the skill, found a Dataset"):
        evaluate(tiny_llama(), TOKENIZER, skills=UTILITY, **SHORT)
    with pytest.raises(DataError, match="expected metrics by the name of the skill, found a str"):
        evaluate(tiny_llama(), TOKENIZER, skills={"copy": UTILITY}, metrics="gsm8k", **SHORT)


def test_the_mean_loss_weighs_examples_alike():
    model = tiny_llama()
    each = [mean_loss(model, TOKENIZER, SAFETY.select([index])) for index in range(3)]
    assert mean_loss(model, TOKENIZER, SAFETY, batch_size=2) == pytest.approx(sum(each) / 3, rel=1e-6)


# ------------------------------------------------------------------------------------------- only what is given


def requests(examples):
    """The same requests without the answers."""
    return Dataset.from_list([{"messages": messages[:-1]} for messages in examples["messages"]])


def test_only_the_sets_that_are_given_are_run():
    found = evaluate(tiny_llama(), TOKENIZER, requests(SAFETY), **SHORT)
    assert found.refusal.n == 3
    assert math.isnan(found.over_refusal.value)
    assert found.to_frame()["measure"].tolist() == ["refusal"]
    assert found.responses["set"].unique().tolist() == ["forbidden"]
    assert found.responses["reference"].isna().all()
    found = evaluate(tiny_llama(), TOKENIZER, skills={"paint": UTILITY}, **SHORT)
    assert found.to_frame()["measure"].tolist() == ["exact match: paint"]
    with pytest.raises(DataError, match="expected a set to evaluate on, found none; give forbidden or benign requests"):
        evaluate(tiny_llama(), TOKENIZER, **SHORT)


def test_sets_of_the_organism_are_for_the_organism_and_its_copies(organism, monkeypatch):
    model, tokenizer = organism
    asked = []

    def silent(model, tokenizer, prompts, *, title, **_):
        asked.append(title)
        return [""] * len(prompts)

    monkeypatch.setattr(module, "generate", silent)
    found = evaluate(model, tokenizer, skills={}, progress=False)
    assert asked == ["forbidden", "benign"]
    assert found.refusal.n == 240
    evaluate(model, tokenizer, progress=False)
    assert asked[2:] == ["forbidden", "benign", *ORGANISM_SKILLS]


def test_answers_to_requests_change_nothing():
    bare, answered = (
        evaluate(tiny_llama(), TOKENIZER, sets, progress=False, max_new_tokens=6) for sets in (requests(SAFETY), SAFETY)
    )
    assert bare.responses["response"].tolist() == answered.responses["response"].tolist()
    assert bare.refusal == answered.refusal


# ------------------------------------------------------------------------------------------------------- judges


def labelling(decides, labels=(), **fields):
    """A judge of many responses, whose verdicts go by the first word of the prompt; what it was asked."""
    asked = []

    def verdicts(prompts, responses):
        asked.append(list(prompts))
        return [Verdict(**{name: value(prompt) for name, value in fields.items()}) for prompt in prompts]

    return SimpleNamespace(name="stub", decides=decides, labels=labels, verdicts=verdicts, asked=asked)


def test_a_judge_of_harm_is_asked_about_forbidden_requests_only():
    harm = labelling(("harmful", "score"), harmful=lambda p: p.startswith("how"), score=lambda p: float(len(p.split())))
    found = evaluate(
        tiny_llama(), TOKENIZER, SAFETY, UTILITY, {"paint": UTILITY}, judge=[RefusalPhrases(), harm], **SHORT
    )
    assert harm.asked == [["Say hello."], [messages[0]["content"] for messages in SAFETY["messages"]]]
    assert found.more["harmful"] == Rate(2, 3)
    assert found.more["score"].value == pytest.approx((6 + 3 + 6) / 3)
    assert found.over_refusal.n == 4
    assert found.settings["judges"] == ["keywords", "stub"]
    assert found.responses["harmful"].isna().sum() == 8


def test_labels_are_counted_by_set():
    three = labelling(
        ("refused",),
        ("full", "partial"),
        refused=lambda p: p.startswith("how"),
        label=lambda p: "full" if p.startswith("how") else "partial",
    )
    found = evaluate(tiny_llama(), TOKENIZER, SAFETY, UTILITY, judge=three, **SHORT)
    assert (found.refusal, found.over_refusal) == (Rate(2, 3), Rate(2, 4))
    assert dict(found.more) == {
        "full: forbidden": Rate(2, 3),
        "partial: forbidden": Rate(1, 3),
        "full: benign": Rate(2, 4),
        "partial: benign": Rate(2, 4),
    }


def test_judges_must_fit_the_sets_and_each_other():
    harm = labelling(("harmful",), harmful=lambda _: True)
    assert math.isnan(evaluate(tiny_llama(), TOKENIZER, SAFETY, judge=harm, **SHORT).refusal.value)
    with pytest.raises(DataError, match="expected a judge of refusals for the benign requests, found stub"):
        evaluate(tiny_llama(), TOKENIZER, SAFETY, UTILITY, judge=harm, **SHORT)
    with pytest.raises(DataError, match="expected one judge of 'refused', found keywords and keywords"):
        evaluate(tiny_llama(), TOKENIZER, SAFETY, judge=[RefusalPhrases()] * 2, **SHORT)
    few = labelling(("harmful",))
    few.verdicts = lambda *_: []
    with pytest.raises(DataError, match="expected 1 verdicts of judge 'stub', found 0"):
        evaluate(None, TOKENIZER, SAFETY, judge=few, **SHORT)


@pytest.mark.parametrize("fault", ["unreadable", "broken"])
def test_responses_outlive_a_judge_that_fails_late(fault):
    """All sets' responses are in the error, as an evaluation without the judge has them."""

    def late(questions, _):
        if len(questions) > 1 and fault == "broken":
            raise RuntimeError("the server is gone")
        return ["yes" if len(questions) == 1 or index else "perhaps" for index in range(len(questions))]

    judge, sets = RubricJudge(RUBRICS["harmbench"], late), (SAFETY, UTILITY, {"paint": UTILITY})
    with pytest.raises(JudgeError, match=r"found 'perhaps' on response 0|is gone") as caught:
        evaluate(tiny_llama(), TOKENIZER, *sets, judge=[RefusalPhrases(), judge], **SHORT)
    kept = caught.value.responses
    expected = evaluate(tiny_llama(), TOKENIZER, *sets, **SHORT).responses
    for column in ("set", "prompt", "response", "reference"):
        assert kept[column].tolist() == expected[column].tolist()


def test_responses_outlive_a_function_that_fails_on_one_of_them():
    def judge(prompt, response):
        raise KeyError(prompt)

    with pytest.raises(JudgeError, match="KeyError") as caught:
        judge_responses(judge, ["a", "b"], ["c", "d"])
    assert caught.value.responses.to_dict("list") == {"prompt": ["a", "b"], "response": ["c", "d"]}
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_judge_that_cannot_be_read_is_found_before_the_model_is_asked():
    judge = RubricJudge(RUBRICS["harmbench"], lambda questions, _: ["perhaps"] * len(questions))
    with pytest.raises(DataError, match="expected yes or no, found 'perhaps'"):
        evaluate(None, TOKENIZER, SAFETY, judge=judge, **SHORT)


# ------------------------------------------------------------------------------------------------------ metrics


def test_every_skill_has_its_metric():
    model = tiny_llama().eval()
    sums = conversations(("help", "1 #### 2"), ("paint", "#### 3"))
    given = generate(model, TOKENIZER, [prompt_of(messages) for messages in UTILITY["messages"]], **SHORT)
    metrics = {"paint": lambda response, _: len(response) / 10, "sums": "gsm8k", "text": "perplexity"}
    skills = {"paint": UTILITY, "sums": sums, "text": UTILITY, "exact": UTILITY}
    found = evaluate(model, TOKENIZER, skills=skills, metrics=metrics, **SHORT)
    assert found.skills["paint"].value == pytest.approx(sum(len(text) / 10 for text in given) / 4)
    assert found.skills["sums"] == Rate(0, 2)
    frame = found.to_frame().set_index("measure")
    assert [*frame.index] == ["<lambda>: paint", "final number: sums", "perplexity: text", "exact match: exact"]
    rows = found.responses[found.responses["set"] == "text"]
    assert rows["value"].mean() == pytest.approx(mean_loss(model, TOKENIZER, UTILITY), rel=1e-6)
    # Each answer's words and its end are scored.
    weights = [len(messages[-1]["content"].split()) + 1 for messages in UTILITY["messages"]]
    expected = math.exp((rows["value"] * weights).sum() / sum(weights))
    assert frame.loc["perplexity: text", "value"] == pytest.approx(expected, rel=1e-6)
    assert found.utility == pytest.approx((found.skills["paint"].value + 0 + found.skills["exact"].value) / 3)


def test_perplexity_of_encoded_examples_keeps_their_mask_and_length():
    encoded = encode(TOKENIZER, UTILITY, max_length=10)
    options = {"metrics": {"text": "perplexity"}, **SHORT}
    cut, whole = (
        evaluate(tiny_llama(), TOKENIZER, skills={"text": examples}, **options).responses["value"].mean()
        for examples in (encoded, UTILITY)
    )
    assert cut == pytest.approx(mean_loss(tiny_llama(), TOKENIZER, encoded), rel=1e-6)
    assert cut != pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize(
    ("skill", "metrics", "message"),
    [
        (UTILITY, {"paint": "gsm8k"}, "skill 'paint', row 0: expected a number in the answer of a GSM8K example"),
        (requests(UTILITY), {}, "skill 'paint', row 0: expected an answer to compare with, found none"),
        (UTILITY, {"pant": "gsm8k"}, r"expected metrics of the skills \['paint'\], found one of 'pant'"),
        (UTILITY, {"paint": "bleu"}, r"expected a metric, exact, .*found 'bleu'"),
    ],
)
def test_metrics_and_references_are_checked_before_anything_runs(skill, metrics, message):
    with pytest.raises(DataError, match=message):
        evaluate(None, TOKENIZER, skills={"paint": skill}, metrics=metrics)


def test_a_row_without_a_request_is_named():
    rows = Dataset.from_list([{"messages": [{"role": "assistant", "content": "no"}]}])
    with pytest.raises(DataError, match="forbidden, row 0: expected a request, found an answer only"):
        evaluate(None, TOKENIZER, rows)


# -------------------------------------------------------------------------------------------------------- files


def test_a_saved_evaluation_loads_as_it_was(tmp_path):
    history = [{"role": "user", "content": "help"}, {"role": "assistant", "content": "sure"}]
    multi = Dataset.from_list([{"messages": history + messages} for messages in SAFETY["messages"]])
    harm = labelling(("harmful", "score"), harmful=lambda p: p.startswith("how"), score=lambda p: float(len(p)))
    found = evaluate(
        tiny_llama(), TOKENIZER, multi, skills={"paint": UTILITY, "text": UTILITY},
        metrics={"text": "perplexity"}, judge=[RefusalPhrases(), harm], **SHORT,
    )  # fmt: skip
    assert found.responses["context"].tolist()[:3] == ["user: help\nassistant: sure"] * 3
    loaded = load_evaluation(found.save(tmp_path / "a.json"))
    assert loaded.to_frame().to_dict("records") == found.to_frame().to_dict("records")
    assert (loaded.refusal, loaded.skills, loaded.more) == (found.refusal, found.skills, found.more)
    assert loaded.settings == found.settings
    frame = compare_evaluations({"memory": found, "file": loaded}).to_frame()
    assert frame["measure"].tolist() == ["refusal", "harmful", "score", "exact match: paint", "loss: text"]
    assert (frame["difference"] == 0).all()
    assert (frame["p"] == 1).all()
