"""Workers: the processes of a run that divide the examples of a call, and what they tell each other.

A launcher such as ``accelerate launch`` starts the same script several times, and ``Accelerator()`` or the Trainer
joins the processes to a group of :mod:`torch.distributed`. From then on, a call that divides its examples is a call of
all processes together.
"""

import io
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from geomkit.errors import DataError, GeomkitError

Value = TypeVar("Value")

_BY_ITSELF: ContextVar[bool] = ContextVar("geomkit_by_itself", default=False)


@dataclass(frozen=True)
class Workers:
    """One of the processes that divide the examples of a call, by its number.

    Every method except :meth:`share` is a call of all workers together: a worker waits in it for the others.

    Attributes:
        rank: Number of this worker, from 0.
        count: Number of workers.
    """

    rank: int = 0
    count: int = 1

    def share(self, costs: Sequence[int]) -> range:
        """Return the places of this worker's part of some items: items in a row, of about 1/``count`` of the cost.

        The parts of all workers, one after the other, are all items in order. A part may be empty.

        Args:
            costs: Positive cost of each item.

        Example:
            >>> [Workers(rank, 3).share([4, 2, 1, 1, 1]) for rank in range(3)]
            [range(0, 1), range(1, 2), range(2, 5)]
        """
        # An item belongs to the worker in whose part of the total cost its middle falls.
        total = sum(costs)
        ends = accumulate(costs)
        owners = [(2 * end - cost) * self.count // (2 * total) for end, cost in zip(ends, costs, strict=True)]
        return range(sum(owner < self.rank for owner in owners), sum(owner <= self.rank for owner in owners))

    def gather(self, value: Value) -> list[Value]:
        """Return the value of every worker, in the order of the workers.

        Args:
            value: A value that can be pickled, with its tensors on the CPU. Of a view, only what it shows is sent.
        """
        if self.count == 1:
            return [value]
        pickled = io.BytesIO()
        _Pickler(pickled, pickle.HIGHEST_PROTOCOL).dump(value)
        received: list[bytes] = [b""] * self.count
        dist.all_gather_object(received, pickled.getvalue())
        # The bytes are from processes of this very run.
        return [value if rank == self.rank else pickle.loads(data) for rank, data in enumerate(received)]  # noqa: S301

    def sum_in_place(self, tensor: Tensor) -> None:
        """Overwrite a tensor with its sum over all workers, which is equal to the last bit on all of them."""
        if self.count == 1:
            return
        # NCCL sums on a GPU only.
        on_gpu = dist.get_backend() == "nccl"
        sent = (tensor.cuda() if on_gpu and not tensor.is_cuda else tensor).contiguous()
        dist.all_reduce(sent)
        if sent is not tensor:
            tensor.copy_(sent)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Raise the error of any worker on every worker when the block ends, so that none waits for one that is gone.

        The block holds work of this worker alone: a call of all workers inside it would wait for a failed one.

        Raises:
            GeomkitError: The error of the first worker that failed. An error of another type is raised as it is where
                it arose, and as a :class:`~geomkit.errors.GeomkitError` with its first line on the other workers.
        """
        if self.count == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        reports = self.gather(None if error is None else _report(error, self.rank))
        report = next((report for report in reports if report is not None), None)
        if error is not None and not isinstance(error, GeomkitError):
            raise error
        if report is not None:
            kind, text = report
            raise kind(text) from error

    def refuse_differences(self, **values: object) -> None:
        """Refuse a call that the workers do not make alike.

        Args:
            **values: What must be equal on all workers, such as a fingerprint, by its name in the message.

        Raises:
            DataError: If a value is not equal on all workers.
        """
        first, *others = self.gather(values)
        for rank, other in enumerate(others, 1):
            for name in values:
                if other[name] != first[name]:
                    raise DataError(
                        f"expected the same {name} on every process, found others on process {rank} than on process 0; "
                        "give every process all examples, which the processes divide, or let each work alone: "
                        "with geomkit.utils.workers.by_itself()"
                    )


ALONE = Workers()
"""A process that works by itself."""


def running_workers() -> Workers:
    """Return the processes of this run, as they divide the examples of a call; :data:`ALONE` without a process group.

    Inside :func:`by_itself`, also a process of a group is alone.
    """
    if _BY_ITSELF.get() or not is_distributed():
        return ALONE
    return Workers(dist.get_rank(), dist.get_world_size())


@contextmanager
def by_itself() -> Iterator[None]:
    """Let this process do the calls inside the block by itself, with all their examples.

    For calls that the other processes do not make, such as an evaluation by the first process only, or that they make
    with examples or models of their own.

    Example:
        >>> with by_itself():
        ...     running_workers().count
        1
    """
    token = _BY_ITSELF.set(True)
    try:
        yield
    finally:
        _BY_ITSELF.reset(token)


def first_process() -> bool:
    """Return whether this process shows bars and writes files: the first process of a run, or the only process."""
    return not is_distributed() or dist.get_rank() == 0


def is_distributed() -> bool:
    """Return whether the processes of a run have been joined."""
    return dist.is_available() and dist.is_initialized()


class _Pickler(pickle.Pickler):
    """Pickles tensors as arrays: faster for small tensors, and of a view only what it shows."""

    def reducer_override(self, value: object) -> Any:
        if type(value) is Tensor and value.dtype in {torch.float32, torch.float64, torch.int64, torch.bool}:
            return torch.from_numpy, (value.detach().numpy(),)
        return NotImplemented


def _report(error: Exception, rank: int) -> tuple[type[GeomkitError], str]:
    """Return an error as the other workers raise it: its type in :mod:`geomkit.errors`, and one line."""
    for kind in type(error).__mro__:
        if kind.__module__ == GeomkitError.__module__:
            return kind, str(error)
    lines = str(error).splitlines() or [""]
    return GeomkitError, f"process {rank}: {type(error).__name__}: {lines[0]}"
