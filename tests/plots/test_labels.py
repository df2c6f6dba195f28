"""Short names of parameters."""

from geomkit.plots.labels import place_of
from tests.helpers.figures import NAMES, PLACES


def test_places_are_the_same_in_all_layers() -> None:
    assert {place_of(name) for name in NAMES} == set(PLACES)
    assert place_of("transformer.h.3.attn.c_proj.weight") == "attn.c_proj"
    assert place_of("model.layers.0.self_attn.q_proj.bias") == "self_attn.q_proj.bias"
