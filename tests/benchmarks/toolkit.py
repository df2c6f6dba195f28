"""geomkit's own contenders: a small table of callables."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from geomkit.collection import measures
from geomkit.collection.collect import collect_from_tokens
from geomkit.collection.measures import Measure
from geomkit.collection.sample_grams import grams_from_tokens
from geomkit.collection.sample_measures import measures_from_tokens
from geomkit.gradients.gradient_set import GradientSet
from tests.benchmarks import agreement
from tests.benchmarks.agreement import Reference
from tests.benchmarks.contender import Contender, whole
from tests.benchmarks.workload import Workload

SKETCH = measures.sketch(16)


def factors(workload: Workload) -> GradientSet:
    return collect_from_tokens(workload.model, workload.rows, 0, per_sample=True, form="factored")


def summed(workload: Workload) -> GradientSet:
    return collect_from_tokens(workload.model, workload.rows, 0)


def _measured(workload: Workload, measure: Measure, layers: Sequence[str] | str = "*") -> Mapping[str, Tensor]:
    return measures_from_tokens(workload.model, workload.rows, 0, {"one": measure}, layers=layers)["one"]


def norms(workload: Workload) -> Mapping[str, Tensor]:
    return _measured(workload, measures.norms)


def grams(workload: Workload) -> Mapping[str, Tensor]:
    return grams_from_tokens(workload.model, workload.rows, None, 0)


def spectra(workload: Workload) -> Mapping[str, Tensor]:
    return _measured(workload, measures.singular_values(), list(workload.linears))


def sketches(workload: Workload) -> Mapping[str, Tensor]:
    return _measured(workload, SKETCH, list(workload.linears))


def sketches_without_head(workload: Workload) -> Mapping[str, Tensor]:
    head = workload.model.get_output_embeddings()
    return _measured(workload, SKETCH, [name for name, layer in workload.linears.items() if layer is not head])


# --------------------------------------------------------------------------------------------------- agreement


def _samples_error(found: GradientSet, _workload: Workload, reference: Reference) -> float:
    def stacked(name: str) -> Tensor:
        return torch.stack([sample[name].dense() for sample in found.samples])

    return agreement.error_of_samples(stacked, reference)


def _sum_error(found: GradientSet, _workload: Workload, reference: Reference) -> float:
    return agreement.error_of_total(lambda name: found[name].dense(), reference)


def _norms_error(found: Mapping[str, Tensor], _workload: Workload, reference: Reference) -> float:
    return agreement.error_of_norms(found, reference)


def _grams_error(found: Mapping[str, Tensor], _workload: Workload, reference: Reference) -> float:
    return agreement.error_of_grams(found, reference)


def _spectra_error(found: Mapping[str, Tensor], _workload: Workload, reference: Reference) -> float:
    return agreement.error_of_spectra(lambda name, row: found[name][row] if name in found else None, reference)


def _sketch_error(found: Mapping[str, Tensor], _workload: Workload, reference: Reference) -> float:
    samples = {}
    for name in found.keys() & reference.samples.keys():
        left, right = SKETCH.test_matrices(name, tuple(reference.samples[name].shape[1:]))
        samples[name] = left @ reference.samples[name] @ right
    return agreement.error_of_samples(found.get, Reference(samples, {}))


TOOLKIT = (
    Contender("geomkit: factors", whole(factors), _samples_error, target=0.85),
    Contender("geomkit: summed gradient", whole(summed), _sum_error),
    Contender("geomkit: norms", whole(norms), _norms_error),
    Contender("geomkit: Gram", whole(grams), _grams_error, target=0.9),
    Contender("geomkit: sketch 16×16, with the head", whole(sketches), _sketch_error, target=0.9),
    Contender("geomkit: sketch 16×16, without the head", whole(sketches_without_head), _sketch_error, target=0.9),
    Contender("geomkit: singular values of every linear layer", whole(spectra), _spectra_error, target=1.25),
)
