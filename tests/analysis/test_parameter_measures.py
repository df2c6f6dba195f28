"""The measurements of an analysis, parameter by parameter: their numbers, their memory and their bar."""

import re
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import geomkit as gk
from geomkit.analysis import probe as probe_module
from geomkit.analysis.parameter_measures import measure_parameters
from geomkit.gradients.gradient_set import GradientSet, layer_grams
from geomkit.svd.one_sample.study import one_sample_study
from geomkit.svd.spectrum import spectrum
from geomkit.svd.subspaces import subspace
from geomkit.svd.token_matching import match_tokens
from tests.helpers.tiny import CONTROL, SAFETY, UTILITY, tiny_llama, tiny_tokenizer

SETTINGS = {"rank": 3, "null_draws": 2, "seed": 0, "progress": False}


def collected(probe: gk.Probe, model, tokenizer) -> dict[str, GradientSet]:
    safety, utility, control = probe.collect(model, tokenizer)
    return {"safety": safety, "control": control, "utility": utility}


def test_the_numbers_are_those_of_the_functions_for_whole_sets() -> None:
    """A tied head has a dense reference in tests/svd; here its inner products and overlaps go through the analysis."""
    sets = collected(gk.Probe(SAFETY, UTILITY, CONTROL), tiny_llama(tied=True), tiny_tokenizer())
    measures = measure_parameters(sets, **SETTINGS)
    for a in sets:
        for b in sets:
            for name, expected in layer_grams(sets[a], sets[b]).items():
                scale = expected.abs().max() + 1e-12
                torch.testing.assert_close(measures.between(a, b)[name] / scale, expected / scale, atol=2e-5, rtol=0)
    study = one_sample_study(sets["safety"], sets["control"], rank=3)
    for name, layer in study.layers.items():
        assert measures.one_sample[name].rank == layer.rank
    matched = dict(zip(sets, match_tokens(*sets.values()), strict=True))
    for name, gradients in matched.items():
        for parameter, layer in spectrum(gradients, null_draws=0).layers.items():
            values = measures.spectra[name][parameter].spectrum.singular_values
            assert values == pytest.approx(layer.singular_values, abs=1e-6 * layer.singular_values[0])
    for parameter, layer in subspace(matched["utility"], rank=2).layers.items():
        kept = measures.subspaces["utility"][parameter].basis[:, :2]
        assert float((kept.T @ layer.basis).square().sum()) == pytest.approx(layer.rank, abs=1e-4)


class PeakBytes(TorchDispatchMode):
    """Largest number of bytes of tensors, made inside the block, that are alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self._uses, self._sizes, self._alive, self.peak = Counter(), {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                place = storage.data_ptr()
                if place not in given or place in self._sizes:
                    self._add(tensor, place, storage.nbytes())
        return result

    def _add(self, tensor: torch.Tensor, place: int, size: int) -> None:
        self._uses[place] += 1
        if self._uses[place] == 1:
            self._sizes[place] = size
            self._alive += size
            self.peak = max(self.peak, self._alive)
        weakref.finalize(tensor, self._remove, place)

    def _remove(self, place: int) -> None:
        self._uses[place] -= 1
        if not self._uses[place]:
            self._alive -= self._sizes.pop(place)


def peak_and_factors(organism, examples: int) -> tuple[int, int]:
    safety, control = gk.load_examples("safety"), gk.load_examples("controls/benign-refused")
    utility = gk.load_examples("scenarios/new-skill")
    probe = gk.Probe(safety, utility, control, examples=examples, layers=[0, 1])
    sets = {name: replace(found, layers={}) for name, found in collected(probe, *organism).items()}
    tensors = (t for found in sets.values() for sample in found.samples for g in sample.values() for t in g.tensors)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    with PeakBytes() as peak:
        measure_parameters(sets, **SETTINGS)
    return peak.peak, sum(storages.values())


def test_memory_beside_the_factors_is_below_them_and_grows_no_faster(organism) -> None:
    """Counted in bytes of tensors, not read off the process: with 12 and with 48 examples a set."""
    (few, few_factors), (many, many_factors) = (peak_and_factors(organism, examples) for examples in (12, 48))
    assert many <= many_factors
    assert many / few <= 1.3 * many_factors / few_factors


def test_the_means_of_a_set_are_freed_before_the_next_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large as the factors of its examples, they would be held twice."""
    sets = []

    def spied(*args, **options):
        assert all(earlier() is None for earlier in sets)
        result = gk.collect_gradients(*args, **options)
        sets.append(weakref.ref(result))
        return result

    monkeypatch.setattr(probe_module, "collect_gradients", spied)
    collected_sets = list(gk.Probe(SAFETY, UTILITY, CONTROL).collect_samples(tiny_llama(), tiny_tokenizer()))
    assert len(sets) == 3
    assert not any(gradients.layers for gradients in collected_sets)


def test_a_bar_counts_the_parameters_on_lines_of_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    probe = gk.Probe(SAFETY, UTILITY, CONTROL, null_draws=0)
    sets = probe.collect(tiny_llama(), tiny_tokenizer())
    probe.measure(*sets, progress=True)
    lines = re.split(r"[\r\n]+", capsys.readouterr().err)
    count = len(sets[0])
    assert any(line.startswith("geometry: 100%") and f"{count}/{count}" in line for line in lines)
    assert max(map(len, lines)) <= 80
