"""Weights that FSDP2 shards over processes: whole while gradients are collected, and which of their rows are here."""

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
    """Tell whether a parameter is spread over processes, as FSDP2 and tensor parallelism do it (a ``DTensor``)."""
    return hasattr(parameter, "device_mesh")


def reshard(model: nn.Module) -> None:
    """Have every parameter that FSDP2 manages sharded, as the optimizer knows it.

    An evaluation leaves some whole that FSDP shards again only after the next backward pass.
    """
    for module in _fsdp_modules(model):
        module.reshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Have every parameter that FSDP2 manages whole and plain inside the block, under its usual name.

    The processes must come here together, and each holds the whole model for as long. A backward pass inside the block
    is this process's own: nothing is summed over processes. When the block ends all is sharded, with nothing left
    behind.

    Args:
        model: The model; one without FSDP2 is left alone.

    Raises:
        SPFError: If weights are sharded in another way, or the model is just running.
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
    """Have the parameters of these modules whole inside the block, and their hooks do nothing but cast."""
    if not modules:
        yield
        return
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    states = {id(module): module._get_fsdp_state() for module in modules}.values()  # noqa: SLF001 - no public way
    if any(state._training_state is not TrainingState.IDLE for state in states):  # noqa: SLF001
        raise SPFError(
            "expected a model at rest, found one in the middle of its forward or backward pass; call optimizer.step() "
            "after backward()"
        )
    try:
        for module in modules:
            module.reshard()  # what an evaluation left whole has the values of then
            module.unshard()
        for state in states:
            # During a backward pass a module runs again only for a checkpoint: there the hooks cast inputs and
            # outputs as mixed precision says, and neither shard, nor sum, nor write to the graph.
            state._training_state = TrainingState.PRE_BACKWARD  # noqa: SLF001
        yield
    finally:
        for state in states:
            state._training_state = TrainingState.IDLE  # noqa: SLF001
            state._modules_to_run_forward.clear()  # noqa: SLF001 - those of a group of modules that did not run
        for module in modules:
            module.reshard()


def local_rows(parameter: nn.Parameter) -> slice:
    """Return which rows of a sharded parameter, along its first dimension, this process holds; maybe none.

    Raises:
        SPFError: If it is not sharded by rows alone, or kept on another device than its group's.
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
        SPFError: If it is not sharded by rows alone.
    """
    sharded = _by_rows(parameter)
    (dimension,) = (place for place, one in enumerate(sharded.placements) if one.is_shard())
    return sharded.device_mesh.get_group(dimension)


def _by_rows(parameter: "nn.Parameter | DTensor") -> "DTensor":
    """Return a parameter as what it is, if its rows are sharded over one dimension of the mesh, and whole over others.

    Raises:
        SPFError: If it is not.
    """
    from torch.distributed.tensor import DTensor, Shard

    placements = parameter.placements if isinstance(parameter, DTensor) else ()
    split = [one for one in placements if not one.is_replicate()]
    if not isinstance(parameter, DTensor) or len(split) != 1 or type(split[0]) is not Shard or split[0].dim != 0:
        raise SPFError(
            f"expected a parameter that FSDP2 shards by rows, found one of shape {tuple(parameter.shape)} with the "
            f"placements {placements}; train with FSDP2 alone, with its own placement, or with DDP"
        )
    return parameter


def _fsdp_modules(model: nn.Module) -> "list[FSDPModule]":
    """Return the modules that FSDP2 manages.

    Raises:
        SPFError: If FSDP1 manages some, which keeps no parameter by itself.
    """
    if not (dist.is_available() and dist.is_initialized()):  # nothing is sharded, and the import takes a while
        return []
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise SPFError(
            "expected a model on one device, in DDP or in FSDP2, found FSDP1, which keeps weights in flat pieces; use "
            "FSDP2 (fully_shard, or fsdp_version: 2 in accelerate)"
        )
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
