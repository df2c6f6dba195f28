import pytest

from geomkit.inputs.parameters import kind_of, layer_index
from tests.helpers.tiny import tiny_llama


@pytest.mark.parametrize(
    ("parameter", "layer", "kind"),
    [
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


def test_every_parameter_of_a_llama_has_a_kind():
    kinds = {kind_of(name) for name, _ in tiny_llama().named_parameters()}
    assert kinds == {"attention", "mlp", "norm", "embedding", "head"}
