"""bergson's collector, where it is installed: its gradients and its own two-sided projection.

It was not made for processes without a GPU nor for one batch in memory; what is timed is the loop body of its
``CollectorComputer`` with an in-memory collector, set up as its worker does: all weights frozen, embeddings trained.
It sees ``model.base_model`` only, so the head is left out.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.agreement import Reference, error_of_samples
from tests.benchmarks.contender import Contender, Piece
from tests.benchmarks.workload import Workload

PROJECTION = 16


def prepare(workload: Workload, *, projection: int | None) -> Sequence[Piece]:
    from bergson import GradientProcessor, IndexConfig, InMemoryCollector
    from bergson.collector.collector import fwd_bwd_factory
    from datasets import Dataset

    model = workload.copy()
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    rows = workload.input_ids.tolist()
    data = Dataset.from_dict({"input_ids": rows, "length": [len(row) for row in rows]})
    config = IndexConfig(run_path="unused", loss_reduction="mean", projection_dim=projection or 0)
    processor = GradientProcessor(projection_dim=projection)
    step = fwd_bwd_factory(config)
    collect = partial(InMemoryCollector, model=model.base_model, data=data, cfg=config, processor=processor)
    return [Piece(partial(_run, collect, step, model, workload.input_ids))]


def _run(collect: Any, step: Any, model: Any, ids: Tensor) -> Any:
    collector = collect()
    with collector.with_batch(torch.ones_like(ids, dtype=torch.bool)):
        losses = step(model, ids, ids, {})
    collector.process_batch(list(range(len(ids))), losses=losses)
    collector.teardown()
    return collector


def _stacked(collector: Any) -> dict[str, Tensor]:
    return {f"model.{name}.weight": torch.as_tensor(value) for name, value in collector.gradients.items()}


def _error(collector: Any, _workload: Workload, reference: Reference) -> float:
    return error_of_samples(_stacked(collector).get, reference)


def _projected_error(collector: Any, workload: Workload, reference: Reference) -> float:
    """Compare with the reference put through bergson's own projections."""
    samples = {}
    for name, (_, (rows, columns), _) in collector.target_info.items():
        full = f"model.{name}.weight"
        if full in reference.samples:
            place = (workload.device, workload.model.dtype)
            left = collector.projection(name, PROJECTION, rows, "left", *place).cpu().float()
            right = collector.projection(name, PROJECTION, columns, "right", *place).cpu().float()
            samples[full] = left @ reference.samples[full] @ right.T
    return error_of_samples(_stacked(collector).get, Reference(samples, {}))


BERGSON = (
    Contender("bergson, whole gradients", partial(prepare, projection=None), _error),
    Contender(
        f"bergson, projected to {PROJECTION}×{PROJECTION}", partial(prepare, projection=PROJECTION), _projected_error
    ),
)
