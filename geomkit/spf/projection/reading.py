"""Reading from a block of weights, before and after a step, the few numbers that a rule depends on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from geomkit.spf.projection.protection import Protection
from geomkit.spf.weights.blocks import Block, Move


@dataclass(frozen=True, eq=False)
class Reading:
    """The numbers of a block W that a rule depends on, all of them linear in W.

    The difference of two readings is the reading of the update between them, so that an update is judged without a copy
    of the weights. Products are taken in fp32, whose rounding, ε‖w‖ for a row w, is the rounding of the weights.

    Attributes:
        dots: (m,) ⟨W, g_i⟩ for the gradient of each constraint, fp64.
        left: UᵀW, (k, columns); ``None`` without U.
        right: WV, (rows, k); ``None`` without V.
        probe: WΩ, (rows, q).
    """

    dots: Tensor
    left: Tensor | None
    right: Tensor | None
    probe: Tensor

    def __sub__(self, other: "Reading") -> "Reading":
        """Return the reading of the difference of the weights."""
        left = None if self.left is None or other.left is None else self.left - other.left
        right = None if self.right is None or other.right is None else self.right - other.right
        return Reading(self.dots - other.dots, left, right, self.probe - other.probe)

    @property
    def by_row(self) -> tuple[Tensor | None, Tensor]:
        """WV and WΩ, which have one row for each row of W."""
        return self.right, self.probe

    @property
    def norm(self) -> float:
        """‖WΩ‖, an estimate of ‖W‖, see :attr:`Protection.probe`; exact for a vector."""
        return float(torch.linalg.vector_norm(self.probe, dtype=torch.float64))


def read(block: Block, protection: Protection, dots: Tensor | None = None) -> Reading:
    """Return the reading of a block; for a shard, the shard's summand of the whole block's reading.

    Args:
        block: The block.
        protection: The protection, which has the gradients and the subspaces to multiply by.
        dots: (m,) ⟨W, g_i⟩, if they are known already, which saves the larger part of the work.
    """
    operand, width = protection.operand, protection.subspace_columns
    # 1. One product W [R₁ᵀ R₂ᵀ … V Ω]; where ⟨W, g_i⟩ is known, only its last columns, W [V Ω].
    product = block.times(operand if dots is None else operand[:, operand.shape[1] - width :])
    # 2. ⟨W, g_i⟩ from the first columns, WV and WΩ from the last ones, UᵀW by a product from the left.
    end = product.shape[1]
    probe_start = end - (0 if protection.probe is None else protection.probe.shape[1])
    return Reading(
        _dots(block, protection, product) if dots is None else dots,
        left=None if protection.left is None else block.left_times(protection.left.T),
        right=None if protection.right is None else product[:, end - width : probe_start],
        probe=product[:, probe_start:],
    )


def _dots(block: Block, protection: Protection, product: Tensor) -> Tensor:
    """Return (m,) ⟨W, g_i⟩: for a factored part LᵀR the sum of (W Rᵀ)ᵀ ∘ L, for other parts an inner product."""
    dots = torch.zeros(len(protection.gradients), dtype=torch.float64, device=product.device)
    for part in protection.factored_parts:
        left = part.left if block.rows is None else part.left[:, block.rows]
        dots[part.constraint].add_((product[:, part.columns].T * left).sum(dtype=torch.float64))
    for place, gradient in protection.other_parts:
        dots[place].add_(block.dot(gradient))
    return dots


def read_all(
    blocks: Mapping[str, Block],
    protections: Mapping[str, Protection],
    group: dist.ProcessGroup | None = None,
    *,
    moves: Mapping[str, Sequence[Move]] | None = None,
    known_dots: Mapping[str, Tensor] | None = None,
) -> dict[str, Reading]:
    """Return the reading of every protected block; for sharded blocks, the reading of the whole block.

    Args:
        blocks: Blocks by name.
        protections: The protections, of some of the blocks.
        group: The processes that hold the shards, if the blocks are sharded.
        moves: Gradients to add to some of the blocks before these are read. Blocks are moved and read one by one, while
            a block is still in the processor's cache.
        known_dots: For some of the blocks (m,) ⟨W, g_i⟩, see :func:`read`.
    """
    moves, known_dots = moves or {}, known_dots or {}
    readings = {}
    for name, protection in protections.items():
        if name in moves:
            blocks[name].apply(moves[name])
        readings[name] = read(blocks[name], protection, known_dots.get(name))
    return readings if group is None else _summed(readings, blocks, protections, group)


def _summed(
    readings: Mapping[str, Reading],
    blocks: Mapping[str, Block],
    protections: Mapping[str, Protection],
    group: dist.ProcessGroup,
) -> dict[str, Reading]:
    """Return the readings of whole blocks: the sum of the shards' readings over the processes, in one message."""
    # 1. ⟨W, g_i⟩ and UᵀW are sums over rows. WV and WΩ have rows of their own: they are put among zeros, then summed.
    sharded = {name: reading for name, reading in readings.items() if blocks[name].rows is not None}
    parts = {
        name: [
            reading.dots,
            reading.left,
            *(_among_zeros(part, blocks[name], protections[name]) for part in reading.by_row),
        ]
        for name, reading in sharded.items()
    }
    # 2. One message of all numbers, in fp64.
    tensors = [part.double() for block_parts in parts.values() for part in block_parts if part is not None]
    if not tensors:
        return dict(readings)
    message = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(message, group=group)
    # 3. Split the sum into the readings, in the same order.
    summed = iter(torch.split(message, [tensor.numel() for tensor in tensors]))
    whole = {
        name: Reading(*(None if part is None else next(summed).view(part.shape) for part in block_parts))  # type: ignore[arg-type]
        for name, block_parts in parts.items()
    }
    return {**readings, **whole}


def _among_zeros(part: Tensor | None, block: Block, protection: Protection) -> Tensor | None:
    """Return the rows of a shard at their places in the whole block, all other rows zero."""
    if part is None:
        return None
    whole = part.new_zeros(protection.gradient.matrix_shape[0], part.shape[1])
    whole[block.rows] = part
    return whole
