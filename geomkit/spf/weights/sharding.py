"""Weights that FSDP2 shards over processes: gathering them for the anchors, and the rows on this process."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import distributed as dist
from torch import nn

from geomkit.errors import SPFError

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def is_sharded(parameter: nn.Parameter) -> bool:
    """Return whether a parameter is sharded over processes, as FSDP2 and tensor parallelism do it (a ``DTensor``)."""
    return hasattr(parameter, "device_mesh")


def reshard(model: nn.Module) -> None:
    """Shard every parameter that FSDP2 manages, as the optimizer expects it.

    An evaluation leaves parameters gathered, and FSDP2 shards them again only after the next backward pass.
    """
    for module in _fsdp_modules(model):
        module.reshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gather every parameter that FSDP2 manages inside the ``with`` block, as a plain parameter with its usual name.

    All processes must enter the block together, and every process holds the whole model meanwhile. A backward pass
    inside the block is local: no gradient is summed over processes. After the block all parameters are sharded again.

    Args:
        model: The model; without FSDP2 it is not changed.

    Raises:
        SPFError: If weights are sharded in another way, or the model is in a forward or backward pass.
    """
    with _whole(_fsdp_modules(model)):
        for name, parameter in model.named_parameters():
            if is_sharded(parameter):
                raise SPFError(
                    f"expected weights that FSDP2 alone shards, found '{name}' with the placements "
                    f"{getattr(parameter, 'placements', None)}; train without tensor parallelism"
                )
        yield


@contextmanager
def _whole(modules: "Sequence[FSDPModule]") -> Iterator[None]:
    """Gather the parameters of modules inside the ``with`` block, where FSDP2's hooks only cast to other dtypes."""
    if not modules:
        yield
        return
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    # 1. The model must be at rest: its training state is overwritten below.
    states = {id(module): module._get_fsdp_state() for module in modules}.values()  # noqa: SLF001 - no public way
    if any(state._training_state is not TrainingState.IDLE for state in states):  # noqa: SLF001
        raise SPFError(
            "expected a model at rest, found one in the middle of its forward or backward pass; call optimizer.step() "
            "after backward()"
        )
    try:
        # 2. Gather. Parameters that an evaluation left gathered hold old values, hence the resharding before it.
        for module in modules:
            module.reshard()
            module.unshard()
        # 3. Switch off the hooks. FSDP2 expects a forward pass in the state PRE_BACKWARD only as the recomputation of a
        #    checkpoint: there its hooks cast inputs and outputs for mixed precision, and neither shard, nor sum, nor
        #    write to the graph.
        for state in states:
            state._training_state = TrainingState.PRE_BACKWARD  # noqa: SLF001
        yield
    finally:
        # 4. Restore: the state of rest, no expected calls of modules, sharded parameters.
        for state in states:
            state._training_state = TrainingState.IDLE  # noqa: SLF001
            state._modules_to_run_forward.clear()  # noqa: SLF001 - modules of a group that did not run
        for module in modules:
            module.reshard()


def local_rows(parameter: nn.Parameter) -> slice:
    """Return the range of rows of a sharded parameter, along its first dimension, on this process; it may be empty.

    Raises:
        SPFError: If the parameter is not sharded by rows alone, or is offloaded to another device.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded = _by_rows(parameter)
    mesh = sharded.device_mesh
    if sharded.device.type != mesh.device_type:
        raise SPFError(
            f"expected weights on {mesh.device_type}, where gradients are, found some offloaded to "
            f"{sharded.device.type}; train without offloading"
        )
    sizes, starts = compute_local_shape_and_global_offset(sharded.shape, mesh, sharded.placements)
    return slice(starts[0], starts[0] + sizes[0])


def process_group(parameter: nn.Parameter) -> dist.ProcessGroup:
    """Return the processes that together hold all rows of a sharded parameter, each row once.

    Raises:
        SPFError: If the parameter is not sharded by rows alone.
    """
    sharded = _by_rows(parameter)
    (dimension,) = (place for place, placement in enumerate(sharded.placements) if placement.is_shard())
    return sharded.device_mesh.get_group(dimension)


def _by_rows(parameter: "nn.Parameter | DTensor") -> "DTensor":
    """Return the parameter as a ``DTensor``.

    Raises:
        SPFError: Unless only its rows are sharded, along one mesh dimension.
    """
    from torch.distributed.tensor import DTensor, Shard

    placements = parameter.placements if isinstance(parameter, DTensor) else ()
    split = [placement for placement in placements if not placement.is_replicate()]
    if not isinstance(parameter, DTensor) or len(split) != 1 or type(split[0]) is not Shard or split[0].dim != 0:
        raise SPFError(
            f"expected a parameter that FSDP2 shards by rows, found one of shape {tuple(parameter.shape)} with the "
            f"placements {placements}; train with FSDP2 alone, with its own placement, or with DDP"
        )
    return parameter


def _fsdp_modules(model: nn.Module) -> "list[FSDPModule]":
    """Return the modules that FSDP2 manages.

    Raises:
        SPFError: If FSDP1 manages modules: it flattens parameters into one tensor.
    """
    if not (dist.is_available() and dist.is_initialized()):  # nothing is sharded, and the import is slow
        return []
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise SPFError(
            "expected a model on one device, in DDP or in FSDP2, found FSDP1, which keeps weights in flat pieces; use "
            "FSDP2 (fully_shard, or fsdp_version: 2 in accelerate)"
        )
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
