"""Blocks and conversions that keep arithmetic in fp32 or better."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


@contextmanager
def full_precision() -> Iterator[None]:
    """Keep fp32 products in fp32 inside the block: TF32 leaves 3e-3 of what a projection should remove."""
    found = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(found)


@contextmanager
def casts_uncached() -> Iterator[None]:
    """Let autocast cast a weight anew at each use inside the block, so that the graph shows every use."""
    found = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(found)


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a block in which products are computed in the type of their factors."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def at_least_fp32(values: Tensor) -> Tensor:
    """Return the values in fp32, or in fp64 if they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
