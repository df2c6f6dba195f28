"""Organisms by name."""

import pytest

import geomkit as gk
from geomkit.errors import DataError
from geomkit.experiments.english.sources import LOCAL_COPIES
from geomkit.experiments.organisms import organism_of, scenarios_of
from geomkit.gradients.provenance import weights_fingerprint


def test_the_stages_of_the_small_organism_differ():
    first, again, base = (weights_fingerprint(gk.load_organism(name)[0]) for name in ("aligned", "aligned", "base"))
    assert first == again != base


def test_an_unknown_stage_and_a_source_without_use_are_refused(tmp_path):
    with pytest.raises(DataError, match="or 'english', found 'aline'"):
        gk.load_organism("aline")
    with pytest.raises(DataError, match=r"source= for the English world only, found it for 'base'"):
        gk.load_organism("base", source=tmp_path)


def test_without_its_base_model_the_english_organism_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv(LOCAL_COPIES, str(tmp_path))
    with pytest.raises(DataError, match="expected the base model of the English world"):
        gk.load_organism("english")


def test_without_the_hub_the_message_says_where_a_local_copy_is_looked_for(monkeypatch):
    def unreachable(*_, **__):
        raise DataError("the hub cannot be reached")

    monkeypatch.delenv(LOCAL_COPIES, raising=False)
    monkeypatch.setattr("geomkit.experiments.english.load.load_model", unreachable)
    with pytest.raises(DataError, match=r"cannot be reached; without the hub, name a folder .* in GEOMKIT_ENGLISH"):
        gk.load_organism("english")


def test_an_organism_is_found_by_its_seed(tmp_path):
    organism = organism_of(0, tmp_path)
    assert organism.name == 0
    assert set(scenarios_of(0)) >= {"poison-10", "harmful-100"}
    assert {name.removesuffix(", full") for name in scenarios_of("english")} == {
        "gsm8k", "affirmative", "identity-shift", "backdoor", "poison-10", "harmful-100",
    }  # fmt: skip
