"""Organisms by their seed."""

import time
from concurrent.futures import ThreadPoolExecutor

import geomkit as gk
from geomkit.experiments.organism import variants
from geomkit.experiments.organism.variants import load_variant


def test_the_shipped_sets_are_what_an_organism_hands_out(tmp_path):
    organism = load_variant(0, tmp_path)
    for name in ("poison-10", "backdoor"):
        assert organism.scenario_examples(name)["messages"][:] == gk.load_examples(f"scenarios/{name}")["messages"][:]
    for name in ("safety", "eval/forbidden"):
        assert organism.examples(name, 5)["messages"][:] == gk.load_examples(name)["messages"][:5]


def test_one_of_several_jobs_builds_an_organism_and_the_others_wait(tmp_path, monkeypatch):
    builds = []

    def slow_build(target, seed, **settings):
        builds.append(seed)
        time.sleep(0.2)
        (target / "organism").mkdir()

    monkeypatch.setattr(variants, "build", slow_build)
    with ThreadPoolExecutor(3) as pool:  # a lock is held by an open folder, so that threads wait as processes do
        for _ in pool.map(lambda _: variants.build_variant(5, tmp_path), range(3)):
            assert (variants.variant_folder(5, tmp_path) / "organism").is_dir()
    assert builds == [5]
