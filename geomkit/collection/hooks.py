"""Watching a model run: which module was called on what, and what the loss says to each output.

A forward hook keeps a module's input; a hook on its output receives the output's gradient as soon as autograd has
it. Autograd skips every weight-gradient product, ``.grad`` is not touched, and the hooks are gone when the block ends.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

ClosedForm = Literal["linear", "transposed", "lookup", "scaled lookup"]

_CLOSED_FORMS: dict[str, ClosedForm] = {
    "torch.nn.modules.linear.Linear.forward": "linear",
    "torch.nn.modules.sparse.Embedding.forward": "lookup",
    "transformers.pytorch_utils.Conv1D.forward": "transposed",
    "transformers.models.falcon.modeling_falcon.FalconLinear.forward": "linear",
}
_LINEAR, _EMBEDDING = functional.linear, functional.embedding  # which somebody may replace
_SCALED_LOOKUP = re.compile(r"transformers\.models\..*ScaledWordEmbedding\.forward")
"""Of many models, all alike: the row times the module's ``embed_scale``."""


def closed_form(module: nn.Module) -> ClosedForm | None:
    """Return the closed form of a module's weight gradient, if its forward is one of those that have one.

    Known by the very function, not by the class: a subclass with a forward of its own may do anything.
    """
    forward = type(module).forward
    name = f"{forward.__module__}.{forward.__qualname__}"
    if functional.linear is not _LINEAR or functional.embedding is not _EMBEDDING:
        return None
    form = "scaled lookup" if _SCALED_LOOKUP.fullmatch(name) else _CLOSED_FORMS.get(name)
    if form is None or hasattr(forward, "__wrapped__") or not _is_at(forward):
        return None
    if "forward" in vars(module):  # replaced on the instance
        return None
    if torch.nn.modules.module._global_forward_hooks:  # noqa: SLF001 - they come before ours and may change the output
        return None
    if isinstance(module, nn.Embedding) and (module.scale_grad_by_freq or module.max_norm is not None):
        return None
    return form


def _is_at(function: Any) -> bool:
    """Tell whether a function is the one of its name: a wrapper takes the name of what it wraps."""
    found: Any = sys.modules.get(function.__module__)
    for part in function.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is function


@dataclass(eq=False)
class Call:
    """One call of a module that owns wanted parameters.

    Attributes:
        module: The module.
        parameters: Its own wanted parameters: local name (``"weight"``) to name in the model.
        form: The closed form of its weight gradient, if it has one.
        inputs: The positional arguments, detached.
        keywords: The keyword arguments, detached.
        outputs: Where each output tensor entered the autograd graph, ``None`` for one that needs no gradient.
        deltas: The gradient of the loss by each output, kept for modules without a closed form.
        handles: The hooks at the outputs.
        version: How often the input had been written to in place.
        starts: Whether nothing before the call needs a gradient, so that autograd must be asked for its outputs'.
        dtype: The type that autocast computes the module's product in, if it is on.
        product: The output, if it is to be kept and nothing but the weight times the input.
    """

    module: nn.Module
    parameters: dict[str, str]
    form: ClosedForm | None
    inputs: tuple[Any, ...]
    keywords: dict[str, Any]
    outputs: list[GradientEdge | None]
    starts: bool
    dtype: torch.dtype | None
    deltas: list[Tensor | None] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)
    version: int = 0
    product: Tensor | None = None
    product_version: int = 0

    @property
    def source(self) -> Tensor:
        """The input of a module with a closed form: its only tensor."""
        value: Tensor = self.inputs[0] if self.inputs else next(iter(self.keywords.values()))
        return value

    @property
    def overwritten(self) -> bool:
        """Whether the input was written to after the call."""
        return self.form is not None and self.source._version != self.version  # noqa: SLF001 - torch has no other

    def release(self) -> None:
        """Forget the input, whose gradient has been taken, and what the weight makes of it."""
        self.inputs, self.keywords, self.product = (), {}, None

    def keep_product(self, output: Tensor) -> None:
        """Keep W r of every position, if the output is that in full: no bias, and nothing rounded below fp32."""
        full = self.dtype is None and torch.finfo(output.dtype).bits >= 32
        if self.form == "linear" and getattr(self.module, "bias", None) is None and full:
            self.product, self.product_version = output.detach(), output._version  # noqa: SLF001

    def product_as_made(self) -> Tensor | None:
        """Return what was kept, unless it was written to after the call, as a residual sum in place does."""
        kept = self.product
        return None if kept is None or kept._version != self.product_version else kept  # noqa: SLF001

    def end(self) -> None:
        """Forget everything: the graph knows its hooks, the hooks the call, and no collector sees that circle."""
        self.release()
        for handle in self.handles:
            handle.remove()
        self.outputs, self.deltas, self.handles = [], [], []


Receiver = Callable[[Call, Tensor], None]


@dataclass
class Tape:
    """Every call recorded while :func:`recording` was open.

    Attributes:
        calls: The calls that need a gradient, in order.
        ran: Names of the parameters whose module was called at all.
        open: Whether calls are recorded; a checkpoint runs modules again during the backward pass.
        lasting: The storages of parameters and buffers.
        products: Whether calls keep what their weight makes of their input.
    """

    calls: list[Call] = field(default_factory=list)
    ran: set[str] = field(default_factory=set)
    open: bool = True
    lasting: frozenset[int] = frozenset()
    products: bool = False


@contextmanager
def recording(
    model: nn.Module, wanted: dict[str, str], receive: Receiver, *, spread: int = 1, products: bool = False
) -> Iterator[Tape]:
    """Record every call of the modules that own wanted parameters.

    Args:
        model: The model; no hook stays on it.
        wanted: Every name a wanted parameter goes by in the model, to the one name it is collected under.
        receive: Called during the backward pass with a call that has a closed form and its output's gradient.
        spread: Batch size. A table of positions is looked up once for all examples; its output is spread over the
            batch before it is added to theirs, so that each example's share can be told.
        products: See :class:`Tape`.

    Yields:
        The tape that fills while the model runs.
    """
    tape = Tape(lasting=frozenset(map(_storage, chain(model.parameters(), model.buffers()))), products=products)
    handles = []
    try:
        for path, module in model.named_modules():
            own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
            names = {local: f"{path}.{local}" if path else local for local in own}
            owned = {local: wanted[name] for local, name in names.items() if name in wanted}
            if owned:
                hook = partial(_record, tape, owned, own, receive, spread if _is_added(model, path) else 1)
                # First of all hooks: one of the user's may change the output.
                handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
        yield tape
    finally:
        for handle in handles:
            handle.remove()


def _is_added(model: nn.Module, path: str) -> bool:
    """Tell whether a module is a table of positions that is only ever added to the embedded tokens."""
    parent, _, name = path.rpartition(".")
    return name == "wpe" and type(model.get_submodule(parent)).__module__.startswith("transformers.models.")


def _record(
    tape: Tape,
    owned: dict[str, str],
    own: dict[str, nn.Parameter],
    receive: Receiver,
    spread: int,
    module: nn.Module,
    inputs: tuple[Any, ...],
    keywords: dict[str, Any],
    output: Any,
) -> Any:
    form = closed_form(module)
    if not own.keys() <= {"weight", "bias"} or any(getattr(module, local) is not own[local] for local in own):
        form = None  # more than the form knows of, or called with other values in their place
    spreads = form == "lookup" and isinstance(output, Tensor) and output.ndim == 3 and len(output) == 1 < spread
    if spreads:
        output = output.expand(spread, -1, -1)
        inputs, keywords = tree_map(
            lambda value: value.expand(spread, -1) if isinstance(value, Tensor) else value, (inputs, keywords)
        )
    outputs = _tensors([output])
    tape.ran.update(owned.values() if tape.open else ())
    # A leaf among the outputs is a parameter handed through, which the graph finds.
    if tape.open and any(leaf.requires_grad for leaf in outputs) and not any(map(_is_parameter, outputs)):
        call = Call(
            module,
            owned,
            form if len(outputs) == 1 else None,
            inputs=tuple(_detached(value, tape.lasting) for value in inputs),
            keywords={name: _detached(value, tape.lasting) for name, value in keywords.items()},
            # The edge, not the tensor: an in-place operation on the output later would move the tensor's own edge.
            outputs=[get_gradient_edge(leaf) if leaf.requires_grad else None for leaf in outputs],
            starts=not any(leaf.requires_grad for leaf in _tensors((*inputs, *keywords.values()))),
            dtype=_autocast_dtype(outputs[0].device.type),
            deltas=[None] * len(outputs),
        )
        call.version = call.source._version if call.form else 0  # noqa: SLF001
        if tape.products:
            call.keep_product(outputs[0])
        tape.calls.append(call)
        for place, edge in enumerate(call.outputs):
            if edge is not None and not call.starts:
                # Before the node, so after every hook on the tensor, which may change the gradient.
                handle = edge.node.register_prehook(partial(_hand_over_at, call, receive, place, edge.output_nr))
                call.handles.append(handle)
    return output if spreads else None


def _hand_over_at(call: Call, receive: Receiver, place: int, output: int, gradients: tuple[Tensor | None, ...]) -> None:
    hand_over(call, receive, place, gradients[output])


def hand_over(call: Call, receive: Receiver, place: int, delta: Tensor | None) -> None:
    """Give the gradient of one of a call's outputs to the receiver, or to the call if it has no closed form."""
    if delta is None:  # a function of the user's may say that there is no gradient
        return
    if call.form is None:
        call.deltas[place] = delta
    else:
        receive(call, delta)


def _is_parameter(value: Tensor) -> bool:
    return value.is_leaf and value.requires_grad


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors in some values; nearly all are tensors, which need no search."""
    leaves = [leaf for value in values for leaf in ([value] if isinstance(value, Tensor) else tree_leaves(value))]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _detached(value: Any, lasting: frozenset[int]) -> Any:
    """Detach tensors, and copy those that are a part of the model: training will change them."""
    if isinstance(value, Tensor):
        return value.detach().clone() if _storage(value) in lasting else value.detach()
    return tree_map(lambda leaf: _detached(leaf, lasting) if isinstance(leaf, Tensor) else leaf, value)


def _storage(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _autocast_dtype(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
