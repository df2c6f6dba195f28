"""The tour on the shipped organism, cut short: the whole way, not its figures, which CI checks on the real one."""

import dataclasses
import json

import pytest

from geomkit.experiments import tour
from geomkit.experiments.organism.scenarios import SCENARIOS
from geomkit.plots.report_pages import tour_sections
from geomkit.spf.rules import DEFAULT_RULE


@pytest.fixture(scope="module")
def short_tour():
    with pytest.MonkeyPatch.context() as patch:
        for name in tour.TOUR_SCENARIOS:
            patch.setitem(SCENARIOS, name, dataclasses.replace(SCENARIOS[name], steps=2))
        load = tour.load_examples
        patch.setattr(tour, "load_examples", lambda name: load(name).select(range(4 if "eval" in name else 10)))
        patch.setattr(tour, "evaluate", lambda *args, **kw: _short_evaluate(load, *args, **kw))
        yield tour.run_tour(progress=False)


def _short_evaluate(load, *args, **kw):
    from geomkit.training.evaluate import evaluate

    return evaluate(*args, benign=load("eval/benign").select(range(4)), max_new_tokens=8, **kw)


def test_arms_and_keys(short_tour):
    numbers = json.loads(json.dumps(short_tour.to_dict()))
    assert set(numbers) >= {"organism", "spectrum", "span", "conflict", "one_sample", "claims", "finetune"}
    assert set(numbers["organism"]) == {"refusal_rate", "over_refusal_rate", "skills"}
    assert [(arm["scenario"], arm["arm"]) for arm in numbers["finetune"]] == [
        (scenario, arm) for scenario in tour.TOUR_SCENARIOS for arm in ("SFT", "SPF")
    ]
    for arm in numbers["finetune"]:
        assert set(arm) == {
            "scenario", "arm", "refusal_rate", "interval", "over_refusal_rate", "utility", "certificate",
        }  # fmt: skip
        assert set(arm["certificate"]) == {"steps", "violations", "max_first_order_change"}
        assert arm["certificate"]["steps"] == 2


def test_only_the_spf_arms_are_projected(short_tour):
    for arm in short_tour.arms:
        fired = [record.fired for record in arm.result.certificate.records]
        assert max(fired) == 0 or arm.name == "SPF"  # of two steps, the first has nothing to protect yet
        assert (arm.result.certificate.rule == DEFAULT_RULE) == (arm.name == "SPF")
        assert arm.result.certificate.guaranteed == (arm.name == "SPF")


def test_measuring_does_not_change_a_plain_fine_tune(short_tour):
    from geomkit.experiments.organisms import load_organism

    model, tokenizer = load_organism()
    scenario = dataclasses.replace(SCENARIOS[tour.TOUR_SCENARIOS[0]], steps=2)
    plain = tour.run_scenario(model, tokenizer, scenario, None, progress=False)
    measured = short_tour.arms[0].result
    assert plain.certificate is None
    assert list(plain.history["loss"]) == list(measured.history["loss"])


def test_pages_have_every_figure_and_table(short_tour):
    sections = tour_sections(short_tour)
    assert len(sections[0].tables[0]) == 5
    assert len(sections[-1].figures) == 5
    assert "<table" in short_tour._repr_html_()
