"""Provenances are equal for results of the same origin, and differ in the right fields otherwise."""

import hashlib
import struct
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import geomkit
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.gradient_set import Coverage, GradientSet
from geomkit.gradients.provenance import Provenance, differences, provenance_of, weights_fingerprint
from geomkit.inputs.tokens import Tokens, encode, tokens_fingerprint
from geomkit.svd.subspaces import subspace
from tests.helpers.tiny import SAFETY, tiny_llama, tiny_tokenizer

ROWS_OF_ORIGIN = encode(tiny_tokenizer(), SAFETY, max_length=9)

ROWS = st.lists(
    st.lists(st.tuples(st.integers(0, 2**40), st.booleans()), max_size=4).map(
        lambda pairs: Tokens(tuple(i for i, _ in pairs), tuple(m for _, m in pairs))
    ),
    max_size=4,
)


@given(ROWS, ROWS)
def test_data_are_told_apart_exactly_when_they_differ(a, b):
    assert (tokens_fingerprint(a) == tokens_fingerprint(b)) == (a == b)


def test_the_data_fingerprint_is_the_digest_of_lengths_ids_and_masks():
    rows = [Tokens((7, 8, 9), (False, True, True)), Tokens((1,), (True,))]
    content = struct.pack("<qqqq???qq?", 3, 7, 8, 9, False, True, True, 1, 1, True)
    assert tokens_fingerprint(rows) == hashlib.sha256(content).hexdigest()


def test_the_same_weights_have_the_same_fingerprint():
    model = tiny_llama()
    assert weights_fingerprint(model) == weights_fingerprint(tiny_llama())
    assert weights_fingerprint(model.train()) == weights_fingerprint(model.eval())
    assert weights_fingerprint(tiny_llama(seed=1)) != weights_fingerprint(model)
    assert weights_fingerprint(tiny_llama(tied=True)) != weights_fingerprint(model)
    assert weights_fingerprint(tiny_llama().to(torch.bfloat16)) != weights_fingerprint(model)


def test_a_copy_with_one_parameter_trained_by_one_step_differs():
    names = [name for name, _ in tiny_llama().named_parameters()]
    seen = {weights_fingerprint(tiny_llama())}
    for name in names:
        model = tiny_llama()
        with torch.no_grad():
            model.get_parameter(name).add_(1e-5)
        seen.add(weights_fingerprint(model))
    assert len(seen) == len(names) + 1


def test_names_shapes_and_types_count_and_where_a_tensor_lies_does_not():
    class Named(nn.Module):
        def __init__(self, name, value):
            super().__init__()
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    value = torch.arange(6.0).reshape(2, 3)
    result = {
        weights_fingerprint(Named(name, tensor))
        for name, tensor in (
            ("w", value),
            ("v", value),
            ("w", value.reshape(3, 2)),
            ("w", value.double()),
            ("w", value.view(torch.int32)),
            ("w", torch.zeros(())),
            ("w", torch.zeros(0)),
            ("w", torch.zeros(2, 3, dtype=torch.float8_e4m3fn)),
            ("w", torch.zeros(2, 3, device="meta")),
        )
    }
    assert len(result) == 9
    turned = value.T.contiguous().T
    assert not turned.is_contiguous()
    assert weights_fingerprint(Named("w", turned)) == weights_fingerprint(Named("w", value))


def test_a_large_parameter_is_sampled_in_every_part():
    model = nn.Linear(512, 512, bias=False)
    before = weights_fingerprint(model)
    for rows in range(0, 512, 32):
        with torch.no_grad():
            model.weight[rows : rows + 32] += 1
        assert weights_fingerprint(model) != before
        before = weights_fingerprint(model)


@pytest.fixture
def origin():
    return provenance_of(tiny_llama(), ROWS_OF_ORIGIN, reduction="example", layers="*.mlp.*")


def test_provenance_names_the_model_the_data_and_the_versions(origin):
    assert origin == Provenance(
        model="LlamaForCausalLM",
        revision=None,
        dtype="float32",
        weights=weights_fingerprint(tiny_llama()),
        data=tokens_fingerprint(ROWS_OF_ORIGIN),
        examples=len(SAFETY),
        assistant_mask="template",
        max_length=9,
        reduction="example",
        layers="*.mlp.*",
        seed=None,
        geomkit=geomkit.__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
    )


def test_a_model_from_the_hub_is_known_by_its_name_and_commit():
    model = tiny_llama()
    model.config._name_or_path, model.config._commit_hash = "somebody/model", "abc"
    model.lm_head.to(torch.bfloat16)
    result = provenance_of(model, ROWS_OF_ORIGIN.select([0]), reduction="token", seed=3)
    assert (result.model, result.revision, result.dtype) == ("somebody/model", "abc", "bfloat16, float32")
    assert (result.reduction, result.layers, result.max_length, result.seed) == ("token", "*", 9, 3)


def test_differences_name_each_field_and_shorten_fingerprints(origin):
    assert differences(origin, origin) == []
    other = replace(origin, model="other", weights="ab" * 32, max_length=None, seed=0)
    assert differences(origin, other) == [
        "model: LlamaForCausalLM ≠ other",
        f"weights: {origin.weights[:8]}… ≠ abababab…",
        "max_length: 9 ≠ None",
        "seed: None ≠ 0",
    ]


def test_a_subspace_comes_from_where_its_gradients_come_from(origin):
    layers = {"w": DenseGradient(torch.eye(3), tokens=3)}
    assert subspace(layers, rank=1).provenance is None
    gradients = GradientSet(layers, 0.5, 1, 3, Coverage({"w": 9}, {}, {}), provenance=origin)
    assert subspace(gradients, rank=1).provenance is origin
