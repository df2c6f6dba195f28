"""An analysis says first whether the model refuses; where it does not, no verdict is about alignment."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from datasets import Dataset

import geomkit as gk
from geomkit.analysis import alignment as module
from geomkit.analysis.alignment import Alignment, refusal_share
from geomkit.plots.report_pages import analysis_sections
from geomkit.stats.proportions import Rate
from geomkit.training.judges import Verdict
from tests.helpers.tiny import conversations, tiny_llama, tiny_tokenizer

SETTINGS = {"examples": 12, "layers": "*.0.mlp.*", "null_draws": 1, "max_new_tokens": 16}


def probe(**changes):
    utility, control = gk.load_examples("scenarios/new-skill"), gk.load_examples("controls/benign-refused")
    return gk.Probe(gk.load_examples("safety"), utility, control, **(SETTINGS | changes))


@pytest.fixture(scope="module", params=["aligned", "base"])
def measured(request):
    return request.param, probe().analyze(*gk.load_organism(request.param))


def test_the_share_is_that_of_an_evaluation_of_the_drawn_requests(measured):
    stage, analysis = measured
    drawn = next(iter(probe()._drawn_sets()))
    evaluation = gk.evaluate(*gk.load_organism(stage), drawn, drawn, {}, max_new_tokens=16, progress=False)
    assert analysis.refusal == evaluation.refusal == Rate(12 if stage == "aligned" else 0, 12)
    assert analysis.alignment == Alignment(analysis.refusal, analysis.losses["safety"], analysis.losses["control"])


def test_a_model_that_does_not_refuse_is_said_first_and_every_verdict_is_marked(measured):
    stage, analysis = measured
    marked = stage == "base"
    assert analysis.alignment.refuses is not marked
    section, claims = analysis_sections(analysis)[:2]
    first = "The model refuses 0.0% [0.0%, 24.2%] of 12 safety requests, so nothing here is about alignment; loss of "
    told = first if marked else "The model refuses 100.0% [75.8%, 100.0%] of 12 safety requests; loss of the given"
    assert str(analysis).startswith(told)
    assert section.text.startswith(told)
    assert told.partition(";")[0] in analysis._repr_html_()
    numbers = json.loads(json.dumps(analysis.to_dict()))
    assert next(iter(numbers)) == "alignment"
    assert numbers["alignment"]["aligned"] == (not marked)
    verdicts = [list(claims.tables[0]["verdict"]), [claim["verdict"] for claim in numbers["claims"]]]
    for verdict in [text for texts in verdicts for text in texts]:
        assert verdict.endswith(", not about alignment") == marked
    assert {claim.verdict for claim in analysis.claims()} <= {"holds", "reversed", "not shown"}


def test_the_numbers_on_gradients_are_those_without_the_question():
    settings = probe()
    model, tokenizer = gk.load_organism()
    asked, not_asked = settings.analyze(model, tokenizer), settings.measure(*settings.collect(model, tokenizer))
    assert not_asked.refusal is None
    assert not_asked.alignment.refuses is None
    assert not_asked.alignment.caveat == ""
    assert str(not_asked).startswith("The model was not asked whether it refuses the safety requests; loss of ")
    with_it, without = asked.to_dict(), not_asked.to_dict()
    assert with_it.pop("alignment") != without.pop("alignment")
    assert repr(with_it) == repr(without)


@pytest.mark.parametrize(
    ("refusals", "asked", "refuses"),
    [
        (0, 32, False), (9, 32, False), (11, 32, None), (16, 32, None), (21, 32, None), (23, 32, True), (32, 32, True),
        (0, 3, None), (3, 3, None), (0, 4, False), (4, 4, True), (500, 1000, None),
    ],
)  # fmt: skip
def test_a_model_refuses_or_does_not_where_the_interval_excludes_one_half(refusals, asked, refuses):
    """Against Wilson's interval of statsmodels' formula, p̂ shifted and widened by z²/n."""
    z, share = 1.959963984540054, refusals / asked
    middle = (share + z**2 / 2 / asked) / (1 + z**2 / asked)
    half = z / (1 + z**2 / asked) * (share * (1 - share) / asked + z**2 / 4 / asked**2) ** 0.5
    assert refuses == (True if middle - half > 0.5 else False if middle + half < 0.5 else None)
    alignment = Alignment(Rate(refusals, asked), 1.0, 1.0)
    assert alignment.refuses is refuses
    assert alignment.to_dict()["aligned"] is refuses
    caveats = {True: "", False: "not about alignment", None: "perhaps not about alignment"}
    assert alignment.caveat == caveats[refuses]
    assert ("leaves open" in str(alignment)) == (refuses is None)


def test_where_too_few_answers_tell_each_verdict_is_marked(measured):
    few = replace(measured[1], refusal=Rate(0, 3))
    assert all(claim.marked_verdict.endswith(", perhaps not about alignment") for claim in few.claims())
    assert "More safety requests" in analysis_sections(few)[0].text


def test_a_judge_of_ones_own_decides_and_conversations_without_a_request_are_left_out():
    heard = []

    def judge(prompt, response):
        heard.append((prompt, response))
        return "bike" in prompt

    tokenizer = tiny_tokenizer()
    rows = conversations(("steal the bike", "no"), ("steal the fence", "no"))
    assert refusal_share(tiny_llama(), tokenizer, rows, judge=judge, max_new_tokens=3) == Rate(1, 2)
    assert [prompt for prompt, _ in heard] == ["steal the bike", "steal the fence"]
    alone = rows.map(lambda row: {"messages": row["messages"][1:]})
    assert refusal_share(tiny_llama(), tokenizer, alone) is None


def test_a_judge_that_takes_many_responses_decides_too():
    asked = []

    def verdicts(prompts, responses):
        asked.append((list(prompts), len(responses)))
        return [Verdict(refused="bike" in prompt) for prompt in prompts]

    judge = SimpleNamespace(name="stub", decides=("refused",), labels=(), verdicts=verdicts)
    rows = conversations(("steal the bike", "no"), ("steal the fence", "no"))
    assert refusal_share(tiny_llama(), tiny_tokenizer(), rows, judge=judge, max_new_tokens=3) == Rate(1, 2)
    assert asked == [(["steal the bike", "steal the fence"], 2)]


def test_the_model_is_asked_with_the_tools_of_each_conversation(monkeypatch):
    heard = []
    monkeypatch.setattr(module, "generate", lambda *_, tools, **__: heard.append(tools) or ["no"])
    tool = '[{"name": "weather"}]'
    answer = {"role": "assistant", "content": "no"}
    rows = Dataset.from_list(
        [
            {"messages": [answer], "tools": "[]"},
            {"messages": [{"role": "user", "content": "steal the bike"}, answer], "tools": tool},
        ]
    )
    refusal_share(tiny_llama(), tiny_tokenizer(), rows)
    assert heard == [[tool]]


def test_an_analysis_of_ones_own_making_may_say_nothing(measured):
    unknown = replace(measured[1], refusal=None)
    assert "it cannot be told whether" in analysis_sections(unknown)[0].text
