"""Leaving a model exactly as it was found, also after an exception."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from geomkit.errors import CollectionError

_LOCK = threading.RLock()
_UNDER_WAY: set[int] = set()
_HOOKS = "_backward_hooks"  # torch has no public way to set a tensor's hooks aside


@contextmanager
def model_state_kept(model: nn.Module) -> Iterator[None]:
    """Restore modes, buffers that were replaced, which parameters are trainable, and the random state at the end.

    Gradients and hooks need no restoring: nothing in geomkit writes the first, and the second are context managers.
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
                if getattr(module, name, None) is not value:  # such as the frequencies of a dynamic rotary embedding
                    setattr(module, name, value)
            for parameter, needs_gradient in trainable:
                parameter.requires_grad_(needs_gradient)


@contextmanager
def grads_set_aside(model: nn.Module) -> Iterator[None]:
    """Give parameters no ``.grad`` inside the block, so that one which appears is seen, and theirs back at the end."""
    found = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in found:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in found:
            parameter.grad = gradient


@contextmanager
def one_collection_at_a_time(model: nn.Module) -> Iterator[None]:
    """Let other threads wait, as precision and compilation are set for the whole process.

    Raises:
        CollectionError: If the block is entered for a model inside itself, as by a hook.
    """
    with _LOCK:
        if id(model) in _UNDER_WAY:
            raise CollectionError("expected a model at rest, found one whose gradients are just being collected")
        _UNDER_WAY.add(id(model))
        try:
            yield
        finally:
            _UNDER_WAY.remove(id(model))


@contextmanager
def compilation_and_parameter_hooks_off(model: nn.Module) -> Iterator[None]:
    """Run compiled parts uncompiled, which do not know of hooks, and keep hooks off the parameters' gradients.

    Hooks on parameters say what an optimizer should see; the loss has the gradient that it has.
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
