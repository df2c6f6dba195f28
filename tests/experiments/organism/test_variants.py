"""Organisms by their seed."""

import geomkit as gk
from geomkit.experiments.organism.variants import load_variant


def test_the_shipped_sets_are_what_an_organism_hands_out(tmp_path):
    organism = load_variant(0, tmp_path)
    for name in ("poison-10", "backdoor"):
        assert organism.scenario_examples(name)["messages"][:] == gk.load_examples(f"scenarios/{name}")["messages"][:]
    for name in ("safety", "eval/forbidden"):
        assert organism.examples(name, 5)["messages"][:] == gk.load_examples(name)["messages"][:5]
