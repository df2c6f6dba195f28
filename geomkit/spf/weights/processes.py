"""Agreement of several processes that train one model on the measured constraints."""

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
from geomkit.utils.workers import is_distributed


@dataclass(frozen=True)
class Processes:
    """The processes of one training run.

    Attributes:
        group: The processes that hold shards of the weights; ``None`` where each process holds all weights.
        several: Whether there is more than one process.
    """

    group: "dist.ProcessGroup | None" = None
    several: bool = False

    @classmethod
    def of_this_run(cls, group: "dist.ProcessGroup | None" = None) -> "Processes":
        """Return the processes of the present run."""
        return cls(group, is_distributed() and dist.get_world_size() > 1)

    def agreed(self, measured: Measured) -> Measured:
        """Return the constraints of the first process, so that every process corrects its weights by the same bits.

        Args:
            measured: The constraints that this process has measured. Its gradients are overwritten in place.

        Raises:
            SPFError: If the processes measured constraints of different shape.
        """
        if not self.several:
            return measured
        # 1. Compare the sizes first: a broadcast of different sizes would hang, or mix up numbers.
        gradients, demands = measured.gradients, measured.demands
        tensors = [tensor for block in gradients.values() for gradient in block for tensor in gradient.tensors]
        device = tensors[0].device if tensors else torch.device("cpu")
        _refuse_difference(sum(tensor.numel() for tensor in tensors), device)
        # 2. Overwrite the gradients with the gradients of the first process.
        for tensor in tensors:
            _broadcast_from_first(tensor)
        # 3. Likewise the loss, its drift and the bounds, in one message.
        hard, soft = demands.hard_bounds, demands.soft_bounds
        scalars = torch.tensor([measured.loss, measured.drift, *hard, *soft], dtype=torch.float64, device=device)
        dist.broadcast(scalars, 0)
        loss, drift, *bounds = scalars.tolist()
        agreed = replace(demands, hard_bounds=np.array(bounds[: len(hard)]), soft_bounds=np.array(bounds[len(hard) :]))
        # 4. Drop what was computed from the former numbers: cached norms, and the products ⟨W, g⟩.
        gradients = {name: tuple(map(_drop_cached_norm, block)) for name, block in gradients.items()}
        return replace(measured, gradients=gradients, demands=agreed, loss=loss, drift=drift, products={})


def _drop_cached_norm(gradient: LayerGradient) -> LayerGradient:
    """Return a copy of the gradient without its cached norm."""
    if isinstance(gradient, SumGradient):
        return SumGradient(tuple(map(_drop_cached_norm, gradient.parts)))
    bare = copy(gradient)
    vars(bare).pop("norm", None)
    return bare


def _broadcast_from_first(tensor: Tensor) -> None:
    """Overwrite a tensor, contiguous or not, with its value on the first process."""
    first = tensor.contiguous()
    dist.broadcast(first, 0)
    if first is not tensor:
        tensor.copy_(first)


def _refuse_difference(size: int, device: torch.device) -> None:
    """Compare the processes' numbers of elements: max(size) and max(−size) = −min(size), in one message.

    Raises:
        SPFError: If the numbers of elements differ.
    """
    extremes = torch.tensor([size, -size], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    largest, smallest = int(extremes[0]), -int(extremes[1])
    if largest != smallest:
        raise SPFError(
            f"expected every process to measure the same anchors, found gradients of {smallest} and {largest} "
            "numbers; give every process the same SPF"
        )
