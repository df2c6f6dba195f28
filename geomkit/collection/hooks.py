"""Recording of module calls: the input of each module, and the gradient of the loss with respect to its output.

A forward hook keeps the input of a module. A hook in the autograd graph receives the gradient of the loss with respect
to the output as soon as the backward pass has computed it. From the two follows the gradient of the weight, so that
autograd need not compute weight gradients. ``.grad`` is not written, and all hooks are removed when the block ends.
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
"""How the output follows from weight W and input: W x, Wᵀ x, row i of W, or a constant times row i of W."""

_CLOSED_FORMS: dict[str, ClosedForm] = {
    "torch.nn.modules.linear.Linear.forward": "linear",
    "torch.nn.modules.sparse.Embedding.forward": "lookup",
    "transformers.pytorch_utils.Conv1D.forward": "transposed",
    "transformers.models.falcon.modeling_falcon.FalconLinear.forward": "linear",
}
_LINEAR, _EMBEDDING = functional.linear, functional.embedding  # to detect whether these are replaced later
_SCALED_LOOKUP = re.compile(r"transformers\.models\..*ScaledWordEmbedding\.forward")
"""Forward functions of embeddings that multiply a row by the module's ``embed_scale``; many models have their own."""


def forward_form(module: nn.Module) -> ClosedForm | None:
    """Return the closed form of the forward function of a module's class, or ``None`` if none is known.

    A module is recognised by its forward function, not by its class, because a subclass may have another forward.
    """
    if isinstance(module, nn.Embedding) and (module.scale_grad_by_freq or module.max_norm is not None):
        return None
    forward = type(module).forward
    name = f"{forward.__module__}.{forward.__qualname__}"
    form = "scaled lookup" if _SCALED_LOOKUP.fullmatch(name) else _CLOSED_FORMS.get(name)
    if form is None or hasattr(forward, "__wrapped__") or not _is_importable_by_its_name(forward):
        return None
    return form


def closed_form(module: nn.Module) -> ClosedForm | None:
    """Return the closed form of a module, or ``None`` if its weight gradient has no known closed form."""
    if functional.linear is not _LINEAR or functional.embedding is not _EMBEDDING:
        return None
    if "forward" in vars(module):  # replaced on the instance
        return None
    if torch.nn.modules.module._global_forward_hooks:  # noqa: SLF001 - these run before ours and may change the output
        return None
    return forward_form(module)


def _is_importable_by_its_name(function: Any) -> bool:
    """Return whether a function is the object of its qualified name; a wrapper that took the name is not."""
    member: Any = sys.modules.get(function.__module__)
    for part in function.__qualname__.split("."):
        member = getattr(member, part, None)
    return member is function


@dataclass(eq=False)
class Call:
    """A call of a module that owns parameters to collect.

    Attributes:
        module: The module.
        parameters: The module's own parameters to collect: local name (such as ``"weight"``) to collected name.
        form: Closed form of the module, if it has one.
        inputs: Positional arguments, detached.
        keywords: Keyword arguments, detached.
        output_edges: Place of each output tensor in the autograd graph; ``None`` for an output without a gradient.
        at_graph_start: Whether no input needs a gradient; autograd must then be asked for the gradients of the outputs.
        autocast_dtype: Dtype in which autocast computes the product of the module; ``None`` without autocast.
        deltas: Gradient of the loss with respect to each output; stored for modules without a closed form.
        handles: Hooks on the outputs.
        input_version: How often the input was written to in place before the call.
        output: The output W x of a linear layer, if it is to be stored.
        output_version: How often the output was written to in place before it was stored.
    """

    module: nn.Module
    parameters: dict[str, str]
    form: ClosedForm | None
    inputs: tuple[Any, ...]
    keywords: dict[str, Any]
    output_edges: list[GradientEdge | None]
    at_graph_start: bool
    autocast_dtype: torch.dtype | None
    deltas: list[Tensor | None] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)
    input_version: int = 0
    output: Tensor | None = None
    output_version: int = 0

    @property
    def tensor_input(self) -> Tensor:
        """The input of a module with a closed form, which has a single input."""
        value: Tensor = self.inputs[0] if self.inputs else next(iter(self.keywords.values()))
        return value

    @property
    def input_overwritten(self) -> bool:
        """Whether the input of a module with a closed form was written to in place after the call."""
        return self.form is not None and self.tensor_input._version != self.input_version  # noqa: SLF001 - no public one

    def store_output(self, output: Tensor) -> None:
        """Store the output if it is exactly W x: without a bias, and not rounded below fp32."""
        rounded = self.autocast_dtype is not None or torch.finfo(output.dtype).bits < 32
        if self.form == "linear" and getattr(self.module, "bias", None) is None and not rounded:
            self.output, self.output_version = output.detach(), output._version  # noqa: SLF001

    def unchanged_output(self) -> Tensor | None:
        """Return the stored output, or ``None`` if it was written to after the call, e.g. by a sum in place."""
        changed = self.output is None or self.output._version != self.output_version  # noqa: SLF001
        return None if changed else self.output

    def release_tensors(self) -> None:
        """Drop the input and the output, after the gradient has been computed."""
        self.inputs, self.keywords, self.output = (), {}, None

    def end(self) -> None:
        """Drop everything: the graph refers to the hooks and the hooks to the call, a cycle that is never collected."""
        self.release_tensors()
        for handle in self.handles:
            handle.remove()
        self.output_edges, self.deltas, self.handles = [], [], []


Receiver = Callable[[Call, Tensor], None]
"""Function that takes a call with a closed form and the gradient of the loss with respect to its output."""


@dataclass
class Tape:
    """The calls that were recorded while :func:`recording` was open.

    Attributes:
        calls: Calls that need a gradient, in order.
        called: Names of the parameters whose module was called, whether the call needs a gradient or not.
        is_open: Whether calls are recorded; a checkpoint runs modules again during the backward pass.
        model_storages: Addresses of the storages of parameters and buffers.
        store_outputs: Whether calls store their output.
    """

    calls: list[Call] = field(default_factory=list)
    called: set[str] = field(default_factory=set)
    is_open: bool = True
    model_storages: frozenset[int] = frozenset()
    store_outputs: bool = False


@contextmanager
def recording(
    model: nn.Module,
    canonical_names: dict[str, str],
    receive: Receiver,
    *,
    batch_size: int = 1,
    store_outputs: bool = False,
) -> Iterator[Tape]:
    """Record the calls of all modules that own parameters to collect.

    Args:
        model: The model; it has no hooks of geomkit when the block ends.
        canonical_names: Every name of each parameter to collect, mapped to the name that it is collected under.
        receive: Receives, during the backward pass, each call with a closed form and the gradient of its output.
        batch_size: Number of examples. A table of position embeddings is looked up once for all examples. Its output is
            expanded to this many rows before it is added to the token embeddings, so that examples stay separate.
        store_outputs: Whether calls of linear layers store their output W x.

    Yields:
        The tape, to which calls are added while the model runs.
    """
    storages = frozenset(map(_storage, chain(model.parameters(), model.buffers())))
    tape = Tape(model_storages=storages, store_outputs=store_outputs)
    handles = []
    try:
        for path, module in model.named_modules():
            own_parameters = dict(module.named_parameters(recurse=False, remove_duplicate=False))
            names = {local: f"{path}.{local}" if path else local for local in own_parameters}
            collected = {local: canonical_names[name] for local, name in names.items() if name in canonical_names}
            if collected:
                expand_to = batch_size if _is_added_position_table(model, path) else 1
                hook = partial(_record, tape, collected, own_parameters, receive, expand_to)
                # Before all other hooks: a hook of the user may change the output.
                handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
        yield tape
    finally:
        for handle in handles:
            handle.remove()


def _is_added_position_table(model: nn.Module, path: str) -> bool:
    """Return whether a module is a table of position embeddings whose output is only added to token embeddings."""
    parent, _, name = path.rpartition(".")
    return name == "wpe" and type(model.get_submodule(parent)).__module__.startswith("transformers.models.")


def _record(
    tape: Tape,
    collected: dict[str, str],
    own_parameters: dict[str, nn.Parameter],
    receive: Receiver,
    expand_to: int,
    module: nn.Module,
    inputs: tuple[Any, ...],
    keywords: dict[str, Any],
    output: Any,
) -> Any:
    """Forward hook: record a call, and return the expanded output of a table of position embeddings."""
    # 1. A closed form holds only for a weight and a bias, called with the values that they have as parameters.
    form = closed_form(module)
    if not own_parameters.keys() <= {"weight", "bias"} or any(
        getattr(module, local) is not parameter for local, parameter in own_parameters.items()
    ):
        form = None
    # 2. Position embeddings (1, L, d) become (B, L, d): each example then has its own part of the gradient.
    expands = form == "lookup" and isinstance(output, Tensor) and output.ndim == 3 and len(output) == 1 < expand_to
    if expands:
        output = output.expand(expand_to, -1, -1)
        inputs, keywords = tree_map(
            lambda value: value.expand(expand_to, -1) if isinstance(value, Tensor) else value, (inputs, keywords)
        )
    outputs = _tensors([output])
    tape.called.update(collected.values() if tape.is_open else ())
    # 3. Record the call if its output needs a gradient. A module may return its parameter itself, a leaf of the graph,
    # whose other uses the search of the graph finds.
    if tape.is_open and any(leaf.requires_grad for leaf in outputs) and not any(map(_is_parameter, outputs)):
        call = Call(
            module,
            collected,
            form if len(outputs) == 1 else None,
            inputs=tuple(_detached(value, tape.model_storages) for value in inputs),
            keywords={name: _detached(value, tape.model_storages) for name, value in keywords.items()},
            # The edge, not the tensor: a later operation in place on the output changes the edge of the tensor.
            output_edges=[get_gradient_edge(leaf) if leaf.requires_grad else None for leaf in outputs],
            at_graph_start=not any(leaf.requires_grad for leaf in _tensors((*inputs, *keywords.values()))),
            autocast_dtype=_autocast_dtype(outputs[0].device.type),
            deltas=[None] * len(outputs),
        )
        call.input_version = call.tensor_input._version if call.form else 0  # noqa: SLF001
        if tape.store_outputs:
            call.store_output(outputs[0])
        tape.calls.append(call)
        # 4. The gradient of each output comes from a hook on its graph node, which autograd visits if it needs the
        # gradients of inputs. A call at the start of the graph has none, and its output gradients are asked for later.
        for index, edge in enumerate(call.output_edges):
            if edge is not None and not call.at_graph_start:
                # On the node, so after all hooks on the tensor, which may change the gradient.
                handle = edge.node.register_prehook(partial(_hand_over_from_node, call, receive, index, edge.output_nr))
                call.handles.append(handle)
    return output if expands else None


def _hand_over_from_node(
    call: Call, receive: Receiver, index: int, output_nr: int, gradients: tuple[Tensor | None, ...]
) -> None:
    hand_over(call, receive, index, gradients[output_nr])


def hand_over(call: Call, receive: Receiver, index: int, delta: Tensor | None) -> None:
    """Give the gradient of an output to the receiver, or store it in the call if the module has no closed form."""
    if delta is None:  # a custom autograd function may return no gradient
        return
    if call.form is None:
        call.deltas[index] = delta
    else:
        receive(call, delta)


def _is_parameter(value: Tensor) -> bool:
    return value.is_leaf and value.requires_grad


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors in nested values; the usual value is a tensor, which needs no search."""
    leaves = [leaf for value in values for leaf in ([value] if isinstance(value, Tensor) else tree_leaves(value))]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _detached(value: Any, model_storages: frozenset[int]) -> Any:
    """Return nested values with tensors detached, and copied if they are part of the model, which training changes."""
    if isinstance(value, Tensor):
        return value.detach().clone() if _storage(value) in model_storages else value.detach()
    return tree_map(lambda leaf: _detached(leaf, model_storages) if isinstance(leaf, Tensor) else leaf, value)


def _storage(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _autocast_dtype(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
