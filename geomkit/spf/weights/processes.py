"""Several processes that train one model: what they must agree on."""

from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from geomkit.errors import SPFError
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.gradients.summed import SumGradient
from geomkit.spf.demands import Measured


@dataclass(frozen=True)
class Processes:
    """The processes of one training run.

    Attributes:
        group: Those that hold shards of the weights; ``None`` where each holds all.
        several: Whether there are more than one.
    """

    group: "dist.ProcessGroup | None" = None
    several: bool = False

    @staticmethod
    def first() -> bool:
        """Whether this is the first process, or the only one."""
        return not _running() or dist.get_rank() == 0

    @classmethod
    def of_this_run(cls, group: "dist.ProcessGroup | None" = None) -> "Processes":
        """Return the processes that run beside this one."""
        return cls(group, _running() and dist.get_world_size() > 1)

    def agreed(self, measured: Measured) -> Measured:
        """Give every process the first one's constraints, so that weights stay the same to the last bit.

        Raises:
            SPFError: If the processes measured constraints of different shape.
        """
        if not self.several:
            return measured
        numbers = [tensor for own in measured.gradients.values() for one in own for tensor in one.tensors]
        demands = measured.demands
        device = numbers[0].device if numbers else torch.device("cpu")
        bounds = torch.tensor([measured.loss, *demands.firm, *demands.drift], dtype=torch.float64, device=device)
        _refuse_difference(sum(tensor.numel() for tensor in numbers), device)
        for tensor in numbers:
            _take_over(tensor)
        dist.broadcast(bounds, 0)
        loss, *rest = bounds.tolist()
        firm, drift = rest[: len(demands.firm)], rest[len(demands.firm) :]
        same = replace(demands, firm=np.array(firm), drift=np.array(drift))
        gradients = {name: tuple(map(_again, own)) for name, own in measured.gradients.items()}
        return replace(measured, gradients=gradients, demands=same, loss=loss, products={})


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()


def _again(gradient: LayerGradient) -> LayerGradient:
    """Return a gradient that has forgotten what it knew of its numbers, such as their norm."""
    if isinstance(gradient, SumGradient):
        return SumGradient(tuple(map(_again, gradient.parts)))
    again = copy(gradient)
    vars(again).pop("norm", None)
    return again


def _take_over(tensor: Tensor) -> None:
    first = tensor.contiguous()
    dist.broadcast(first, 0)
    if first is not tensor:
        tensor.copy_(first)


def _refuse_difference(size: int, device: torch.device) -> None:
    both = torch.tensor([size, -size], device=device)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    if int(both[0]) != -int(both[1]):
        raise SPFError(
            f"expected every process to measure the same anchors, found gradients of {-int(both[1])} and "
            f"{int(both[0])} numbers; give each the same SPF"
        )
