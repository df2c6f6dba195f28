"""Does a contender compute the right thing? Everything is compared with ``loss.backward()``, one example at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.benchmarks.workload import Workload


@dataclass(frozen=True, eq=False)
class Reference:
    """What ``loss.backward()`` gives, in fp32 on the CPU.

    Attributes:
        samples: (B, *shape) gradient of each example's own loss, by parameter.
        total: The gradient of the batch's loss.
    """

    samples: Mapping[str, Tensor]
    total: Mapping[str, Tensor]

    @classmethod
    def of(cls, workload: Workload, names: Sequence[str]) -> "Reference":
        each = [workload.gradients(slice(row, row + 1), names) for row in range(workload.batch)]
        total = workload.gradients(slice(None), names)
        samples = {name: torch.stack([one.pop(name).cpu() for one in each]) for name in names}
        return cls(samples, {name: value.cpu() for name, value in total.items()})

    def matrices(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.samples.items() if value.ndim == 3}


def _largest(errors: Sequence[float]) -> float:
    """Return the largest error; unlike Python's ``max``, not-a-number is larger than anything."""
    return float(torch.tensor(errors).max())


def error_of_samples(found: Callable[[str], Tensor | None], reference: Reference) -> float:
    """Return the largest ‖found − reference‖ / ‖reference‖ of any example and parameter that was computed at all.

    Args:
        found: Gives the (B, *shape) gradients of a parameter, or None where the contender leaves it out.
        reference: What they should be.
    """
    errors = []
    for name, expected in reference.samples.items():
        if (gradients := found(name)) is not None:
            difference = (gradients.detach().cpu().float().reshape(expected.shape) - expected).flatten(1).norm(dim=1)
            errors.append(float((difference / expected.flatten(1).norm(dim=1)).max()))
    return _largest(errors)


def error_of_total(found: Callable[[str], Tensor | None], reference: Reference) -> float:
    """Return the largest relative error of any parameter's summed gradient."""
    pairs = [(found(name), expected) for name, expected in reference.total.items()]
    return _largest([float((a.detach().cpu().float() - b).norm() / b.norm()) for a, b in pairs if a is not None])


def error_of_norms(found: Mapping[str, Tensor], reference: Reference) -> float:
    """Return the largest relative error of any example's norm of any parameter."""
    errors = []
    for name in reference.samples.keys() & found.keys():
        expected = reference.samples[name].flatten(1).double().norm(dim=1)
        errors.append(float(((torch.as_tensor(found[name]).cpu() - expected) / expected).abs().max()))
    return _largest(errors)


def error_of_grams(found: Mapping[str, Tensor], reference: Reference) -> float:
    """Return the largest error of any inner product, over the product of the two norms."""
    errors = []
    for name in reference.samples.keys() & found.keys():
        flat = reference.samples[name].flatten(1).double()
        norms = flat.norm(dim=1)
        errors.append(float(((found[name].cpu() - flat @ flat.T) / torch.outer(norms, norms)).abs().max()))
    return _largest(errors)


def error_of_spectra(found: Callable[[str, int], Tensor | None], reference: Reference) -> float:
    """Return the largest error of any singular value over the first, against a dense SVD in fp64.

    Args:
        found: Gives the singular values of a parameter and an example, descending, or None where left out.
        reference: The gradients; one example of each shape is decomposed, a dense SVD takes long.
    """
    shapes = {tuple(value.shape): name for name, value in reference.matrices().items() if found(name, 0) is not None}
    errors = []
    for name in shapes.values():
        expected = torch.linalg.svdvals(reference.samples[name][0].double())
        values = torch.zeros_like(expected)
        computed = torch.as_tensor(found(name, 0)).cpu().double()
        values[: len(computed)] = computed
        errors.append(float((values - expected).abs().max() / expected[0]))
    return _largest(errors)
