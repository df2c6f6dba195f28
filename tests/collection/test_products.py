"""⟨W, G⟩ of a weight and its gradient from the outputs of the forward pass, against autograd's gradients."""

from collections import defaultdict

import pytest
import torch

from geomkit.collection.collect import collect_from_tokens
from tests.helpers.architectures import ARCHITECTURES, ROWS, backward, built, mean, reference
from tests.helpers.tiny import tiny_llama


def products(model, rows=ROWS, *, together=3):
    """Return ⟨W, G⟩ of the mean gradient for the parameters whose product is known in every part."""
    parts = defaultdict(list)
    budget = together * max(map(len, rows))
    gradients = collect_from_tokens(
        model, rows, 0, tokens_per_batch=budget, products=lambda name, part: parts[name].append(part)
    )
    assert set(parts) == set(gradients)
    return {
        name: float(torch.stack(values).sum()) / len(rows)
        for name, values in parts.items()
        if all(part is not None for part in values)
    }


def assert_right(found, model, gradients):
    parameters = dict(model.named_parameters())
    for name, value in found.items():
        weight, gradient = parameters[name].detach().double(), gradients[name].double()
        size = float(weight.norm() * gradient.norm())
        assert value == pytest.approx(float((weight * gradient).sum()), abs=1e-6 * size), name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_products_are_right(name, tied):
    model = built(name, tied=tied)
    assert_right(products(model), model, mean(reference(name, tied=tied)))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_linear_layer_has_a_product_unless_it_is_also_an_embedding(tied):
    found = products(built("llama", tied=tied))
    linear = {
        f"{path}.weight"
        for path, module in built("llama", tied=tied).named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert set(found) == (linear - {"lm_head.weight"} if tied else linear)


def test_a_layer_with_a_bias_has_no_product():
    with_biases, without = products(built("llama with biases", tied=False)), products(built("qwen2", tied=False))
    assert set(with_biases) == {"lm_head.weight"}
    assert not any(name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) for name in without)
    assert any(name.endswith("o_proj.weight") for name in without)


def test_an_output_that_was_written_to_gives_no_product():
    model = tiny_llama()
    changed = model.model.layers[0].mlp.down_proj
    handle = changed.register_forward_hook(lambda *given: given[-1].mul_(2))
    found = products(model)
    assert "model.layers.0.mlp.down_proj.weight" not in found
    assert_right(found, model, mean(backward(model, ROWS)))
    assert len(found) == 2 * 7  # all other linear layers, and the head
    handle.remove()


def test_an_output_that_a_hook_replaces_is_still_the_weights():
    model = tiny_llama()
    handle = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *given: 2 * given[-1])
    found = products(model)
    assert len(found) == 2 * 7 + 1
    assert_right(found, model, mean(backward(model, ROWS)))
    handle.remove()


def test_a_module_that_is_called_twice_gives_the_sum():
    model = tiny_llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    found = products(model)
    assert "model.layers.0.mlp.up_proj.weight" in found
    assert_right(found, model, mean(backward(model, ROWS)))


def test_outputs_below_fp32_give_no_product():
    assert not products(tiny_llama().bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not products(tiny_llama())
    assert len(products(tiny_llama().double())) == 2 * 7 + 1


def test_a_token_scored_in_the_middle():
    """Tokens before the scored token have a gradient, tokens after it do not."""
    rows = [type(row)(row.input_ids, tuple(place == 3 for place in range(len(row)))) for row in ROWS]
    model = tiny_llama()
    for together in (1, 2, 5):
        assert_right(products(model, rows, together=together), model, mean(backward(model, rows)))
