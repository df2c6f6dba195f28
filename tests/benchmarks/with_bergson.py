"""bergson's collector, where it is installed: its gradients and its own two-sided projection.

It was not made for processes without a GPU nor for one batch in memory; what is timed is the loop body of its
``CollectorComputer`` with an in-memory collector. Its worker freezes all weights but the embedding, which costs a tied
head its dense gradient; here the embedding's output needs a gradient, and the last norm, for it asks for a trainable
weight. The worker gives it ``model.base_model``, without the head; with the whole model it takes the head too, of a
tied head that part alone.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.agreement import Reference, error_of_samples
from tests.benchmarks.contender import Contender, Piece
from tests.benchmarks.workload import Workload

PROJECTION = 16


def prepare(workload: Workload, *, projection: int | None, head: bool = False) -> Sequence[Piece]:
    from bergson import GradientProcessor, IndexConfig, InMemoryCollector
    from bergson.collector.collector import fwd_bwd_factory
    from datasets import Dataset

    model = workload.copy()
    model.requires_grad_(False)
    model.base_model.norm.requires_grad_(True)
    model.enable_input_require_grads()
    rows = workload.input_ids.tolist()
    data = Dataset.from_dict({"input_ids": rows, "length": [len(row) for row in rows]})
    config = IndexConfig(run_path="unused", loss_reduction="mean", projection_dim=projection or 0)
    processor = GradientProcessor(projection_dim=projection)
    step = fwd_bwd_factory(config)
    seen = model if head else model.base_model
    collect = partial(InMemoryCollector, model=seen, data=data, cfg=config, processor=processor)
    return [Piece(partial(_run, collect, step, model, workload.input_ids))]


def _run(collect: Any, step: Any, model: Any, ids: Tensor) -> Any:
    collector = collect()
    with collector.with_batch(torch.ones_like(ids, dtype=torch.bool)):
        losses = step(model, ids, ids, {})
    collector.process_batch(list(range(len(ids))), losses=losses)
    collector.teardown()
    return collector


def _by_weight(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values of modules by the name of the module's weight, whether the collector saw the whole model or not."""
    return {
        f"{name if name == 'lm_head' or name.startswith('model.') else f'model.{name}'}.weight": values[name]
        for name in values
    }


def _error(collector: Any, workload: Workload, reference: Reference) -> float:
    """Compare with the reference, put through bergson's own projections if there are any."""
    place = (workload.device, workload.model.dtype)
    found = {name: torch.as_tensor(value) for name, value in _by_weight(collector.gradients).items()}
    samples = {name: value for name, value in reference.samples.items() if name in found}
    if collector.processor.projection_dim:
        names = _by_weight({name: name for name in collector.target_info})
        for weight, gradients in samples.items():
            rows, columns = gradients.shape[1:]
            left = collector.projection(names[weight], PROJECTION, rows, "left", *place).cpu().float()
            right = collector.projection(names[weight], PROJECTION, columns, "right", *place).cpu().float()
            samples[weight] = left @ gradients @ right.T
    return error_of_samples(found.get, Reference(samples, {}))


BERGSON = (
    Contender("bergson: whole gradients, without the head", partial(prepare, projection=None), _error),
    Contender("bergson: 16×16, with the head", partial(prepare, projection=PROJECTION, head=True), _error),
    Contender("bergson: 16×16, without the head", partial(prepare, projection=PROJECTION), _error),
)
