"""Reading off a block of weights the few numbers that a rule cares about, before a step and after it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from geomkit.spf.projection.protection import Protection
from geomkit.spf.weights.blocks import Block, Move


@dataclass(frozen=True, eq=False)
class Reading:
    """The coordinates of a block that a rule cares about; linear in the weights.

    The difference of two readings is the reading of an update, so that an update is judged without a copy of the
    weights. Products are taken in fp32: its rounding, ε‖w‖ for a row w, is that of the weights themselves.

    Attributes:
        dots: (m,) ⟨W, g⟩ for the gradient g of each constraint, fp64.
        left: UᵀW, (k, columns); ``None`` without U.
        right: WV, (rows, k); ``None`` without V.
        probe: WΩ, (rows, q).
    """

    dots: Tensor
    left: Tensor | None
    right: Tensor | None
    probe: Tensor

    def __sub__(self, other: "Reading") -> "Reading":
        """Return the reading of the difference."""
        left = None if self.left is None or other.left is None else self.left - other.left
        right = None if self.right is None or other.right is None else self.right - other.right
        return Reading(self.dots - other.dots, left, right, self.probe - other.probe)

    @property
    def by_row(self) -> tuple[Tensor | None, Tensor]:
        """What has a row for each of the block's: WV and WΩ."""
        return self.right, self.probe

    @property
    def norm(self) -> float:
        """An estimate of ‖W‖, see :attr:`Protection.probe`; exact for a vector."""
        return float(torch.linalg.vector_norm(self.probe, dtype=torch.float64))


def read(block: Block, protection: Protection, dots: Tensor | None = None) -> Reading:
    """Read a block; of a shard, its share in the sums.

    Args:
        block: The block.
        protection: What is read.
        dots: ⟨W, g⟩ for each constraint, where that is known already: the larger part of the work is saved.
    """
    own, operand = protection.own_columns, protection.operand
    product = block.times(operand if dots is None else operand[:, operand.shape[1] - own :])
    end = product.shape[1]
    probe_from = end - (0 if protection.probe is None else protection.probe.shape[1])
    return Reading(
        _dots(block, protection, product) if dots is None else dots,
        left=None if protection.left is None else block.left_times(protection.left.T),
        right=None if protection.right is None else product[:, end - own : probe_from],
        probe=product[:, probe_from:],
    )


def _dots(block: Block, protection: Protection, product: Tensor) -> Tensor:
    dots = torch.zeros(len(protection.gradients), dtype=torch.float64, device=product.device)
    for part in protection.thin:
        held = part.left if block.rows is None else part.left[:, block.rows]
        dots[part.constraint].add_((product[:, part.columns].T * held).sum(dtype=torch.float64))
    for place, gradient in protection.whole:
        dots[place].add_(block.dot(gradient))
    return dots


def read_all(
    blocks: Mapping[str, Block],
    protections: Mapping[str, Protection],
    group: dist.ProcessGroup | None = None,
    *,
    moves: Mapping[str, Sequence[Move]] | None = None,
    known: Mapping[str, Tensor] | None = None,
) -> dict[str, Reading]:
    """Read every block that is protected; of shards, the whole blocks that they are of.

    Args:
        blocks: Blocks by name.
        protections: What some of them are protected by.
        group: The processes that hold the shards, if the blocks are some.
        moves: What is added to some of them first; one after the other, as a block is read fast just after.
        known: What is known of some of them, see :func:`read`.
    """
    moves, known = moves or {}, known or {}
    readings = {}
    for name, protection in protections.items():
        if name in moves:
            blocks[name].apply(moves[name])
        readings[name] = read(blocks[name], protection, known.get(name))
    return readings if group is None else _summed(readings, blocks, protections, group)


def _summed(
    readings: Mapping[str, Reading],
    blocks: Mapping[str, Block],
    protections: Mapping[str, Protection],
    group: dist.ProcessGroup,
) -> dict[str, Reading]:
    """Sum over the processes, in one message: sums over rows, and rows that stand among zeros."""
    sharded = {name: one for name, one in readings.items() if blocks[name].rows is not None}
    parts = {
        name: [one.dots, one.left, *(_among_zeros(part, blocks[name], protections[name]) for part in one.by_row)]
        for name, one in sharded.items()
    }
    sent = [part.double() for own in parts.values() for part in own if part is not None]
    if not sent:
        return dict(readings)
    flat = torch.cat([part.flatten() for part in sent])
    dist.all_reduce(flat, group=group)
    summed = iter(torch.split(flat, [part.numel() for part in sent]))
    whole = {
        name: Reading(*(None if part is None else next(summed).view(part.shape) for part in own))  # type: ignore[arg-type]
        for name, own in parts.items()
    }
    return {**readings, **whole}


def _among_zeros(part: Tensor | None, block: Block, protection: Protection) -> Tensor | None:
    if part is None:
        return None
    whole = part.new_zeros(protection.gradient.matrix_shape[0], part.shape[1])
    whole[block.rows] = part
    return whole
