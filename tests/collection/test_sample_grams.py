"""Inner products block by block against inner products of collected gradients."""

import gc
import weakref

import pytest
import torch

from geomkit.collection import sample_grams as grams
from geomkit.collection.sample_grams import blocks_of, grams_from_tokens, sample_grams
from geomkit.errors import GeometryError
from geomkit.gradients.gradient_set import layer_grams
from geomkit.inputs.parameters import select
from tests.helpers.architectures import ROWS, built, collected
from tests.helpers.tiny import SAFETY, UTILITY, tiny_llama, tiny_tokenizer

MODELS = [("llama", True), ("llama", False), ("gpt-2", True), ("mixtral", False)]
BUDGET = 2 * max(map(len, ROWS))


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: f"{model[0]}{', tied' * model[1]}")
def collection(request):
    name, tied = request.param
    model = built(name, tied=tied)
    return model, collected(model)


def assert_grams_close(found, expected):
    assert list(found) == list(expected)
    for name, table in expected.items():
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], table, rtol=1e-5, atol=3e-6 * float(table.norm()))


def one_example(model):
    """Return the bytes of the longest example's gradient."""
    return max(grams._sizes(model, select(), ROWS))


@pytest.mark.parametrize("blocks", [1, 2, 3, 100])
def test_one_set_in_blocks(collection, blocks):
    model, whole = collection
    memory = one_example(model) * len(ROWS) / blocks
    found = grams_from_tokens(model, ROWS, None, 0, memory=memory, tokens_per_batch=BUDGET)
    assert_grams_close(found, layer_grams(whole, whole))


@pytest.mark.parametrize("examples_held", [0.1, 1, 2, 100])
@pytest.mark.parametrize("first", [1, 3, 4])
def test_two_sets_in_blocks(collection, examples_held, first):
    model, whole = collection
    memory = examples_held * one_example(model)
    found = grams_from_tokens(model, ROWS[:first], ROWS[first:], 0, memory=memory, tokens_per_batch=BUDGET)
    expected = {name: table[:first, first:] for name, table in layer_grams(whole, whole).items()}
    assert_grams_close(found, expected)


def test_everything_that_fits_is_run_once(monkeypatch):
    model, passes = tiny_llama(), []
    whole_stream = grams.stream

    def counted(model, rows, *rest, **settings):
        passes.append(len(rows))
        return whole_stream(model, rows, *rest, **settings)

    monkeypatch.setattr(grams, "stream", counted)
    grams_from_tokens(model, ROWS, None, 0)
    grams_from_tokens(model, ROWS[:2], ROWS[2:], 0)
    assert passes == [len(ROWS), 2, len(ROWS) - 2]
    passes.clear()
    grams_from_tokens(model, ROWS[:4], None, 0, memory=1)
    assert passes == [1, 3, 1, 2, 1, 1, 1]


def test_the_smaller_number_of_runs_decides_which_set_is_held(monkeypatch):
    runs = []
    whole_stream = grams.stream
    monkeypatch.setattr(grams, "stream", lambda *a, **k: runs.append(len(a[1])) or whole_stream(*a, **k))
    model = tiny_llama()
    few, many = ROWS[:1], ROWS[1:]
    memory = one_example(model)
    for a, b in ((few, many), (many, few)):
        runs.clear()
        found = grams_from_tokens(model, a, b, 0, memory=memory)
        assert runs == [1, len(many)]
        assert found["lm_head.weight"].shape == (len(a), len(b))
        assert found["lm_head.weight"].is_contiguous()


def test_no_more_is_held_than_fits(monkeypatch):
    """The bytes of the gradients in memory stay below the budget, for N and for 3N examples."""
    model = tiny_llama()
    memory = 2.5 * one_example(model)
    most, alive = 0, weakref.WeakSet()
    whole_stream = grams.stream

    def watched(model, rows, pad, selection, *, samples, **settings):
        def sink(name, examples, gradients):
            nonlocal most
            samples(name, examples, gradients)
            alive.update(gradients)
            most = max(most, 4 * sum(gradient.floats for gradient in alive))

        return whole_stream(model, rows, pad, selection, samples=sink, **settings)

    monkeypatch.setattr(grams, "stream", watched)
    for rows in (ROWS, ROWS * 3):
        most = 0
        grams_from_tokens(model, rows, None, 0, memory=memory, tokens_per_batch=1)
        gc.collect()
        assert not alive
        # Beside what is held, a batch's own gradients of a parameter or two.
        assert memory / 4 < most < memory + one_example(model) / 2


def test_blocks_hold_what_fits_and_at_least_one():
    assert blocks_of([5, 5, 5], 1) == [[0], [1], [2]]
    assert blocks_of([5, 1, 4], 10) == [[0, 2, 1]]
    assert blocks_of([], 10) == []


def test_examples_and_choice_are_those_of_collection():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    found = sample_grams(model, tokenizer, SAFETY, UTILITY, layers=select(kinds="head"), progress=False)
    assert {name: tuple(table.shape) for name, table in found.items()} == {
        "lm_head.weight": (len(SAFETY), len(UTILITY))
    }
    with pytest.raises(GeometryError, match="memory=0"):
        sample_grams(model, tokenizer, SAFETY, memory=0, progress=False)


def test_the_model_is_left_as_found_when_interrupted(monkeypatch):
    model = tiny_llama().train()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(grams, "gram", interrupted)
    with pytest.raises(KeyboardInterrupt):
        grams_from_tokens(model, ROWS, None, 0, memory=1)
    assert all(module.training for module in model.modules())
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
