"""Tokens that cause the conflict, against a backward pass for every single token."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp

from geomkit import plots
from geomkit.collection.collect import collect_gradients
from geomkit.correlation.token_conflict import ExampleTokens, TokenConflict, _text, tinted, token_conflict
from geomkit.correlation.token_derivatives import token_derivatives
from geomkit.errors import CollectionError, GeometryError
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.gradient_set import set_inner
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.inputs.batches import collate
from geomkit.inputs.loss import token_losses
from tests.helpers.architectures import ARCHITECTURES, ROWS, built
from tests.helpers.tiny import SAFETY, UTILITY, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def random_direction(model: torch.nn.Module, seed: int = 0) -> dict[str, LayerGradient]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: DenseGradient(torch.randn(parameter.shape, generator=generator), 1)
        for name, parameter in model.named_parameters()
    }


def by_backward(model: torch.nn.Module, row: object, direction: dict[str, LayerGradient]) -> np.ndarray:
    """The derivative of each scored token's loss along the unit direction, from its own gradient."""
    parameters = dict(model.named_parameters())
    norm = math.sqrt(sum(gradient.norm**2 for gradient in direction.values()))
    losses = token_losses(model, collate([row], 0))[0]
    derivatives = np.zeros(len(row))
    for place in np.flatnonzero(row.loss_mask[1:]):
        gradients = torch.autograd.grad(
            losses[place], [parameters[name] for name in direction], retain_graph=True, allow_unused=True
        )
        pairs = zip(gradients, direction.values(), strict=True)
        derivatives[place + 1] = sum(float((g.double() * d.dense()).sum()) for g, d in pairs if g is not None) / norm
    return derivatives


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_derivatives_are_those_of_a_backward_pass_per_token(name: str) -> None:
    model = built(name, tied=sum(map(ord, name)) % 2 == 0)
    direction = random_direction(model)
    values, norm = token_derivatives(model, ROWS[:2], 0, direction, tokens_per_batch=64)
    assert norm == pytest.approx(math.sqrt(sum(gradient.norm**2 for gradient in direction.values())))
    for row, (losses, derivatives) in zip(ROWS, values, strict=False):
        expected = by_backward(model, row, direction)
        assert np.abs(derivatives.numpy() - expected).max() <= 1e-5 * np.abs(expected).max()
        expected_losses = token_losses(model, collate([row], 0))[0].detach().double()
        assert losses[1:].numpy() == pytest.approx(expected_losses.numpy(), abs=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("budget", [4096, 1])
def test_tokens_add_up_to_the_inner_product_of_the_examples_gradients(tied: bool, budget: int) -> None:
    model = tiny_llama(tied=tied)
    safety = collect_gradients(model, TOKENIZER, SAFETY, progress=False)
    utility = collect_gradients(model, TOKENIZER, UTILITY, per_sample=True, progress=False)
    result = token_conflict(model, TOKENIZER, UTILITY, safety, tokens_per_batch=budget, progress=False)
    inner = np.array([set_inner(sample, safety) for sample in utility.samples])
    assert result.totals * result.norm == pytest.approx(inner, rel=1e-4, abs=1e-6)
    assert result.norm == pytest.approx(safety.norm)
    assert [tokens.losses[tokens.scored].mean() for tokens in result.examples] == pytest.approx(
        [sample.loss for sample in utility.samples], abs=1e-5
    )


def test_parameters_without_a_safety_gradient_do_not_move() -> None:
    model = tiny_llama()
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    safety = collect_gradients(model, TOKENIZER, SAFETY, layers="*layers*", progress=False)
    assert all(name.startswith("model.layers.1.") for name in safety)
    result = token_conflict(model, TOKENIZER, UTILITY, safety, progress=False)
    direction = {name: DenseGradient(gradient.dense(), 1) for name, gradient in safety.items()}
    utility = collect_gradients(model, TOKENIZER, UTILITY, per_sample=True, layers="*layers*", progress=False)
    inner = [set_inner(sample, direction) for sample in utility.samples]
    assert result.totals * result.norm == pytest.approx(inner, rel=1e-4, abs=1e-6)


def test_a_positive_token_lowers_the_safety_loss_when_it_is_learnt() -> None:
    model = tiny_llama()
    before = collect_gradients(model, TOKENIZER, SAFETY, progress=False)
    result = token_conflict(model, TOKENIZER, UTILITY, before, progress=False)
    example = int(np.argmax(np.abs(result.totals)))
    step = collect_gradients(model, TOKENIZER, UTILITY.select([example]), progress=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            step[name].add_to(parameter, -1e-3)
    after = collect_gradients(model, TOKENIZER, SAFETY, progress=False)
    assert after.loss - before.loss == pytest.approx(-1e-3 * result.norm * result.totals[example], rel=0.05)


def test_the_model_is_left_as_it_was_found() -> None:
    model = ARCHITECTURES["mixtral"].build(tied=False).train()
    model.model.norm.weight.requires_grad_(False)
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    experts, state = model.get_experts_implementation(), torch.get_rng_state()
    token_conflict(model, TOKENIZER, UTILITY, random_direction(model), progress=False)
    assert all(module.training for module in model.modules())
    assert not model.model.norm.weight.requires_grad
    assert model.get_experts_implementation() == experts
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, values[name])
        assert parameter.grad is None


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(_, values):
        return values.clone()

    @staticmethod
    def backward(_, delta):
        return delta


class Wrong(Opaque):
    @staticmethod
    def jvp(_, tangent):
        return 2 * tangent


@pytest.mark.parametrize(
    ("function", "message"), [(Opaque, "without custom kernels"), (Wrong, "not seen by forward mode")]
)
def test_operations_that_forward_mode_does_not_see_are_told(function: type, message: str) -> None:
    model = tiny_llama()
    model.model.norm.register_forward_hook(lambda _, __, output: function.apply(output))
    with pytest.raises(CollectionError, match=message):
        token_conflict(model, TOKENIZER, UTILITY, random_direction(model), progress=False)
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_gradients_of_something_else_are_refused() -> None:
    model = tiny_llama()
    direction = random_direction(model)
    name = "model.norm.weight"
    with pytest.raises(CollectionError, match="this model's parameters"):
        token_conflict(model, TOKENIZER, UTILITY, {"other": direction[name]}, progress=False)
    with pytest.raises(CollectionError, match="of shape"):
        token_conflict(model, TOKENIZER, UTILITY, {name: DenseGradient(torch.ones(3), 1)}, progress=False)
    with pytest.raises(CollectionError, match="other than zero"):
        token_conflict(model, TOKENIZER, UTILITY, {name: direction[name].scaled(0.0)}, progress=False)
    with pytest.raises(GeometryError, match="at least 2 utility"):
        token_conflict(model, TOKENIZER, UTILITY.select([0]), direction, progress=False)
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("inf"))
    with pytest.raises(CollectionError, match="finite"):
        token_conflict(broken, TOKENIZER, UTILITY, direction, progress=False)


def test_half_precision_is_as_good_as_its_weights() -> None:
    model = tiny_llama()
    safety = collect_gradients(model, TOKENIZER, SAFETY, progress=False)
    exact = token_conflict(model, TOKENIZER, UTILITY, safety, progress=False).to_frame()["contribution"]
    rough = token_conflict(model.bfloat16(), TOKENIZER, UTILITY, safety, progress=False).to_frame()["contribution"]
    assert np.corrcoef(exact, rough)[0, 1] > 0.99


# ------------------------------------------------------------------------------------------------- the result


def example(ids: list[int], contributions: list[float], texts: list[str]) -> ExampleTokens:
    values = np.array(contributions)
    return ExampleTokens(tuple(ids), tuple(texts), ~np.isnan(values), np.where(np.isnan(values), np.nan, 2.0), values)


def made() -> TokenConflict:
    prompt = float("nan")
    return TokenConflict(
        (
            example([9, 1, 2, 1], [prompt, -0.5, 0.2, -0.1], ["<user>", "rm", "ok", "rm"]),
            example([9, 2], [prompt, 0.4], ["<user>", "ok"]),
            example([9, 1], [prompt, -0.3], ["<user>", "rm"]),
        ),
        norm=2.0,
    )


def test_frames_hold_every_scored_token_and_their_sums() -> None:
    result = made()
    frame, table = result.to_frame(), result.by_token()
    assert list(zip(frame["example"], frame["position"], frame["token"], strict=True)) == [
        (0, 1, "rm"),
        (0, 2, "ok"),
        (0, 3, "rm"),
        (1, 1, "ok"),
        (2, 1, "rm"),
    ]
    assert result.totals == pytest.approx([-0.4, 0.4, -0.3])
    assert list(table["token"]) == ["rm", "ok"]
    assert list(table["count"]) == [3, 2]
    assert list(table["examples"]) == [2, 2]
    assert list(table["contribution"]) == pytest.approx([-0.3, 0.3])
    assert table["total"].sum() == pytest.approx(result.totals.mean())
    expected = ttest_1samp([-0.6, 0.0, -0.3], 0).confidence_interval(0.95)
    assert (table["low"][0], table["high"][0]) == pytest.approx(tuple(expected))
    assert result.interval == pytest.approx(tuple(ttest_1samp(result.totals, 0).confidence_interval(0.95)))
    assert "60.0% of 5 tokens against safety, the worst 'rm' -0.3" in str(result)


def test_text_is_tinted_by_sign_and_cannot_break_the_page() -> None:
    result = made()
    hostile = replace(result.examples[0], tokens=("<script>", "<b>&", "ok", '"x"'))
    html = tinted("a < b", [hostile])
    assert "<script>" not in html
    assert "&lt;b&gt;&amp;" in html
    assert "a &lt; b" in html
    assert html.count("rgba(178,24,43") == 3  # the key and two tokens
    assert html.count("rgba(33,102,172") == 2
    assert '<span style="color:#767676">&lt;script&gt;</span>' in html
    shown = result._repr_html_()
    assert shown.index("<b>-0.4</b>") < shown.index("<b>-0.3</b>") < shown.index("<b>+0.4</b>")


def test_figure_shows_the_worst_tokens_with_their_intervals() -> None:
    result = made()
    against, agreeing = plots.plot_token_conflict(result).data
    table = result.by_token()
    assert list(against.x) == [table["total"][0]]
    assert list(agreeing.x) == [table["total"][1]]
    assert against.error_x.array[0] == pytest.approx(table["high"][0] - table["total"][0])
    figure = plots.plot_token_conflict(result)
    assert figure.layout.yaxis.ticktext == ("rm ×3", "ok ×2")
    assert "nats" in figure.layout.xaxis.title.text


def test_texts_are_those_of_the_ids_with_the_spaces_before_words() -> None:
    pieces = {0: ("▁the", "the"), 1: ("s", "s"), 2: ("Ġthe", " the")}
    tokenizer = SimpleNamespace(
        decode=lambda ids, **_: pieces[ids[0]][1], convert_ids_to_tokens=lambda token: pieces[token][0]
    )
    assert [_text(tokenizer, token) for token in pieces] == [" the", "s", " the"]
    result = token_conflict(tiny_llama(), TOKENIZER, UTILITY, random_direction(tiny_llama()), progress=False)
    assert result.examples[0].tokens[:2] == ("[user]", "how")
    assert result.examples[0].ids == tuple(TOKENIZER(" ".join(result.examples[0].tokens))["input_ids"])
