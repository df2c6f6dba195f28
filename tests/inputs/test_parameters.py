"""The kind and decoder layer of a parameter, choosing parameters by these, and models that cannot be seen."""

import numpy as np
import pytest
import torch
from torch import nn

from geomkit.collection.collect import collect_gradients
from geomkit.errors import CollectionError, SPFError
from geomkit.inputs.parameters import (
    as_selection,
    chosen_parameters,
    kind_of,
    layer_index,
    layer_name,
    refuse_unseen_values,
    select,
    unwrapped_model,
)
from tests.helpers.architectures import ARCHITECTURES
from tests.helpers.tiny import SAFETY, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize(
    ("parameter", "layer", "kind"),
    [
        ("head.weight", None, "head"),
        ("model.layers.11.self_attn.q_proj.weight", 11, "attention"),
        ("model.layers.3.mlp.experts.7.down_proj.weight", 3, "mlp"),
        ("model.layers.0.input_layernorm.weight", 0, "norm"),
        ("model.layers.0.self_attn.q_norm.weight", 0, "norm"),
        ("model.layers.2.block_sparse_moe.experts.1.w1.weight", 2, "mlp"),
        ("model.embed_tokens.weight", None, "embedding"),
        ("model.norm.weight", None, "norm"),
        ("lm_head.weight", None, "head"),
        ("transformer.h.4.attn.c_attn.weight", 4, "attention"),
        ("transformer.h.4.ln_1.bias", 4, "norm"),
        ("transformer.wte.weight", None, "embedding"),
        ("transformer.wpe.weight", None, "embedding"),
        ("transformer.ln_f.weight", None, "norm"),
        ("gpt_neox.layers.5.attention.dense.weight", 5, "attention"),
        ("gpt_neox.embed_in.weight", None, "embedding"),
        ("embed_out.weight", None, "head"),
        ("model.decoder.layers.9.fc1.weight", 9, "mlp"),
        ("model.layers.6.self_attn.q_proj.lora_A.default.weight", 6, "attention"),
        ("player.7.weight", None, "other"),
    ],
)
def test_places_in_the_architectures_of_the_field(parameter, layer, kind):
    assert (layer_index(parameter), kind_of(parameter)) == (layer, kind)
    name = layer_name(parameter)
    assert name == (kind if layer is None else f"layers.{layer}")
    assert layer_index(name) == layer
    assert kind_of(name) == (kind if layer is None else "other")


def test_every_parameter_of_a_llama_has_a_kind():
    kinds = {kind_of(name) for name, _ in tiny_llama().named_parameters()}
    assert kinds == {"attention", "mlp", "norm", "embedding", "head"}


def chosen(layers="*", **conditions):
    layers = select(layers, **conditions) if conditions else layers
    result = collect_gradients(tiny_llama(), TOKENIZER, SAFETY, progress=False, layers=layers)
    assert result.coverage.share == 1
    return set(result)


def test_by_glob_kind_and_index():
    mlp = {f"model.layers.{layer}.mlp.{part}_proj.weight" for layer in (0, 1) for part in ("gate", "up", "down")}
    assert chosen(kinds="mlp") == chosen(layers="*.mlp.*") == mlp
    assert chosen(kinds=["mlp", "head"]) == mlp | {"lm_head.weight"}
    assert chosen(kinds="mlp", indices=1) == {name for name in mlp if ".1." in name}
    assert chosen(layers="*.up_proj.*", indices=range(2)) == {name for name in mlp if "up_proj" in name}
    assert chosen(kinds="norm") == {name for name, _ in tiny_llama().named_parameters() if "norm" in name}
    assert chosen(kinds={"embedding"}) == {"model.embed_tokens.weight"}


def test_a_tied_parameter_is_chosen_by_either_name():
    model = tiny_llama(tied=True)
    for conditions in ({"kinds": "head"}, {"kinds": "embedding"}, {"names": "lm_head*"}):
        result = chosen_parameters(model, select(**conditions))
        assert result == dict.fromkeys(["model.embed_tokens.weight", "lm_head.weight"], "model.embed_tokens.weight")


def test_layers_are_chosen_by_number():
    second = {name for name, _ in tiny_llama().named_parameters() if ".layers.1." in name}
    assert chosen(layers=1) == chosen(layers=[1]) == chosen(layers=select(indices=1)) == second
    assert chosen(layers=[0, 1]) == chosen(layers=range(2)) == chosen(layers="*.layers.*")
    assert chosen(layers=["*.1.mlp.*", "lm_head*"]) == {name for name in second if "mlp" in name} | {"lm_head.weight"}


@pytest.mark.parametrize("layers", [[], [1, "*"], None, 1.5, [True], [None], object()])
def test_what_is_no_choice_of_layers_is_refused(layers):
    with pytest.raises(CollectionError, match=r"expected layers= as a pattern .* or geomkit.select\(…\), found"):
        as_selection(layers)


def test_numbers_of_numpy_are_numbers():
    assert as_selection(np.int64(1)) == as_selection(np.array([1])) == select(indices=np.int64(1)) == as_selection(1)


@pytest.mark.parametrize(
    "conditions",
    [{"names": 3}, {"names": None}, {"names": []}, {"names": [0]}, {"kinds": 3}, {"indices": 1.5}, {"indices": "1"}],
)
def test_conditions_that_are_none_are_refused(conditions):
    with pytest.raises(CollectionError, match=r"expected (patterns on parameter names|kinds among|numbers of decoder)"):
        select(**conditions)


def test_a_pattern_that_matches_no_parameter_is_named():
    with pytest.raises(CollectionError, match=r"each, found \['\*\.attentoin\.\*'\], which match none"):
        chosen(layers=["*.mlp.*", "*.attentoin.*"])


def test_a_layer_that_the_model_lacks_is_named():
    with pytest.raises(CollectionError, match=r"expected decoder layers among 0 to 1, found \[7\]"):
        chosen(layers=[1, 7])


def test_nothing_chosen_says_the_conditions():
    wanted = r"layers=\['\*.attention.\*'\], kinds=\['mlp'\], indices=\[0\]"
    with pytest.raises(CollectionError, match=f"{wanted}, found none among 21"):
        chosen(layers="*.attention.*", kinds="mlp", indices=0)
    with pytest.raises(CollectionError, match=r"expected kinds among attention, mlp, .* found \['atention'\]"):
        chosen(kinds="atention")


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_parameter_of_every_architecture_has_a_kind_and_its_layer(family):
    """No parameter has the kind "other", and every decoder layer has attention and mlp."""
    model = ARCHITECTURES[family].build(tied=False)
    by_kind = {
        kind: set(chosen_parameters(model, select(kinds=kind)).values())
        for kind in ("attention", "mlp", "norm", "embedding", "head")
    }
    leftover = {name for name, _ in model.named_parameters()} - set.union(*by_kind.values())
    assert all("project_" in name for name in leftover)  # OPT's projections to and from a narrower embedding
    for kind in ("attention", "mlp"):
        for layer in range(model.config.num_hidden_layers):
            assert set(chosen_parameters(model, select(kinds=kind, indices=layer)).values()) <= by_kind[kind]


def test_weights_that_cannot_be_seen_are_refused():
    with torch.device("meta"):
        empty = nn.Linear(2, 2)
    with pytest.raises(SPFError, match="'weight' on the meta device; load the model"):
        refuse_unseen_values(dict(empty.named_parameters()), SPFError)
    gathered = nn.Linear(2, 2)
    gathered.weight.ds_id = 3
    with pytest.raises(CollectionError, match="'weight' sharded over processes"):
        refuse_unseen_values(dict(gathered.named_parameters()), CollectionError)
    model = tiny_llama()
    model.lm_head.weight = nn.Parameter(torch.empty(0))
    with pytest.raises(CollectionError, match=r"'lm_head.weight' sharded"):
        collect_gradients(model, TOKENIZER, SAFETY, progress=False)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_wrappers_are_taken_off():
    model = nn.Linear(2, 2)
    assert unwrapped_model(torch.compile(model)) is model
    assert unwrapped_model(model) is model
