"""Exchange of collected gradients between workers, after which every worker has the gradients of all examples."""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from geomkit.gradients.accumulator import Accumulator
from geomkit.gradients.arithmetic import factored_of, parts_of
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.gradients.summed import SumGradient
from geomkit.utils.workers import Workers

_CPU = torch.device("cpu")


def exchange_sums(
    workers: Workers,
    sums: MutableMapping[str, Accumulator],
    parameters: Mapping[str, nn.Parameter],
    *,
    keep_factors: bool,
) -> None:
    """Replace each worker's sum of gradients by the sum over the examples of all workers.

    Thin factors are sent where they stay thin together, in the order in which one process would have collected them.
    Otherwise the dense sums are added up.

    Args:
        workers: The workers.
        sums: The sum over this worker's examples, for each parameter that has a gradient there.
        parameters: All parameters to collect, in the order of the model.
        keep_factors: Whether factors are kept where the dense form is smaller.
    """
    if workers.count == 1:
        return
    sizes = workers.gather({name: _size(running.total()) for name, running in sums.items()})
    for name, parameter in parameters.items():
        present = [own[name] for own in sizes if name in own]
        if not present:
            continue
        own = sums.pop(name).total() if name in sums else None
        joined = Accumulator(keep_factors=keep_factors)
        if any(size.dense for size in present) or (
            not keep_factors and sum(size.factors for size in present) > parameter.numel()
        ):
            total = torch.zeros(parameter.shape, dtype=present[0].dtype, device=parameter.device)
            if own is not None:
                own.add_to(total, 1.0)
            workers.sum_in_place(total)
            joined.add(DenseGradient(total, sum(size.tokens for size in present)))
        else:
            for part in workers.gather(None if own is None else _moved(own, _CPU, {})):
                if part is not None:
                    joined.add(_moved(part, parameter.device, {}))
        sums[name] = joined


@dataclass(frozen=True)
class _Size:
    """What the workers must know of each other's sum to choose one way to add up.

    Attributes:
        dense: Whether a part of the sum is dense.
        factors: Number of floating-point numbers in its factors.
        tokens: Its number of tokens.
        dtype: Its dtype.
    """

    dense: bool
    factors: int
    tokens: int
    dtype: torch.dtype


def _size(gradient: LayerGradient) -> _Size:
    parts = parts_of(gradient)
    dense = any(isinstance(part, DenseGradient) for part in parts)
    return _Size(dense, sum(part.floats for part in factored_of(parts)), gradient.tokens, gradient.dtype)


def exchange_samples(
    workers: Workers, samples: Sequence[dict[str, LayerGradient]], parameters: Mapping[str, nn.Parameter]
) -> None:
    """Fill in the gradients of the examples of the other workers.

    The workers exchange one example each at a time, so that little memory is needed beside the gradients.

    Args:
        workers: The workers.
        samples: The gradients of every example by parameter; no parameters for examples of other workers.
        parameters: All parameters to collect.
    """
    if workers.count == 1:
        return
    own = [index for index, gradients in enumerate(samples) if gradients]
    for nth in range(max(workers.gather(len(own)))):
        sent = {index: _all_moved(samples[index], dict.fromkeys(samples[index], _CPU)) for index in own[nth : nth + 1]}
        for rank, received in enumerate(workers.gather(sent)):
            if rank != workers.rank:
                for index, gradients in received.items():
                    devices = {name: parameters[name].device for name in gradients}
                    samples[index].update(_all_moved(gradients, devices))


def _all_moved(gradients: Mapping[str, LayerGradient], devices: Mapping[str, torch.device]) -> dict[str, LayerGradient]:
    """Return the gradients on other devices. Layers with the same input share its memory afterwards, as before."""
    copies: dict[Any, Tensor] = {}
    return {name: _moved(gradient, devices[name], copies) for name, gradient in gradients.items()}


def _moved(gradient: LayerGradient, device: torch.device, copies: dict[Any, Tensor]) -> LayerGradient:
    """Return a gradient on a device.

    Args:
        gradient: The gradient.
        device: The device.
        copies: The tensors so far, which further tensors in the same memory are replaced by.
    """
    if isinstance(gradient, SumGradient):
        return SumGradient(tuple(_moved(part, device, copies) for part in gradient.parts))

    def copy(tensor: Tensor) -> Tensor:
        key = device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if key not in copies:
            copies[key] = tensor.detach().to(device)
        return copies[key]

    values = {field.name: getattr(gradient, field.name) for field in fields(gradient)}  # type: ignore[arg-type]
    tensors = {name: copy(value) for name, value in values.items() if isinstance(value, Tensor)}
    return replace(gradient, **tensors)  # type: ignore[type-var]
