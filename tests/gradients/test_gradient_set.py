"""A gradient set is a mapping with a coverage; inner products of sets are sums over parameters."""

import math

import pytest
import torch

from geomkit.collection.collect import collect_gradients
from geomkit.errors import GeometryError
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.gradient_set import Coverage, GradientSet, layer_grams, set_inner, shared_layers
from tests.helpers.tiny import SAFETY, UTILITY, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def collected(examples, **options):
    return collect_gradients(tiny_llama(), TOKENIZER, examples, progress=False, **options)


@pytest.fixture(scope="module")
def safety():
    return collected(SAFETY, per_sample=True)


@pytest.fixture(scope="module")
def utility():
    return collected(UTILITY, per_sample=True)


def flat(gradients):
    return torch.cat([gradient.dense().flatten() for gradient in gradients.values()]).double()


def test_coverage_says_the_share_and_names_what_is_missing():
    assert str(Coverage({"a": 3}, {}, {})) == "100.0% of the chosen parameters"
    missing = dict.fromkeys("bcdef", 1)
    result = Coverage({"a": 3}, missing, dict.fromkeys(missing, "never ran"))
    assert result.share == 3 / 8
    assert str(result) == (
        "37.5% of the chosen parameters; missing: b (never ran), c (never ran), d (never ran) and 2 more"
    )
    assert Coverage({}, {}, {}).share == 0


def test_coverage_says_what_there_is_to_know():
    notes = dict.fromkeys("abcd", "its module is called 2 times")
    assert str(Coverage({"a": 3}, {"b": 1}, {"b": "never ran"}, {"a": "used without its module being called"})) == (
        "75.0% of the chosen parameters; missing: b (never ran); notes: a (used without its module being called)"
    )
    assert str(Coverage({"a": 3}, {}, {}, notes)).endswith("c (its module is called 2 times) and 1 more")
    gradients = GradientSet(
        {name: DenseGradient(torch.ones(2), tokens=1) for name in "ae"},
        0.0,
        1,
        1,
        Coverage({"a": 2, "e": 2}, {}, {}, notes),
    )
    assert list(gradients.to_frame()["note"]) == ["its module is called 2 times", ""]


def test_a_share_just_below_one_is_not_shown_as_all():
    assert str(Coverage({"a": 99_999}, {"b": 1}, {"b": "never ran"})).startswith("99.9% of the chosen parameters;")


def test_a_set_is_a_mapping_in_the_models_order(safety):
    names = [name for name, _ in tiny_llama().named_parameters()]
    assert list(safety) == names
    assert len(safety) == len(names)
    assert safety["lm_head.weight"] is safety.layers["lm_head.weight"]
    assert "model.norm.weight" not in safety.matrices()
    assert "model.layers.0.mlp.up_proj.weight" in safety.matrices()
    assert (safety.examples, safety.loss_tokens) == (3, 12)
    assert "gradient of 21 parameters over 3 examples (12 loss tokens), loss" in str(safety)


def test_one_row_per_parameter(safety):
    frame = safety.to_frame().set_index("parameter")
    assert list(frame.index) == list(safety)
    row = frame.loc["model.layers.1.self_attn.q_proj.weight"]
    assert (row["kind"], row["layer"], row["shape"], row["form"]) == ("attention", 1, "16×16", "dense")
    assert row["norm"] == safety[row.name].norm
    assert frame.loc["model.embed_tokens.weight", "form"] == "indexed"
    assert math.isnan(frame.loc["lm_head.weight", "layer"])
    assert "1 more row:" in safety._repr_html_()


def test_norm_and_inner_product_over_all_parameters(safety, utility):
    """Tolerance 1e-6 relative, because dense forms are summed in fp32 first."""
    assert safety.norm == pytest.approx(float(flat(safety).norm()), rel=1e-6)
    expected = float(flat(safety) @ flat(utility))
    assert set_inner(safety, utility) == pytest.approx(expected, abs=1e-6 * safety.norm * utility.norm)
    assert set_inner(safety, safety) == pytest.approx(safety.norm**2, rel=1e-12)


def test_grams_hold_every_product_between_samples(safety, utility):
    grams = layer_grams(safety, utility)
    assert list(grams) == list(safety)
    total = sum(grams.values())
    expected = torch.stack([flat(s) for s in safety.samples]) @ torch.stack([flat(s) for s in utility.samples]).T
    assert total.shape == (3, 4)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
    # The mean gradient is the mean of the samples' gradients.
    assert float(total.mean()) == pytest.approx(set_inner(safety, utility), abs=1e-6 * safety.norm * utility.norm)


def test_grams_need_samples(safety):
    mean = collected(SAFETY)
    for pair, place in (((mean, safety), "first"), ((safety, mean), "second")):
        with pytest.raises(GeometryError, match=f"per-sample gradients in the {place} set, .*per_sample=True"):
            layer_grams(*pair)


def test_sets_of_different_parameters_are_not_compared(safety):
    mlp = collected(SAFETY, layers="*.0.mlp.*", per_sample=True)
    some = r"found 18 on one side only \(lm_head.weight, model.embed_tokens.weight, .*\); .* same layers="
    for compare in (shared_layers, set_inner, layer_grams):
        with pytest.raises(GeometryError, match=some):
            compare(mlp, safety)
    assert shared_layers(mlp, mlp, mlp) == list(mlp)


def test_parameters_of_different_shape_are_not_compared():
    a, b = ({"w": DenseGradient(torch.ones(size), tokens=1)} for size in (2, 3))
    with pytest.raises(GeometryError, match="one shape"):
        set_inner(a, b)


def test_an_empty_set_has_no_norm():
    assert GradientSet({}, 0.0, 0, 0, Coverage({}, {}, {})).norm == 0
