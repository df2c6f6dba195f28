"""Running a model once and handing out, per parameter, what its gradient is made of.

A forward hook keeps a module's input and the edge of the autograd graph at its output; one call of
``torch.autograd.grad`` then returns the output gradients. Autograd skips every weight-gradient product, ``.grad``
is not touched, and the hooks are gone when the block ends.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from geomkit.algebra import coalesce
from geomkit.layer_gradient import DenseGradient, FactoredGradient, LayerGradient


@dataclass(frozen=True, eq=False)
class Tap:
    """One call of a module that owns trainable parameters.

    Attributes:
        module: The module.
        parameters: Its own trainable parameters: local name (``"weight"``) to name in the model.
        inputs: The positional arguments of the call.
        keywords: The keyword arguments of the call.
        output: Where the output entered the autograd graph.
    """

    module: nn.Module
    parameters: dict[str, str]
    inputs: tuple[Any, ...]
    keywords: dict[str, Any]
    output: GradientEdge

    @property
    def name(self) -> str:
        """The name of its first parameter."""
        return next(iter(self.parameters.values()))


@dataclass
class Tape:
    """Every call recorded while :func:`recording` was open.

    Attributes:
        taps: The calls, in order.
    """

    taps: list[Tap] = field(default_factory=list)


@contextmanager
def recording(model: nn.Module, wanted: dict[str, str]) -> Iterator[Tape]:
    """Record every call of the modules that own the wanted parameters.

    Args:
        model: The model; no hook stays on it.
        wanted: Every name a wanted parameter goes by in the model, to the one name it is collected under.

    Yields:
        The tape that fills while the model runs.
    """
    tape = Tape()
    handles = []
    try:
        for path, module in model.named_modules():
            names = {local: f"{path}.{local}" if path else local for local, _ in module.named_parameters(recurse=False)}
            owned = {local: wanted[name] for local, name in names.items() if name in wanted}
            if owned:
                handles.append(module.register_forward_hook(_recorder(tape, owned), with_kwargs=True))
        yield tape
    finally:
        for handle in handles:
            handle.remove()


def _recorder(tape: Tape, owned: dict[str, str]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            # The edge, not the tensor: an in-place operation on the output later would move the tensor's own edge.
            edge = get_gradient_edge(output)
            tape.taps.append(Tap(module, owned, _detached(inputs), _detached_items(keywords), edge))

    return hook


def _detached(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.detach() if isinstance(value, Tensor) else value for value in values)


def _detached_items(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value.detach() if isinstance(value, Tensor) else value for key, value in values.items()}


# ------------------------------------------------------------------------------------- from a call to gradients


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module computes x Wᵀ + b and nothing else; a subclass with a forward of its own does not."""
    return type(module).forward is nn.Linear.forward


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is the transposed linear layer of GPT-2, which computes x W + b."""
    from transformers.pytorch_utils import Conv1D

    return type(module).forward is Conv1D.forward


def is_lookup(module: nn.Module) -> bool:
    """Tell whether a module is a plain embedding."""
    return type(module).forward is nn.Embedding.forward and not module.scale_grad_by_freq and module.max_norm is None


def can_split(module: nn.Module) -> bool:
    """Tell whether :func:`tap_gradients` has a closed form for the module's parameters."""
    return is_linear(module) or is_conv1d(module) or is_lookup(module)


def tap_gradients(tap: Tap, delta: Tensor, row: int | None = None) -> dict[str, LayerGradient]:
    """Turn the output gradient of one call into the gradients of the module's parameters.

    Args:
        tap: The call, of a module for which :func:`can_split` holds.
        delta: Gradient of the loss by the output, (B, …, d_out).
        row: Take only this example of the batch; all of them when left out.

    Returns:
        Gradients by parameter name. Positions whose output gradient is zero (padding, tokens after the last scored
        one) are dropped, so that ``tokens`` bounds the rank.
    """
    source: Tensor = tap.inputs[0] if tap.inputs else next(iter(tap.keywords.values()))
    if row is not None:
        delta, source = delta[row], source[row]
    delta = delta.reshape(-1, delta.shape[-1]).float()
    kept = delta.ne(0).any(1)
    delta = delta[kept]
    if is_lookup(tap.module):
        return _lookup_gradients(tap, delta, source.reshape(-1)[kept])
    source = source.reshape(-1, source.shape[-1])[kept].float()
    factors = (source, delta) if is_conv1d(tap.module) else (delta, source)
    gradients: dict[str, LayerGradient] = {"weight": FactoredGradient(*factors)}
    gradients["bias"] = DenseGradient(delta.sum(0), len(delta))
    return {name: gradients[local] for local, name in tap.parameters.items()}


def _lookup_gradients(tap: Tap, delta: Tensor, indices: Tensor) -> dict[str, LayerGradient]:
    table = cast("nn.Embedding", tap.module)
    if table.padding_idx is not None:  # autograd gives the padding row no gradient
        real = indices != table.padding_idx
        indices, delta = indices[real], delta[real]
    return {tap.parameters["weight"]: coalesce(indices, delta, table.num_embeddings, len(indices))}


def replayed_gradients(tap: Tap, delta: Tensor, row: int) -> dict[str, LayerGradient]:
    """Compute one example's gradients by running the module again on that example alone.

    Serves modules without a closed form (norms, biases, anything small): exact for every module that treats the
    examples of a batch apart.

    Args:
        tap: The call.
        delta: Gradient of the loss by the output, (B, …).
        row: The example.

    Returns:
        Gradients by parameter name, dense.
    """
    size = len(delta)
    inputs = tuple(_row(value, row, size) for value in tap.inputs)
    keywords = {key: _row(value, row, size) for key, value in tap.keywords.items()}
    parameters = dict(tap.module.named_parameters(recurse=False))
    with torch.enable_grad():
        output = tap.module(*inputs, **keywords)
        results = torch.autograd.grad(
            output, [parameters[local] for local in tap.parameters], delta[row : row + 1], allow_unused=True
        )
    tokens = int(delta[row].reshape(-1, delta.shape[-1]).ne(0).any(1).sum())
    return {
        name: DenseGradient(result.float(), tokens)
        for name, result in zip(tap.parameters.values(), results, strict=True)
        if result is not None
    }


def _row(value: Any, row: int, size: int) -> Any:
    return value[row : row + 1] if isinstance(value, Tensor) and value.ndim > 0 and len(value) == size else value


def splits_by_example(tap: Tap, delta: Tensor, size: int) -> bool:
    """Tell whether the first dimension of a call's input and output is the batch's."""
    source = tap.inputs[0] if tap.inputs else next(iter(tap.keywords.values()), None)
    return isinstance(source, Tensor) and source.ndim > 0 and len(source) == size and len(delta) == size
