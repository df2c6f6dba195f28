"""Weights that accelerate has offloaded to the CPU or a disk, as ``device_map="auto"`` does where a GPU is too small.

Such a parameter is on the meta device, without values. A hook of accelerate puts a new parameter with the values in its
place before the forward pass of its module, and removes it afterwards.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from geomkit.utils.progress import with_bar

if TYPE_CHECKING:
    from accelerate.hooks import AlignDevicesHook
    from transformers import PreTrainedModel


def input_device(model: nn.Module) -> torch.device:
    """Return the device that the inputs of a model belong on: that of its first parameter when that has values."""
    device = next(model.parameters()).device
    if device.type != "meta":
        return device
    homes = (hook.execution_device for module in model.modules() for hook in _hooks(module))
    home = next((home for home in homes if home is not None), device)
    return torch.device("cuda", home) if isinstance(home, int) else torch.device(home)


@contextmanager
def offloaded_weights_loaded(model: nn.Module, progress: bool = False) -> Iterator[None]:
    """Load all offloaded weights inside the block, and let them stay loaded while the model runs.

    A backward pass needs the weights of all modules after the forward pass, and every parameter to be the same object
    throughout. So the device must have room for the whole model inside the block.

    Args:
        model: The model.
        progress: Show a bar, if loading takes longer than five seconds.
    """
    with ExitStack() as stack:
        offloading = [(module, hook) for module in model.modules() for hook in _hooks(module) if hook.offload]
        for module, hook in with_bar(offloading, "load weights", "module", progress):
            stack.enter_context(_loaded(module, hook))
        if offloading and hasattr(model, "tie_weights"):
            cast("PreTrainedModel", model).tie_weights()  # the hooks load a tied weight as two parameters
        yield


def named_values(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Yield the name of each parameter, the parameter and its values, also where these are offloaded.

    A parameter of a model that was never loaded is its own values, on the meta device. A tied weight comes once.
    """
    offloaded = {
        name: hook
        for name, module in model.named_modules()
        for hook in _hooks(module)
        if hook.offload and hook.weights_map is not None
    }
    tied = getattr(model, "all_tied_weights_keys", {}) if offloaded else {}
    for name, parameter in model.named_parameters():
        path, _, local = name.rpartition(".")
        if name not in tied:
            stored = parameter.is_meta and path in offloaded
            yield name, parameter, offloaded[path].weights_map[local] if stored else parameter


@contextmanager
def _loaded(module: nn.Module, hook: "AlignDevicesHook") -> Iterator[None]:
    hook.pre_forward(module)
    hook.offload = False  # so that a forward pass neither loads the weights again nor removes them
    try:
        yield
    finally:
        hook.offload = True
        hook.post_forward(module, None)


def _hooks(module: nn.Module) -> "list[AlignDevicesHook]":
    """Return the hooks of accelerate that move a module's weights."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return []
    from accelerate.hooks import AlignDevicesHook

    return [part for part in getattr(hook, "hooks", (hook,)) if isinstance(part, AlignDevicesHook)]
