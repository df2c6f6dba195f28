"""Context managers and a conversion that keep arithmetic in fp32 or better."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute fp32 matrix products in fp32 inside the block, since TF32 is too coarse for a projection.

    See tests/benchmarks/README.md for what remains of a projected gradient under TF32.
    """
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)


@contextmanager
def casts_uncached() -> Iterator[None]:
    """Disable autocast's cache inside the block, so that the autograd graph has a cast for each use of a weight."""
    previous = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(previous)


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which autocast is off for a device, so that products keep the dtype of their factors."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def at_least_fp32(values: Tensor) -> Tensor:
    """Return values converted to fp32, or unchanged if they are in fp32 or fp64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
