"""Reading off a block of weights the few numbers that a rule cares about, before a step and after it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from geomkit.spf.blocks import Block
from geomkit.spf.protection import Protection


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


def read(block: Block, protection: Protection) -> Reading:
    """Read a block; of a shard, its share in the sums."""
    product = block.times(protection.operand)
    dots = torch.zeros(len(protection.gradients), dtype=torch.float64, device=product.device)
    for part in protection.thin:
        held = part.left if block.rows is None else part.left[:, block.rows]
        dots[part.constraint] += (product[:, part.columns].T * held).sum(dtype=torch.float64)
    for place, gradient in protection.whole:
        dots[place] += block.dot(gradient)
    end = product.shape[1]
    probe_from = end - (0 if protection.probe is None else protection.probe.shape[1])
    right_from = probe_from - (0 if protection.right is None else protection.right.shape[1])
    return Reading(
        dots,
        left=None if protection.left is None else block.left_times(protection.left.T),
        right=None if protection.right is None else product[:, right_from:probe_from],
        probe=product[:, probe_from:],
    )


def read_all(
    blocks: Mapping[str, Block], protections: Mapping[str, Protection], group: dist.ProcessGroup | None = None
) -> dict[str, Reading]:
    """Read every block that is protected; of shards, the whole blocks that they are of.

    Args:
        blocks: Blocks by name.
        protections: What some of them are protected by.
        group: The processes that hold the shards, if the blocks are some.
    """
    readings = {name: read(blocks[name], protection) for name, protection in protections.items()}
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
