import math

import numpy as np
import psutil
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import CausalLMOutput

from geomkit.collection import collect as module
from geomkit.collection.collect import collect_from_tokens, collect_gradients
from geomkit.errors import CollectionError
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.indexed import IndexedGradient
from geomkit.inputs.batches import batches
from geomkit.inputs.tokens import encode
from geomkit.utils.free_memory import free_bytes
from tests.helpers.tiny import SAFETY, UTILITY, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def backward(model, examples):
    """Return the reference: a backward pass per example through the model's loss."""
    collected = []
    for tokens in encode(TOKENIZER, examples):
        model.zero_grad(set_to_none=True)
        (batch,) = batches([tokens], 0, 1)
        model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss.backward()
        collected.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad(set_to_none=True)
    return collected


def assert_same(gradients, reference, rtol=1e-5):
    assert list(gradients) == list(reference)
    for name, expected in reference.items():
        error = (gradients[name].dense() - expected).norm()
        assert error <= rtol * expected.norm() + 1e-9, name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens_per_batch", [1, 40, 4096])
@pytest.mark.parametrize("form", ["auto", "factored"])
def test_every_gradient_equals_autograd(tied, tokens_per_batch, form):
    model = tiny_llama(tied=tied)
    reference = backward(model, UTILITY)
    found = collect_gradients(
        model, TOKENIZER, UTILITY, per_sample=True, tokens_per_batch=tokens_per_batch, form=form, progress=False
    )
    assert found.coverage.share == 1
    for sample, expected in zip(found.samples, reference, strict=True):
        assert_same(sample, expected)
    assert_same(found, {name: sum(r[name] for r in reference) / len(reference) for name in reference[0]})
    assert found.loss == pytest.approx(sum(s.loss for s in found.samples) / 4)


def test_token_reduction_is_the_models_own_loss():
    model = tiny_llama()
    (batch,) = batches(encode(TOKENIZER, UTILITY), 0, 8)
    loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    loss.backward()
    loss = loss.detach()
    reference = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    found = collect_gradients(
        model, TOKENIZER, UTILITY, per_sample=True, reduction="token", tokens_per_batch=40, progress=False
    )
    assert_same(found, reference)
    assert found.loss == pytest.approx(float(loss), rel=1e-6)
    for sample, expected in zip(found.samples, backward(model, UTILITY), strict=True):
        assert_same(sample, expected)


def test_forms_and_token_counts():
    found = collect_gradients(tiny_llama(hidden_size=64), TOKENIZER, SAFETY.select([0]), progress=False)
    head = found["lm_head.weight"]
    assert isinstance(head, FactoredGradient)
    assert head.tokens == found.loss_tokens == 6  # "sorry we can not help [end]"
    # Every position up to the one that predicts [end] reaches the loss through the first layer's values.
    assert found["model.layers.0.self_attn.v_proj.weight"].tokens == 13
    assert isinstance(found["model.embed_tokens.weight"], IndexedGradient)
    assert isinstance(found["model.norm.weight"], DenseGradient)


def test_the_sum_becomes_dense_when_that_is_smaller():
    found = collect_gradients(tiny_llama(), TOKENIZER, UTILITY, progress=False)
    assert isinstance(found["model.layers.0.mlp.up_proj.weight"], DenseGradient)
    assert found["model.layers.0.mlp.up_proj.weight"].tokens > 16


def test_the_model_is_left_as_found():
    model = tiny_llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    random_state = torch.get_rng_state()
    weights = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        first = collect_gradients(model, TOKENIZER, SAFETY, per_sample=True, progress=False)
    second = collect_gradients(model, TOKENIZER, SAFETY, progress=False)
    assert first.loss == second.loss  # eval mode: no dropout noise
    assert model.training
    assert not model.model.layers[0].training
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert torch.equal(random_state, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_failure_leaves_the_model_as_found_and_names_the_example():
    model = tiny_llama().train()
    with torch.no_grad():
        model.model.embed_tokens.weight[TOKENIZER.convert_tokens_to_ids("fence")] = math.nan
    with pytest.raises(CollectionError, match="example 1: expected a finite loss, found nan"):
        collect_gradients(model, TOKENIZER, SAFETY, tokens_per_batch=40, progress=False)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_frozen_parameters_are_left_out_and_layers_can_be_chosen():
    model = tiny_llama()
    model.model.layers[0].requires_grad_(False)
    found = collect_gradients(model, TOKENIZER, SAFETY, layers=["*.mlp.*"], progress=False)
    assert list(found) == [f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    model.requires_grad_(False)
    with pytest.raises(CollectionError, match="found none among 0"):
        collect_gradients(model, TOKENIZER, SAFETY, progress=False)


def test_what_has_no_part_in_the_loss_is_named():
    model = tiny_llama()
    model.extra = torch.nn.Linear(3, 3)
    found = collect_gradients(model, TOKENIZER, SAFETY, progress=False)
    assert set(found.coverage.missing) == {"extra.weight", "extra.bias"}
    assert found.coverage.share < 1
    assert "extra.weight (its module never ran)" in str(found.coverage)


def test_an_in_place_operation_after_a_layer_does_not_disturb_it():
    model = tiny_llama()
    handle = model.model.layers[0].mlp.register_forward_hook(lambda _module, _inputs, output: output.mul_(2.0))
    reference = backward(model, SAFETY.select([0]))[0]
    assert_same(collect_gradients(model, TOKENIZER, SAFETY.select([0]), progress=False), reference)
    handle.remove()


def test_bias_conv1d_and_a_module_called_twice():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(TOKENIZER), n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1
    )
    model = GPT2LMHeadModel(config).eval()
    model.transformer.h[1] = model.transformer.h[0]
    reference = backward(model, UTILITY)
    found = collect_gradients(model, TOKENIZER, UTILITY, per_sample=True, progress=False)
    assert found.coverage.share == 1
    assert found.coverage.notes["transformer.h.0.mlp.c_fc.weight"] == "module called repeatedly"
    for sample, expected in zip(found.samples, reference, strict=True):
        # The position table is looked up once for the whole batch; each example's share is told all the same.
        assert_same(sample, expected)
    assert_same(found, {name: sum(r[name] for r in reference) / len(reference) for name in reference[0]})


class Branched(torch.nn.Module):
    """A layer that runs only for some first tokens."""

    def __init__(self, model):
        super().__init__()
        self.model, self.more = model, torch.nn.Linear(16, 16)

    def forward(self, input_ids, attention_mask, **_):
        hidden = self.model.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        used = input_ids[0, 1] == TOKENIZER.convert_tokens_to_ids("help")
        return CausalLMOutput(logits=self.model.lm_head(self.more(hidden) if used else hidden))


def test_a_parameter_that_only_some_examples_use_has_gradient_zero_for_the_others():
    rows = encode(TOKENIZER, UTILITY)
    found = collect_from_tokens(Branched(tiny_llama()), rows, 0, per_sample=True, tokens_per_batch=1)
    assert found.coverage.share == 1
    assert [sample["more.weight"].norm > 0 for sample in found.samples] == [False, False, False, True]
    for sample in found.samples:
        assert list(sample) == list(found)
        assert sample["more.weight"].shape == (16, 16)


def test_loss_matches_torch():
    model = tiny_llama().eval()
    tokens = encode(TOKENIZER, SAFETY.select([1]))[0]
    ids = torch.tensor(tokens.input_ids)
    logits = model(input_ids=ids[None]).logits[0, :-1]
    keep = torch.tensor(tokens.loss_mask)[1:]
    found = collect_gradients(model, TOKENIZER, SAFETY.select([1]), progress=False)
    assert found.loss == pytest.approx(float(cross_entropy(logits[keep], ids[1:][keep]).detach()), rel=1e-6)


def test_the_organism_equals_autograd_and_numpy(organism):
    """All parameters of the shipped model, including embedding, norms and head, and all singular values."""
    from geomkit.inputs.examples import load_examples
    from geomkit.svd.spectrum import spectrum

    model, tokenizer = organism
    examples = load_examples("utility").select(range(3))
    (batch,) = batches(encode(tokenizer, examples), tokenizer.pad_token_id, 3)
    model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss.backward()
    reference = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    found = collect_gradients(model, tokenizer, examples, reduction="token", form="factored", progress=False)
    assert found.coverage.share == 1
    assert_same(found, reference)
    for name, layer in spectrum(found, null_draws=0).layers.items():
        expected = np.linalg.svd(found[name].dense().double().numpy(), compute_uv=False)[: layer.rank_bound]
        np.testing.assert_allclose(layer.singular_values, expected, atol=1e-6 * expected[0])


def stored_bytes(gradients):
    """Return the bytes of the tensors of a set, of sums and samples."""
    tensors = [
        tensor
        for part in (gradients, *gradients.samples)
        for gradient in part.values()
        for tensor in vars(gradient).values()
        if isinstance(tensor, torch.Tensor)
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("layers", ["*", "*.mlp.*"])
def test_a_warning_tells_of_gradients_larger_than_what_is_free(layers, monkeypatch, caplog):
    """The bound that is compared is never below what is stored, and no warning comes where there is room for it."""
    model = tiny_llama()
    options = {"per_sample": True, "form": "factored", "layers": layers, "progress": False}
    monkeypatch.setattr(module, "free_bytes", lambda _: stored_bytes(stored) - 1)
    stored = collect_gradients(model, TOKENIZER, UTILITY, per_sample=False, layers=layers, progress=False)
    assert not caplog.records
    stored = collect_gradients(model, TOKENIZER, UTILITY, **options)
    caplog.clear()
    collect_gradients(model, TOKENIZER, UTILITY, **options)
    (record,) = caplog.records
    assert "the gradients of 4 examples take up to" in record.getMessage()
    assert "measure_samples" in record.getMessage()
    caplog.clear()
    monkeypatch.setattr(module, "free_bytes", lambda _: 2 * stored_bytes(stored))
    collect_gradients(model, TOKENIZER, UTILITY, **options)
    monkeypatch.setattr(module, "free_bytes", lambda _: None)
    collect_gradients(model, TOKENIZER, UTILITY, **options)
    assert not caplog.records


def test_free_memory_is_that_of_the_machine():
    free = free_bytes(torch.device("cpu"))
    assert 2**20 < free < psutil.virtual_memory().total
    assert free_bytes(torch.device("meta")) is None
