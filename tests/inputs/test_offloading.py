"""Weights that accelerate has offloaded, against the same model with its weights in place."""

import tempfile

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

import geomkit as gk
from geomkit.collection.check.check import check_collection
from geomkit.gradients.provenance import weights_fingerprint
from geomkit.inputs.offloading import input_device
from tests.helpers.tiny import SAFETY, tiny_llama, tiny_tokenizer

CPU = torch.device("cpu")
TOKENIZER = tiny_tokenizer()


def on_disk(model, folder):
    disk_offload(model, folder, execution_device=CPU)


def in_memory(model, _):
    cpu_offload(model, execution_device=CPU)


def in_part(model, folder):
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "disk"}
    rest = {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    dispatch_model(model, places | rest, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.fixture(params=[in_memory, on_disk, in_part], ids=lambda way: way.__name__)
def offloaded(request, tmp_path):
    def make(**settings):
        model = tiny_llama(**settings)
        request.param(model, tempfile.mkdtemp(dir=tmp_path))
        assert any(parameter.is_meta for parameter in model.parameters())
        return model

    return make


@pytest.mark.parametrize("tied", [False, True])
def test_gradients(offloaded, tied):
    model = offloaded(tied=tied)
    placed = [(name, parameter.device) for name, parameter in model.named_parameters()]
    found, expected = (
        gk.collect_gradients(one, TOKENIZER, SAFETY, per_sample=True, progress=False)
        for one in (model, tiny_llama(tied=tied))
    )
    assert list(found) == list(expected)
    assert found.coverage == expected.coverage
    assert found.provenance.weights == expected.provenance.weights
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].dense(), gradient.dense(), rtol=1e-6, atol=1e-9)
    assert [(name, parameter.device) for name, parameter in model.named_parameters()] == placed
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_error_leaves_the_weights_offloaded(offloaded):
    model = offloaded()
    placed = [parameter.device for parameter in model.parameters()]
    with pytest.raises(gk.GeomkitError, match="reduction"):
        gk.collect_gradients(model, TOKENIZER, SAFETY, reduction="sum", progress=False)
    with pytest.raises(gk.GeomkitError, match="match"):
        gk.collect_gradients(model, TOKENIZER, SAFETY, layers="none", progress=False)
    assert [parameter.device for parameter in model.parameters()] == placed
    ids = torch.tensor([[2, 5, 6, 3]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, tiny_llama()(input_ids=ids).logits)


def test_evaluation(offloaded):
    sets = {"forbidden": SAFETY, "skills": {"text": SAFETY}, "metrics": {"text": "perplexity"}}
    found, expected = (
        gk.evaluate(model, TOKENIZER, **sets, max_new_tokens=8, progress=False) for model in (offloaded(), tiny_llama())
    )
    assert found.responses["response"].tolist() == expected.responses["response"].tolist()
    assert found.to_frame().equals(expected.to_frame())


def test_the_check_of_a_collection(offloaded):
    verdict = check_collection(offloaded(), TOKENIZER, SAFETY, progress=False)
    assert verdict.ok


def test_the_device_of_inputs(offloaded):
    assert input_device(offloaded()) == input_device(tiny_llama()) == CPU
    with torch.device("meta"):
        assert input_device(tiny_llama()) == torch.device("meta")


def test_fingerprints_tell_offloaded_weights_apart(offloaded):
    assert weights_fingerprint(offloaded(seed=1)) == weights_fingerprint(tiny_llama(seed=1))
    assert weights_fingerprint(offloaded(seed=1)) != weights_fingerprint(offloaded(seed=2))
