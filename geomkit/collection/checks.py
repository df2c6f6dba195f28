"""Whether gradients can be trusted on this model and machine, measured on a few examples."""

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from geomkit._display import human_bytes
from geomkit.algebra import Accumulator
from geomkit.batching import Batch, collate
from geomkit.collect import coverage_of
from geomkit.collection.comparing import (
    Comparison,
    Difference,
    Gradients,
    autograd_gradients,
    compare_one,
    example_gradients,
)
from geomkit.collection.passes import run_pass
from geomkit.collection.selection import Selection, selection
from geomkit.collection.streaming import padded_length, watched
from geomkit.collection.target import Target
from geomkit.collection.verdicts import Check, CollectionCheck
from geomkit.errors import CollectionError, DataError
from geomkit.gradients import Coverage
from geomkit.layer_gradient import LayerGradient
from geomkit.names import Kind
from geomkit.state import no_autocast
from geomkit.tokens import AssistantMask, Tokens, encode, pad_id

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXAMPLES = 4
"""How many examples are enough: each is compared in every parameter."""

_ATTENTION = "_attn_implementation"  # where a configuration of transformers keeps it
_PADDING = 8  # positions that are added to the longest example; the shorter ones get more
_GROUP = 2**28  # entries of the gradients that autograd forms at a time: a GiB in fp32
_ROUNDING = {2: (1e-1, 1e-2), 4: (1e-3, 1e-3), 8: (1e-4, 1e-3)}
"""By the bytes of a number that the model computes in: the worst difference that rounding leaves in any parameter, and
the share of the whole gradient below which a parameter's own is taken for noise. Tiny models of fourteen families had
at most 2e-5 in fp32 (the organism 2e-4) and 0.11 in bf16, where a ReLU at its kink had 0.5; eager attention takes
softmax in fp32 whatever the type."""

_NOT_THE_SAME = "not bit for bit the same, which torch.use_deterministic_algorithms(True) asks for"
_LEAST_COSINE = 0.999  # of the whole gradients, however small the differences


def check_collection(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: "Dataset",
    *,
    count: int = EXAMPLES,
    layers: str | Sequence[str] = "*",
    kinds: Kind | Collection[Kind] | None = None,
    indices: int | Collection[int] | None = None,
    assistant_mask: AssistantMask = "template",
    max_length: int | None = None,
    progress: bool = True,
) -> CollectionCheck:
    """Measure whether gradients depend on what they should not, and say what to change.

    Seven questions: does the same call give the same gradients again (``repeatable``); are they autograd's own, for
    every parameter (``complete``); are an example's the same alone and padded (``padding right``, as geomkit pads, and
    ``padding left``, as generation does), alone and beside others (``batch``), with the model's attention kernel and
    with the plain one (``attention``), in the model's type and in fp32 (``dtype``). A difference fails where it is
    larger than rounding in the model's type explains.

    The model is left as found, also after an exception. Memory is that of ``count`` examples' own gradients, and for
    a model below fp32 a copy in fp32, 4 bytes per parameter; where that does not fit, ``dtype`` is skipped.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        examples: Rows with a column ``messages``, of which the first few are used.
        count: How many, at least 2.
        layers: See :func:`geomkit.collect_gradients`, as for all that follow.
        kinds: Kinds of module.
        indices: Decoder layers.
        assistant_mask: How assistant tokens are found.
        max_length: Cut longer examples to this many tokens.
        progress: Show a bar, in forward and backward passes.

    Returns:
        A :class:`~geomkit.collection.verdicts.CollectionCheck`; ``print`` it.

    Raises:
        DataError: If there are fewer than 2 examples, or they cannot be encoded.
        CollectionError: If no trainable parameter matches, or a loss or gradient is not finite to begin with.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> found = check_collection(model, tokenizer, gk.load_examples("safety"), kinds="mlp", progress=False)
        >>> found.ok, found["padding right"].verdict, found["dtype"].note
        (True, 'ok', 'the model computes in float32 already')
    """
    from tqdm.auto import tqdm

    number = min(count, len(examples))
    if number < 2:
        raise DataError(
            f"expected at least 2 examples, of which one can be alone or beside the other, found {number}; "
            "give more examples, or a larger count"
        )
    few = examples.select(range(number))
    rows = encode(tokenizer, few, assistant_mask=assistant_mask, max_length=max_length)
    chosen = selection(layers, kinds, indices)
    with watched(model, chosen) as target, tqdm(desc="checks", unit="pass", disable=not progress) as bar:
        checker = _Checker(target, chosen, rows, pad_id(tokenizer), bar.update)
        checks = checker.run()
        return CollectionCheck({check.name: check for check in checks}, checker.coverage, checker.setting())


class _Checker:
    """Runs the passes and judges what they give."""

    def __init__(
        self, target: Target, chosen: Selection, rows: Sequence[Tokens], pad: int, tick: Callable[[], Any]
    ) -> None:
        self.target, self.chosen, self.rows, self.pad, self.tick = target, chosen, rows, pad, tick
        self.model = target.model
        self.device = next(self.model.parameters()).device
        longest = max(map(len, rows)) + _PADDING
        self.length = padded_length([longest] * len(rows))
        self.batch = collate(rows, pad, least=self.length).to(self.device)
        self.dtype = _computed_in(self.model, self.device)
        self.tolerance, self.floor = _ROUNDING[max(self.dtype.itemsize, 2)]
        self.coverage: Coverage

    def setting(self) -> str:
        """Say what was checked on what."""
        attention = getattr(getattr(self.model, "config", None), _ATTENTION, None)
        parts = [type(self.model).__name__, str(self.dtype).removeprefix("torch."), attention, str(self.device)]
        tokens = sum(map(len, self.rows))
        return f"{', '.join(filter(None, parts))}; {len(self.rows)} examples, {tokens} tokens"

    def run(self) -> list[Check]:
        together = self._gradients(self.batch)
        repeatable = self._repeatable(together)
        if repeatable.verdict == "fails":
            self.coverage = self._sum()[1]
            unknown = "the same call gives other gradients each time, so that nothing can be compared"
            return [repeatable, *(_skipped(name, unknown) for name in _COMPARED if name != "repeatable")]
        return [
            repeatable,
            self._complete(),
            *self._padding_and_batch(together),
            self._attention(together),
            self._dtype(together),
        ]

    # ------------------------------------------------------------------------------------------------- the checks

    def _repeatable(self, together: list[Gradients]) -> Check:
        again = self._compared(self._gradients(self.batch), together)
        if again.identical:
            return self._judged("repeatable", again, note="bit for bit the same")
        torch.manual_seed(0)
        seeded = self._gradients(self.batch)
        torch.manual_seed(0)
        drawn = self._compared(self._gradients(self.batch), seeded).relative <= self.tolerance < again.relative
        if drawn:
            advice = "the model draws random numbers in eval mode, such as dropout that is always on; switch that off"
            return self._judged("repeatable", again, advice=advice)
        advice = (
            "a kernel does not give the same twice; call torch.use_deterministic_algorithms(True), with "
            "CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment on a GPU"
        )
        return self._judged("repeatable", again, advice=advice, note=_NOT_THE_SAME)

    def _complete(self) -> Check:
        found, self.coverage = self._sum()
        comparison = Comparison(self.floor)
        for names in _groups(self.target):
            expected = autograd_gradients(self.target, self.batch, names)
            self.tick()
            compare_one(comparison, self.target, None, {n: found[n] for n in names if n in found}, expected)
        advice = (
            "something changes this gradient that geomkit does not see, such as a weight of a tensor subclass; load "
            "plain weights, or leave the parameter out with layers="
        )
        return self._judged("complete", comparison.worst(), advice=advice)

    def _padding_and_batch(self, together: list[Gradients]) -> list[Check]:
        """Hold one example's gradients at a time beside those of the batch."""
        right, left, batch = (Comparison(self.floor) for _ in range(3))
        unlike: Check | None = None
        aside = "pad on the right, as geomkit always does; the model does not heed position_ids"
        for example, row in enumerate(self.rows):
            (alone,) = self._gradients(self._single(row))
            (padded,) = self._gradients(self._single(row, least=self.length))
            compare_one(right, self.target, example, padded, alone)
            compare_one(batch, self.target, example, together[example], padded)
            if unlike is None:
                try:
                    (moved,) = self._gradients(self._single(row, least=self.length, side="left"))
                    compare_one(left, self.target, example, moved, alone)
                except CollectionError as error:
                    unlike = _failed("padding left", str(error), self.tolerance, aside)
                except TypeError as error:
                    unlike = _skipped("padding left", f"the model takes no positions: {_first_line(error)}")
        one = "give tokens_per_batch=1: one example at a time"
        return [
            self._judged("padding right", right.worst(), advice=f"{one}, without padding"),
            unlike or self._judged("padding left", left.worst(), advice=aside),
            self._judged("batch", batch.worst(), advice=f"{one}, beside no other"),
        ]

    def _attention(self, together: list[Gradients]) -> Check:
        implementation = getattr(getattr(self.model, "config", None), _ATTENTION, None)
        if implementation == "eager":
            return _skipped("attention", "the model's attention is eager already")
        if not implementation or not getattr(self.model, "_can_set_attn_implementation", bool)():
            return _skipped("attention", "the model offers no choice of attention")
        try:
            with _eager(self.model):
                plain = self._gradients(self.batch)
        except (CollectionError, ValueError) as error:
            return _skipped("attention", f"eager attention does not run here: {_first_line(error)}")
        advice = 'load the model with attn_implementation="eager", or call model.set_attn_implementation("eager")'
        if self.dtype.itemsize < 4:  # in bf16, either of the two may be the one that is off
            advice = f"load the model in float32 and check again; if it fails there, too, {advice}"
        return self._judged("attention", self._compared(together, plain), advice=advice)

    def _dtype(self, together: list[Gradients]) -> Check:
        if self.dtype.itemsize >= 4:
            return _skipped("dtype", f"the model computes in {str(self.dtype).removeprefix('torch.')} already")
        parameters = list(self.model.parameters())
        if not all(parameter.is_floating_point() for parameter in parameters):
            return _skipped("dtype", "the weights are quantised, so that there is no fp32 copy of them")
        if all(parameter.dtype.itemsize >= 4 for parameter in parameters):
            with no_autocast(self.device):
                exact = self._gradients(self.batch)
            advice, note = "leave torch.autocast while gradients are collected", "autocast against the same without"
            return self._judged("dtype", self._compared(together, exact), advice=advice, note=note)
        size = human_bytes(4 * sum(parameter.numel() for parameter in parameters))
        try:
            twin = _in_fp32(self.model)
            with no_autocast(self.device), watched(twin, self.chosen) as target:
                exact = self._gradients(self.batch, target)
        except (torch.OutOfMemoryError, _NoCopyError) as error:
            return _skipped("dtype", f"no fp32 copy, which needs {size}: {_first_line(error)}")
        advice = 'load the model in float32 (dtype="float32")'
        return self._judged("dtype", self._compared(together, exact), advice=advice, note=f"the fp32 copy took {size}")

    # ------------------------------------------------------------------------------------------------- their means

    def _gradients(self, batch: Batch, target: Target | None = None) -> list[Gradients]:
        self.tick()
        return list(example_gradients(target or self.target, batch))

    def _sum(self) -> tuple[dict[str, LayerGradient], Coverage]:
        sums = {name: Accumulator() for name in self.target.parameters}
        seen: set[str] = set()

        def keep(name: str, part: LayerGradient) -> None:
            sums[name].add(part)
            seen.add(name)

        run_pass(self.target, self.batch, reduction="example", whole=keep)
        self.tick()
        return {name: sums[name].total() for name in sums if name in seen}, coverage_of(self.target, seen)

    def _compared(self, found: Sequence[Gradients], expected: Sequence[Gradients]) -> Difference:
        comparison = Comparison(self.floor)
        for example, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            compare_one(comparison, self.target, example, ours, theirs)
        return comparison.worst()

    def _single(self, row: Tokens, *, least: int = 0, side: Literal["right", "left"] = "right") -> Batch:
        return collate([row], self.pad, least=least, side=side).to(self.device)

    def _judged(self, name: str, difference: Difference, *, advice: str = "", note: str = "") -> Check:
        fails = not (difference.relative <= self.tolerance and difference.cosine >= _LEAST_COSINE)
        return Check(
            name=name,
            compared=_COMPARED[name],
            verdict="fails" if fails else "ok",
            difference=difference.relative,
            cosine=difference.cosine,
            tolerance=self.tolerance,
            parameter=difference.parameter if difference.relative else "",
            example=difference.example if difference.relative else None,
            note=note,
            advice=advice if fails else "",
        )


_COMPARED = {
    "repeatable": "a batch, again",
    "complete": "the sum over a batch, autograd's own",
    "padding right": "an example padded on the right, alone without padding",
    "padding left": "an example padded on the left with position_ids, alone without padding",
    "batch": "an example in a batch, alone with as much padding",
    "attention": "the model's attention, eager",
    "dtype": "the model's type, fp32",
}


def _skipped(name: str, why: str) -> Check:
    return Check(name, _COMPARED[name], "skipped", float("nan"), float("nan"), float("nan"), note=why)


def _failed(name: str, why: str, tolerance: float, advice: str) -> Check:
    return Check(name, _COMPARED[name], "fails", float("inf"), float("nan"), tolerance, note=why, advice=advice)


def _computed_in(model: nn.Module, device: torch.device) -> torch.dtype:
    """Return the least precise type that products are computed in."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return min((parameter.dtype for parameter in model.parameters()), key=lambda dtype: dtype.itemsize)


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
    configs = {id(each.config): each.config for each in modules if hasattr(getattr(each, "config", None), _ATTENTION)}
    # The outermost first: setting one sets those inside it, too.
    found = [(config, getattr(config, _ATTENTION)) for config in configs.values()]
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        for config, implementation in found:
            setattr(config, _ATTENTION, implementation)


class _NoCopyError(Exception):
    """A model that there is no memory to copy, or that cannot be copied."""


def _in_fp32(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model).float()
    except (RuntimeError, TypeError) as error:
        raise _NoCopyError(_first_line(error)) from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
