"""geomkit's own contenders: a small table of callables."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from geomkit.algebra import gram
from geomkit.collect import gradients_of
from geomkit.collection.selection import selection
from geomkit.collection.streaming import stream
from geomkit.gradients import GradientSet
from geomkit.layer_gradient import LayerGradient
from geomkit.svd import singular_values_of
from tests.benchmarks import agreement
from tests.benchmarks.agreement import Reference
from tests.benchmarks.contender import Contender, whole
from tests.benchmarks.workload import Workload

SKETCH = 16
"""Rows and columns of a two-sided sketch."""


def factors(workload: Workload) -> GradientSet:
    return gradients_of(workload.model, workload.rows, 0, per_sample=True, form="factored")


def summed(workload: Workload) -> GradientSet:
    return gradients_of(workload.model, workload.rows, 0)


def reduced(workload: Workload, reduce: Callable[[Sequence[LayerGradient]], Any], names: Sequence[str] | str) -> Any:
    """Reduce the B gradients of each parameter as the backward pass hands them out; no factors are kept."""
    found: dict[str, Any] = {}

    def sink(name: str, _examples: Sequence[int], gradients: Sequence[LayerGradient]) -> None:
        found[name] = reduce(gradients)

    stream(workload.model, workload.rows, 0, selection(names, None, None), samples=sink)
    return found


def norms(workload: Workload) -> dict[str, Tensor]:
    return reduced(workload, lambda gradients: torch.tensor([gradient.norm for gradient in gradients]), "*")


def grams(workload: Workload) -> dict[str, Tensor]:
    return reduced(workload, lambda gradients: gram(gradients, gradients), "*")


def spectra(workload: Workload) -> dict[str, Tensor]:
    return reduced(workload, singular_values_of, list(workload.linears))


def projections(workload: Workload, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return Gaussian Ω and Ψ for matrices of a shape, scaled so that inner products are kept on average."""
    generator = torch.Generator().manual_seed(sum(shape))
    left, right = (torch.randn(size, SKETCH, generator=generator) / SKETCH**0.5 for size in shape)
    return left.to(workload.device), right.to(workload.device)


def sketches(workload: Workload) -> dict[str, Tensor]:
    """Return Ωᵀ G Ψ for the gradient G of every example and linear layer."""
    shapes = {tuple(layer.weight.shape) for layer in workload.linears.values()}
    drawn = {shape: projections(workload, shape) for shape in shapes}

    def reduce(gradients: Sequence[LayerGradient]) -> Tensor:
        left, right = drawn[gradients[0].matrix_shape]
        return torch.stack([left.T @ gradient.matmul(right) for gradient in gradients])

    return reduced(workload, reduce, list(workload.linears))


# --------------------------------------------------------------------------------------------------- agreement


def _samples_error(found: GradientSet, _workload: Workload, reference: Reference) -> float:
    def stacked(name: str) -> Tensor:
        return torch.stack([sample[name].dense() for sample in found.samples])

    return agreement.error_of_samples(stacked, reference)


def _sum_error(found: GradientSet, _workload: Workload, reference: Reference) -> float:
    return agreement.error_of_total(lambda name: found[name].dense(), reference)


def _norms_error(found: dict[str, Tensor], _workload: Workload, reference: Reference) -> float:
    return agreement.error_of_norms(found, reference)


def _grams_error(found: dict[str, Tensor], _workload: Workload, reference: Reference) -> float:
    return agreement.error_of_grams(found, reference)


def _spectra_error(found: dict[str, Tensor], _workload: Workload, reference: Reference) -> float:
    return agreement.error_of_spectra(lambda name, row: found[name][row] if name in found else None, reference)


def _sketch_error(found: dict[str, Tensor], workload: Workload, reference: Reference) -> float:
    samples = {}
    for name in found.keys() & reference.samples.keys():
        left, right = (matrix.cpu() for matrix in projections(workload, tuple(reference.samples[name].shape[1:])))
        samples[name] = left.T @ reference.samples[name] @ right
    return agreement.error_of_samples(found.get, Reference(samples, {}))


TOOLKIT = (
    Contender("geomkit: factors", whole(factors), _samples_error, target=0.85),
    Contender("geomkit: summed gradient", whole(summed), _sum_error),
    Contender("geomkit: norms", whole(norms), _norms_error),
    Contender("geomkit: Gram", whole(grams), _grams_error, target=0.9),
    Contender(f"geomkit: sketch {SKETCH}×{SKETCH}", whole(sketches), _sketch_error, target=0.9),
    Contender("geomkit: singular values of every linear layer", whole(spectra), _spectra_error, target=1.25),
)
