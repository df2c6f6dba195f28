import json
from dataclasses import replace

import numpy as np
import pytest

import geomkit as gk
from geomkit.errors import GeometryError, GeomkitError
from geomkit.plots.report_pages import analysis_sections
from tests.helpers.tiny import CONTROL, SAFETY, UTILITY, conversations, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def found():
    return gk.analyze(tiny_llama(), TOKENIZER, SAFETY, UTILITY, control=CONTROL, null_draws=3, progress=False)


def test_both_sides_have_the_same_tokens_and_parameters(found):
    assert list(found.safety.layers) == list(found.utility.layers)
    for name, layer in found.safety.layers.items():
        assert layer.tokens == found.utility.layers[name].tokens
        assert {draw.tokens for draw in found.safety.null[name]} == {layer.tokens}
    assert found.coverage.share == 1


def test_headline_numbers(found):
    numbers = json.loads(json.dumps(found.to_dict()))
    assert set(numbers) == {
        "alignment",
        "losses",
        "largest_example",
        "spectrum",
        "span",
        "conflict",
        "one_sample",
        "claims",
    }
    for side in ("safety", "control", "utility"):
        assert {"tokens", "effective_rank", "cer10", "null_effective_rank", "null_cer10"} <= set(
            numbers["spectrum"][side]
        )
    assert {"cosine", "negative_share", "interval", "null_interval"} <= set(numbers["conflict"])
    assert {"overlap", "interval", "control", "null"} <= set(numbers["one_sample"])
    assert numbers["conflict"]["cosine"] == pytest.approx(cosine_by_hand(), rel=1e-4)


def test_spans_are_those_of_the_gradients():
    """Of the model and of its layers, from gradients that are collected apart, of three examples each."""
    probe = gk.Probe(*(side.select(range(3)) for side in (SAFETY, UTILITY, CONTROL)), null_draws=3)
    found = probe.analyze(tiny_llama(), TOKENIZER, progress=False)
    collected = probe.collect(tiny_llama(), TOKENIZER)
    for side, gradients in zip(("safety", "utility", "control"), collected, strict=True):
        for by, spans in (("model", found.spans), ("layer", found.layer_spans)):
            expected = gk.span(gradients, by=by).to_frame()["value"]
            assert spans[side].to_frame()["value"].to_numpy() == pytest.approx(expected.to_numpy(), rel=1e-4)
    layers = found.span_contrast("control", by="layer")
    assert list(layers.a.layers) == ["embedding", "layers.0", "layers.1", "norm", "head"]
    assert layers.plot().layout.title.text.replace("<br>", " ") == "Effective rank of the span: safety − control"
    assert "mean" not in layers.plot().layout.title.subtitle.text
    with pytest.raises(GeometryError, match="expected by to be model or layer, found 'parameter'"):
        found.span_contrast("control", by="parameter")


def test_spans_are_of_as_many_examples_of_each_set(found):
    fewest = min(map(len, (SAFETY, UTILITY, CONTROL)))
    assert fewest < max(map(len, (SAFETY, UTILITY, CONTROL)))
    for spans in (*found.spans.values(), *found.layer_spans.values()):
        assert {layer.tokens for layer in spans.layers.values()} == {fewest}


def cosine_by_hand():
    sides = [gk.collect_gradients(tiny_llama(), TOKENIZER, side, progress=False) for side in (SAFETY, UTILITY)]
    a, b = (np.concatenate([gradient.dense().flatten().numpy() for gradient in side.values()]) for side in sides)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_seeds_decide_and_nothing_else_does(found):
    again = gk.analyze(tiny_llama(), TOKENIZER, SAFETY, UTILITY, control=CONTROL, null_draws=3, progress=False)
    other = gk.analyze(tiny_llama(), TOKENIZER, SAFETY, UTILITY, control=CONTROL, null_draws=3, progress=False, seed=1)
    assert repr(again.to_dict()) == repr(found.to_dict())  # as text: NaN is not itself
    assert repr(other.to_dict()) != repr(found.to_dict())


def test_it_shows_itself(found):
    sections = analysis_sections(found)
    assert [len(section.figures) for section in sections] == [0, 0, 3, 3, 1]
    assert "What survives" in found._repr_html_()
    assert "100.0% of the chosen parameters" in found._repr_html_()
    frame = found.to_frame()
    assert list(frame["question"].unique()) == ["loss", "low rank?", "conflict?", "one sample?"]
    assert not frame.duplicated(["question", "measure", "of"]).any()


def test_an_example_that_holds_most_of_the_norm_is_told_of(found):
    squared = [
        sample.norm**2 for sample in gk.Probe(SAFETY, UTILITY, CONTROL).collect(tiny_llama(), TOKENIZER)[0].samples
    ]
    assert found.largest["safety"] == pytest.approx(max(squared) / sum(squared))
    uneven = replace(found, largest={"safety": 0.4, "control": 0.05, "utility": 0.05})
    assert "(safety 40%)" in str(uneven)
    assert "safety 40%" in analysis_sections(uneven)[1].text
    assert "squared norm" not in str(replace(found, largest=dict.fromkeys(found.largest, 0.1)))
    assert "verdict" in str(found)


def test_too_few_examples_are_refused_before_the_work():
    with pytest.raises(GeometryError, match="at least 3 safety examples"):
        gk.analyze(None, None, SAFETY.select([0]), UTILITY)
    with pytest.raises(GeometryError, match="examples=2"):
        gk.analyze(None, None, SAFETY, UTILITY, examples=2)
    with pytest.raises(GeometryError, match="at least 6 utility examples, half of whose prompts"):
        gk.analyze(None, None, SAFETY, UTILITY)


@pytest.mark.parametrize(("rows", "examples", "count"), [(40, 10, 10), (40, None, 20), (12, 10, 6)])
def test_the_control_is_made_of_prompts_that_utility_has_not(rows, examples, count):
    """Of a file that is sorted by kind, too."""
    kinds = [("how do i paint", "sure")] * (rows // 2) + [("help", "take a brush")] * (rows // 2)
    utility = conversations(*((f"{prompt} {number}", answer) for number, (prompt, answer) in enumerate(kinds)))
    probe = gk.Probe(SAFETY, utility, examples=examples, seed=1)
    _, useful, control = ([row[0]["content"] for row in side["messages"]] for side in probe._drawn_sets())
    assert len(useful) == len(control) == count
    assert not set(useful) & set(control)
    shares = [sum(prompt.startswith("help") for prompt in side) / count for side in (useful, control)]
    assert all(0.1 < share < 0.9 for share in shares)
    assert {row[1]["content"] for row in list(probe._drawn_sets())[2]["messages"]} <= {
        row[1]["content"] for row in SAFETY["messages"]
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"safety": "safety"}, "found str; make one"),
        ({"utility": UTILITY.rename_column("messages", "turns")}, "expected a column 'messages'"),
        ({"control": UTILITY.select([])}, "found an empty set"),
        ({"rank": 0}, "rank of at least 1"),
        ({"null_draws": -1}, "found null_draws=-1"),
    ],
)
def test_a_probe_refuses_what_is_no_set_of_examples(options, said):
    with pytest.raises(GeomkitError, match=said):
        gk.Probe(**({"safety": SAFETY, "utility": UTILITY, "control": UTILITY} | options))
