"""Passes over a set: memory does not grow with the set, and the state of the model is always restored."""

import gc

import pytest
import torch

from geomkit.collection.collect import collect_from_tokens
from geomkit.collection.streaming import stream
from geomkit.gradients.accumulator import Accumulator
from geomkit.inputs.parameters import select
from geomkit.inputs.tokens import encode
from tests.helpers.tiny import UTILITY, tiny_llama, tiny_tokenizer

ROWS = encode(tiny_tokenizer(), UTILITY)


def live_bytes():
    gc.collect()
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in gc.get_objects()
        if type(value) in {torch.Tensor, torch.nn.Parameter} and value.device.type == "cpu"  # no fake ones
    }
    return sum(storages.values())


@pytest.mark.parametrize("reduction", ["example", "token"])
def test_memory_of_a_sum_does_not_grow_with_the_set(reduction, request):
    model = tiny_llama()
    most = {}
    gc.collect()
    gc.freeze()  # the heap so far, which would be walked again and again
    request.addfinalizer(gc.unfreeze)
    for copies in (16, 64):  # from where on the sums are dense
        seen = []
        sums = {}

        def add(name, gradient, sums=sums, seen=seen):
            sums.setdefault(name, Accumulator()).add(gradient)
            if name == "model.embed_tokens.weight":  # the first layer is the last to arrive
                seen.append(live_bytes())

        rows = [row for row in ROWS[:1] for _ in range(copies)]
        stream(model, rows, 0, select(), reduction=reduction, tokens_per_batch=2 * len(rows[0]), sums=add)
        assert len(seen) == copies // 2
        most[copies] = max(seen)
    assert most[64] == most[16]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("after", [0, 3])
def test_an_interruption_leaves_the_model_as_found(error, after):
    model = tiny_llama(attention_dropout=0.1).train()
    model.model.norm.weight.requires_grad_(False)
    model.lm_head.weight.register_hook(lambda gradient: gradient)
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    random_state = torch.get_rng_state()
    count = 0

    def fail(*_):
        nonlocal count
        count += 1
        if count > after:
            raise error

    with pytest.raises(error):
        stream(model, ROWS, 0, select("*.mlp.*"), samples=fail)
    assert model.training
    assert trainable == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(model.lm_head.weight._backward_hooks) == 1
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(random_state, torch.get_rng_state())
    assert torch.is_autocast_cache_enabled()


def test_results_are_in_the_order_of_the_examples_and_do_not_depend_on_the_batches():
    model = tiny_llama()
    whole = collect_from_tokens(model, ROWS, 0, per_sample=True)
    for budget in (1, 30, 50):
        again = collect_from_tokens(model, ROWS, 0, per_sample=True, tokens_per_batch=budget)
        assert again.loss == pytest.approx(whole.loss, rel=1e-6)
        for ours, theirs, row in zip(again.samples, whole.samples, ROWS, strict=True):
            assert ours.loss_tokens == row.loss_tokens
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
            assert ours.norm == pytest.approx(theirs.norm, rel=1e-5)
