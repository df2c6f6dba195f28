"""The questions that :func:`geomkit.check_collection` asks about gradients, each a function of the subject.

What most of them compare with is ``together``: the gradients of all examples, from one batch.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from geomkit.collection.check.comparing import Comparison, Difference, Gradients
from geomkit.collection.check.subject import ATTENTION, Subject
from geomkit.collection.check.verdicts import Check
from geomkit.collection.streaming import watched
from geomkit.collection.target import Target
from geomkit.errors import CollectionError
from geomkit.gradients.gradient_set import Coverage
from geomkit.inputs.tokens import Tokens
from geomkit.utils.display import human_bytes
from geomkit.utils.precision import no_autocast

_GROUP = 2**28  # entries of the gradients that autograd forms at a time: a GiB in fp32
_PAD_RIGHT = "pad on the right, as geomkit always does; the model does not heed position_ids"
_LEAST_COSINE = 0.999  # of the whole gradients, however small the differences

_COMPARED = {
    "repeatable": "a batch, again",
    "complete": "the sum over a batch, autograd's own",
    "padding right": "an example padded on the right, alone without padding",
    "padding left": "an example padded on the left with position_ids, alone without padding",
    "batch": "an example in a batch, alone with as much padding",
    "attention": "the model's attention, eager",
    "dtype": "the model's type, fp32",
}


def repeatable(subject: Subject, together: Sequence[Gradients]) -> Check:
    """Does the same call give the same gradients again?"""
    again = subject.compared(subject.gradients(subject.batch), together)
    if again.identical:
        return _judged("repeatable", subject, again, note="bit for bit the same")
    torch.manual_seed(0)
    seeded = subject.gradients(subject.batch)
    torch.manual_seed(0)
    same_seed = subject.compared(subject.gradients(subject.batch), seeded)
    if same_seed.relative <= subject.tolerance < again.relative:
        advice = "the model draws random numbers in eval mode, such as dropout that is always on; switch that off"
        return _judged("repeatable", subject, again, advice=advice)
    advice = (
        "a kernel does not give the same twice; call torch.use_deterministic_algorithms(True), with "
        "CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment on a GPU"
    )
    note = "not bit for bit the same, which torch.use_deterministic_algorithms(True) asks for"
    return _judged("repeatable", subject, again, advice=advice, note=note)


def unanswered(asked: str) -> list[Check]:
    """Skip all questions but one: where gradients are not repeatable, nothing can be compared."""
    why = "the same call gives other gradients each time, so that nothing can be compared"
    return [_skipped(name, why) for name in _COMPARED if name != asked]


def complete(subject: Subject) -> tuple[Check, Coverage]:
    """Is the sum over a batch autograd's own, for every parameter? And which of them have a part in it?"""
    summed, coverage = subject.summed()
    target, comparison = subject.target, subject.comparison()
    for names in _groups(target):
        expected = target.by_autograd(subject.batch, names)
        subject.tick()
        comparison.add(None, {name: summed[name] for name in names if name in summed}, expected)
    advice = (
        "something changes this gradient that geomkit does not see, such as a weight of a tensor subclass; load "
        "plain weights, or leave the parameter out with layers="
    )
    return _judged("complete", subject, comparison.worst(), advice=advice), coverage


def padding_and_batch(subject: Subject, together: Sequence[Gradients]) -> list[Check]:
    """Is an example's gradient the same alone, with padding on either side, and beside others?

    One example's gradients at a time are held beside those of the batch.
    """
    right, left, batch = (subject.comparison() for _ in range(3))
    unlike: Check | None = None
    for example, row in enumerate(subject.rows):
        (alone,) = subject.gradients(subject.single(row))
        (padded,) = subject.gradients(subject.single(row, min_length=subject.length))
        right.add(example, padded, alone)
        batch.add(example, together[example], padded)
        unlike = unlike or _padded_left(subject, left, example, row, alone)
    one = "give tokens_per_batch=1: one example at a time"
    return [
        _judged("padding right", subject, right.worst(), advice=f"{one}, without padding"),
        unlike or _judged("padding left", subject, left.worst(), advice=_PAD_RIGHT),
        _judged("batch", subject, batch.worst(), advice=f"{one}, beside no other"),
    ]


def _padded_left(subject: Subject, comparison: Comparison, example: int, row: Tokens, alone: Gradients) -> Check | None:
    """Compare an example padded on the left; a model that this breaks has its answer at once."""
    try:
        (moved,) = subject.gradients(subject.single(row, min_length=subject.length, side="left"))
        comparison.add(example, moved, alone)
    except CollectionError as error:
        return _failed("padding left", str(error), subject.tolerance, _PAD_RIGHT)
    except TypeError as error:
        return _skipped("padding left", f"the model takes no positions: {_first_line(error)}")
    return None


def attention(subject: Subject, together: Sequence[Gradients]) -> Check:
    """Does the model's attention kernel give what the plain one gives?"""
    if subject.attention == "eager":
        return _skipped("attention", "the model's attention is eager already")
    if not subject.attention or not getattr(subject.model, "_can_set_attn_implementation", bool)():
        return _skipped("attention", "the model offers no choice of attention")
    try:
        with _eager(subject.model):
            plain = subject.gradients(subject.batch)
    except (CollectionError, ValueError) as error:
        return _skipped("attention", f"eager attention does not run here: {_first_line(error)}")
    advice = 'load the model with attn_implementation="eager", or call model.set_attn_implementation("eager")'
    if subject.dtype.itemsize < 4:  # in bf16, either of the two may be the one that is off
        advice = f"load the model in float32 and check again; if it fails there, too, {advice}"
    return _judged("attention", subject, subject.compared(together, plain), advice=advice)


def dtype(subject: Subject, together: Sequence[Gradients]) -> Check:
    """Does the model's type give what fp32 gives?"""
    if subject.dtype.itemsize >= 4:
        return _skipped("dtype", f"the model computes in {str(subject.dtype).removeprefix('torch.')} already")
    parameters = list(subject.model.parameters())
    if not all(parameter.is_floating_point() for parameter in parameters):
        return _skipped("dtype", "the weights are quantised, so that there is no fp32 copy of them")
    if all(parameter.dtype.itemsize >= 4 for parameter in parameters):
        with no_autocast(subject.device):
            exact = subject.gradients(subject.batch)
        advice, note = "leave torch.autocast while gradients are collected", "autocast against the same without"
        return _judged("dtype", subject, subject.compared(together, exact), advice=advice, note=note)
    size = human_bytes(4 * sum(parameter.numel() for parameter in parameters))
    try:
        twin = copy.deepcopy(subject.model).float()
    except (RuntimeError, TypeError) as error:
        return _skipped("dtype", f"no fp32 copy, which needs {size}: {_first_line(error)}")
    try:
        with no_autocast(subject.device), watched(twin, subject.chosen) as target:
            exact = subject.gradients(subject.batch, target)
    except torch.OutOfMemoryError as error:
        return _skipped("dtype", f"no fp32 copy, which needs {size}: {_first_line(error)}")
    advice = 'load the model in float32 (dtype="float32")'
    note = f"the fp32 copy took {size}"
    return _judged("dtype", subject, subject.compared(together, exact), advice=advice, note=note)


def _judged(name: str, subject: Subject, difference: Difference, *, advice: str = "", note: str = "") -> Check:
    fails = not (difference.relative <= subject.tolerance and difference.cosine >= _LEAST_COSINE)
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


def _skipped(name: str, why: str) -> Check:
    return Check(name, _COMPARED[name], "skipped", float("nan"), float("nan"), float("nan"), note=why)


def _failed(name: str, why: str, tolerance: float, advice: str) -> Check:
    return Check(name, _COMPARED[name], "fails", float("inf"), float("nan"), tolerance, note=why, advice=advice)


def _groups(target: Target) -> Iterator[list[str]]:
    """Divide the parameters into groups of about :data:`_GROUP` entries, at least one in each."""
    names: list[str] = []
    held = 0
    for name, parameter in target.parameters.items():
        if names and held + parameter.numel() > _GROUP:
            yield names
            names, held = [], 0
        names.append(name)
        held += parameter.numel()
    yield names


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Let a model of transformers run with eager attention inside the block."""
    modules = [model, *model.modules()]
    configs = {id(each.config): each.config for each in modules if hasattr(getattr(each, "config", None), ATTENTION)}
    # The outermost first: setting one sets those inside it, too.
    found = [(config, getattr(config, ATTENTION)) for config in configs.values()]
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        for config, implementation in found:
            setattr(config, ATTENTION, implementation)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
