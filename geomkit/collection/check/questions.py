"""The checks of :func:`geomkit.check_collection`, a function each.

Most checks compare with ``batched``: the gradients of all examples, collected in one batch.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from geomkit.collection.check.comparing import Comparison, Difference, Gradients
from geomkit.collection.check.subject import ATTENTION, Subject
from geomkit.collection.check.verdicts import Check
from geomkit.collection.streaming import prepared
from geomkit.collection.target import Target
from geomkit.errors import CollectionError
from geomkit.gradients.gradient_set import Coverage
from geomkit.inputs.tokens import Tokens
from geomkit.utils.display import human_bytes
from geomkit.utils.precision import no_autocast

_GROUP_ENTRIES = 2**28  # entries of the gradients that autograd computes at a time: 1 GiB in fp32
_PAD_RIGHT = "pad on the right, as geomkit always does; the model does not heed position_ids"
_SMALLEST_COSINE = 0.999  # over all parameters; a smaller cosine fails, however small the differences

_COMPARED = {
    "repeatable": "a batch, again",
    "complete": "the sum over a batch, autograd's own",
    "padding right": "an example padded on the right, alone without padding",
    "padding left": "an example padded on the left with position_ids, alone without padding",
    "batch": "an example in a batch, alone with as much padding",
    "attention": "the model's attention, eager",
    "dtype": "the model's type, fp32",
}


def repeatable(subject: Subject, batched: Sequence[Gradients]) -> Check:
    """Check that the same call gives the same gradients again."""
    repeated = subject.compared(subject.gradients(subject.batch), batched)
    if repeated.identical:
        return _judged("repeatable", subject, repeated, note="bit for bit the same")
    # The same seed tells random numbers of the model from kernels that are not deterministic.
    torch.manual_seed(0)
    seeded = subject.gradients(subject.batch)
    torch.manual_seed(0)
    same_seed = subject.compared(subject.gradients(subject.batch), seeded)
    if same_seed.relative <= subject.tolerance < repeated.relative:
        advice = "the model draws random numbers in eval mode, such as dropout that is always on; switch that off"
        return _judged("repeatable", subject, repeated, advice=advice)
    advice = (
        "a kernel does not give the same twice; call torch.use_deterministic_algorithms(True), with "
        "CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment on a GPU"
    )
    note = "not bit for bit the same, which torch.use_deterministic_algorithms(True) asks for"
    return _judged("repeatable", subject, repeated, advice=advice, note=note)


def all_skipped_but(name_of_result: str) -> list[Check]:
    """Return every check except the named check as skipped: gradients that are not repeatable cannot be compared."""
    reason = "the same call gives other gradients each time, so that nothing can be compared"
    return [_skipped(name, reason) for name in _COMPARED if name != name_of_result]


def complete(subject: Subject) -> tuple[Check, Coverage]:
    """Check that the gradients of a batch equal autograd's, and return which parameters have a gradient."""
    summed, coverage = subject.summed()
    target, comparison = subject.target, subject.comparison()
    for names in _parameter_groups(target):
        expected = target.by_autograd(subject.batch, names)
        subject.tick()
        comparison.add(None, {name: summed[name] for name in names if name in summed}, expected)
    advice = (
        "something changes this gradient that geomkit does not see, such as a weight of a tensor subclass; load "
        "plain weights, or leave the parameter out with layers="
    )
    return _judged("complete", subject, comparison.worst(), advice=advice), coverage


def padding_and_batch(subject: Subject, batched: Sequence[Gradients]) -> list[Check]:
    """Check that an example has the same gradients alone, with padding on either side, and in a batch.

    The gradients of the batch are in memory, and the gradients of one example at a time.
    """
    right, left, batch = (subject.comparison() for _ in range(3))
    left_check: Check | None = None
    for example, row in enumerate(subject.rows):
        (alone,) = subject.gradients(subject.single(row))
        (padded,) = subject.gradients(subject.single(row, min_length=subject.length))
        right.add(example, padded, alone)
        batch.add(example, batched[example], padded)
        left_check = left_check or _add_padded_left(subject, left, example, row, alone)
    advice = "give tokens_per_batch=1: one example at a time"
    return [
        _judged("padding right", subject, right.worst(), advice=f"{advice}, without padding"),
        left_check or _judged("padding left", subject, left.worst(), advice=_PAD_RIGHT),
        _judged("batch", subject, batch.worst(), advice=f"{advice}, beside no other"),
    ]


def _add_padded_left(
    subject: Subject, comparison: Comparison, example: int, row: Tokens, alone: Gradients
) -> Check | None:
    """Add an example with padding on the left to a comparison; return the final check if the model fails to run."""
    try:
        (padded,) = subject.gradients(subject.single(row, min_length=subject.length, side="left"))
        comparison.add(example, padded, alone)
    except CollectionError as error:
        return _failed("padding left", str(error), subject.tolerance, _PAD_RIGHT)
    except TypeError as error:
        return _skipped("padding left", f"the model takes no positions: {_first_line(error)}")
    return None


def attention(subject: Subject, batched: Sequence[Gradients]) -> Check:
    """Check that the attention kernel of the model gives the same gradients as eager attention."""
    if subject.attention == "eager":
        return _skipped("attention", "the model's attention is eager already")
    if not subject.attention or not getattr(subject.model, "_can_set_attn_implementation", bool)():
        return _skipped("attention", "the model offers no choice of attention")
    try:
        with _eager(subject.model):
            eager = subject.gradients(subject.batch)
    except (CollectionError, ValueError) as error:
        return _skipped("attention", f"eager attention does not run here: {_first_line(error)}")
    advice = 'load the model with attn_implementation="eager", or call model.set_attn_implementation("eager")'
    if subject.dtype.itemsize < 4:  # below fp32, either of the two kernels may be the inexact one
        advice = f"load the model in float32 and check again; if it fails there, too, {advice}"
    return _judged("attention", subject, subject.compared(batched, eager), advice=advice)


def dtype(subject: Subject, batched: Sequence[Gradients]) -> Check:
    """Check that the dtype of the model gives the same gradients as fp32."""
    if subject.dtype.itemsize >= 4:
        return _skipped("dtype", f"the model computes in {str(subject.dtype).removeprefix('torch.')} already")
    parameters = list(subject.model.parameters())
    if not all(parameter.is_floating_point() for parameter in parameters):
        return _skipped("dtype", "the weights are quantised, so that there is no fp32 copy of them")
    if all(parameter.dtype.itemsize >= 4 for parameter in parameters):
        with no_autocast(subject.device):
            exact = subject.gradients(subject.batch)
        advice, note = "leave torch.autocast while gradients are collected", "autocast against the same without"
        return _judged("dtype", subject, subject.compared(batched, exact), advice=advice, note=note)
    size = human_bytes(4 * sum(parameter.numel() for parameter in parameters))
    try:
        twin = copy.deepcopy(subject.model).float()
    except (RuntimeError, TypeError) as error:
        return _skipped("dtype", f"no fp32 copy, which needs {size}: {_first_line(error)}")
    try:
        with no_autocast(subject.device), prepared(twin, subject.selection) as target:
            exact = subject.gradients(subject.batch, target)
    except torch.OutOfMemoryError as error:
        return _skipped("dtype", f"no fp32 copy, which needs {size}: {_first_line(error)}")
    advice = 'load the model in float32 (dtype="float32")'
    note = f"the fp32 copy took {size}"
    return _judged("dtype", subject, subject.compared(batched, exact), advice=advice, note=note)


def _judged(name: str, subject: Subject, difference: Difference, *, advice: str = "", note: str = "") -> Check:
    """Return the check with the verdict that follows from a difference."""
    fails = not (difference.relative <= subject.tolerance and difference.cosine >= _SMALLEST_COSINE)
    return Check(
        name=name,
        compared=_COMPARED[name],
        verdict="fails" if fails else "ok",
        difference=difference.relative,
        cosine=difference.cosine,
        tolerance=subject.tolerance,
        parameter=difference.parameter if difference.relative else "",
        example=difference.example if difference.relative else None,
        note=note,
        advice=advice if fails else "",
    )


def _skipped(name: str, reason: str) -> Check:
    return Check(name, _COMPARED[name], "skipped", float("nan"), float("nan"), float("nan"), note=reason)


def _failed(name: str, reason: str, tolerance: float, advice: str) -> Check:
    return Check(name, _COMPARED[name], "fails", float("inf"), float("nan"), tolerance, note=reason, advice=advice)


def _parameter_groups(target: Target) -> Iterator[list[str]]:
    """Yield the names of parameters in groups of at most :data:`_GROUP_ENTRIES` entries, or one larger parameter."""
    names: list[str] = []
    entries = 0
    for name, parameter in target.parameters.items():
        if names and entries + parameter.numel() > _GROUP_ENTRIES:
            yield names
            names, entries = [], 0
        names.append(name)
        entries += parameter.numel()
    yield names


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Make a model of transformers use eager attention inside the block."""
    configurations = [getattr(module, "config", None) for module in (model, *model.modules())]
    distinct = {id(config): config for config in configurations if hasattr(config, ATTENTION)}
    # From the outermost to the innermost: setting the attention of a configuration also sets it in those inside.
    implementations = [(config, getattr(config, ATTENTION)) for config in distinct.values()]
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        for config, implementation in implementations:
            setattr(config, ATTENTION, implementation)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
