"""Context managers that restore the state of a model, also after an exception."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from geomkit.errors import CollectionError
from geomkit.utils.locks import ThreadLock

_LOCK = ThreadLock()
_MODELS_IN_USE: set[int] = set()
_HOOKS = "_backward_hooks"  # torch has no public way to remove and restore the hooks of a tensor


@contextmanager
def model_state_kept(model: nn.Module) -> Iterator[None]:
    """Restore the modes, replaced buffers, ``requires_grad`` flags and random state of a model when the block ends.

    ``.grad`` and hooks need no restoring: geomkit does not write ``.grad``, and its hooks are context managers.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, value) for module in model.modules() for name, value in module.named_buffers(recurse=False)
    ]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    devices = sorted(
        {parameter.device.index or 0 for parameter in model.parameters() if parameter.device.type == "cuda"}
    )
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for module, name, value in buffers:
                # Some modules replace a buffer when they run, e.g. the frequencies of a dynamic rotary embedding.
                if getattr(module, name, None) is not value:
                    setattr(module, name, value)
            for parameter, needs_gradient in trainable:
                parameter.requires_grad_(needs_gradient)


@contextmanager
def grads_set_aside(model: nn.Module) -> Iterator[None]:
    """Set ``.grad`` of all parameters to ``None`` inside the block, and restore it afterwards.

    A ``.grad`` inside the block then shows that the model runs a backward pass of its own.
    """
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in grads:
            parameter.grad = None
        yield
    finally:
        for parameter, grad in grads:
            parameter.grad = grad


@contextmanager
def one_collection_at_a_time(model: nn.Module) -> Iterator[None]:
    """Make other threads wait until the block ends, as precision and compilation are settings of the whole process.

    Raises:
        CollectionError: If the block is entered again for the same model inside itself, e.g. by a hook, or in a process
            that was forked while another thread was inside: its copy of the model has the hooks of that collection.
    """
    with _LOCK.held():
        if id(model) in _MODELS_IN_USE:
            raise CollectionError(
                "expected a model at rest, found one whose gradients are just being collected; collect outside of "
                "hooks, and in a forked process load the model anew"
            )
        _MODELS_IN_USE.add(id(model))
        try:
            yield
        finally:
            _MODELS_IN_USE.remove(id(model))


@contextmanager
def compilation_and_parameter_hooks_off(model: nn.Module) -> Iterator[None]:
    """Switch off compiled code and the hooks of parameters inside the block.

    Compiled code would not call module hooks that are added later. The hooks of a parameter change the gradient that an
    optimizer gets, which is then not the gradient of the loss.
    """
    hooked = {parameter: hooks for parameter in model.parameters() if (hooks := getattr(parameter, _HOOKS))}
    with torch.compiler.set_stance("force_eager"):
        try:
            for parameter in hooked:
                setattr(parameter, _HOOKS, None)
            yield
        finally:
            for parameter, hooks in hooked.items():
                setattr(parameter, _HOOKS, hooks)
