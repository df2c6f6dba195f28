"""The parameters that optimizers move, and checks of them."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from geomkit.errors import SPFError
from geomkit.inputs.parameters import refuse_unseen_values
from geomkit.spf.weights.sharding import is_sharded

_LOGGER = logging.getLogger(__name__)


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer inside a wrapper, such as accelerate's, whose own hooks do not fire.

    Raises:
        SPFError: If there is no torch optimizer, or DeepSpeed's is among the wrappers.
    """
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        _refuse_deepspeed(optimizer)
        if not hasattr(optimizer, "optimizer"):
            raise SPFError(
                f"expected a torch optimizer, or a wrapper of one, found {type(optimizer).__name__}; give the "
                "optimizer itself, such as torch.optim.AdamW(…)"
            )
        optimizer = optimizer.optimizer
    _refuse_deepspeed(optimizer)
    return optimizer


def _refuse_deepspeed(part: Any) -> None:
    if any(base.__module__.startswith(("deepspeed", "accelerate.utils.deepspeed")) for base in type(part).__mro__):
        _raise_for_deepspeed(type(part).__name__)


def _raise_for_deepspeed(name: str) -> NoReturn:
    raise SPFError(
        f"expected an optimizer that steps in optimizer.step(), found DeepSpeed's ({name}), which steps inside "
        "backward() on flat parts of the weights; train with DDP, FSDP2 or on one device"
    )


def held_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters that an optimizer holds, each of them once."""
    groups = optimizer.param_groups
    return list({id(parameter): parameter for group in groups for parameter in group["params"]}.values())


def refuse_frozen(parameters: Sequence[nn.Parameter]) -> None:
    """Check that an optimizer holds trainable parameters.

    Raises:
        SPFError: If all are frozen, as those of an adapter that is not active any more.
    """
    if not any(parameter.requires_grad for parameter in parameters):
        raise SPFError(
            "expected an optimizer with trainable parameters, found none; unfreeze the model, or after changing "
            "adapters build a new optimizer and attach again"
        )


def can_move(parameter: nn.Parameter) -> bool:
    """Return whether the next step can move a parameter: optimizers go by the gradient, not by ``requires_grad``."""
    return parameter.requires_grad or parameter.grad is not None


def trained_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """Return the parameters that the optimizer's next step can move, by their names in the model.

    Raises:
        SPFError: If a parameter is not the model's, or has no values on this process.
    """
    _refuse_deepspeed(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = {}
    for parameter in held_parameters(optimizer):
        if hasattr(parameter, "ds_id"):
            _raise_for_deepspeed("a parameter in pieces")
        if not can_move(parameter):
            continue
        if id(parameter) not in names:
            raise SPFError(
                f"expected the optimizer to hold the model's parameters, found one of shape "
                f"{tuple(parameter.shape)} that is not; build the optimizer from this very model"
            )
        trained[names[id(parameter)]] = parameter
    whole = {name: parameter for name, parameter in trained.items() if not is_sharded(parameter)}
    refuse_unseen_values(whole, SPFError)
    _refuse_shared_memory(whole)
    return trained


def _refuse_shared_memory(parameters: Mapping[str, nn.Parameter]) -> None:
    """Check that no two parameters begin at the same place in memory.

    Raises:
        SPFError: If two do: the optimizer moves the memory twice, and neither gradient is that of both moves.
    """
    owners: dict[tuple[torch.device, int], str] = {}
    for name, parameter in parameters.items():
        if not parameter.numel():
            continue
        owner = owners.setdefault((parameter.device, parameter.data_ptr()), name)
        if owner != name:
            raise SPFError(
                f"expected parameters with memory of their own, found '{owner}' and '{name}' that share memory; make "
                "them one parameter, and adapters of PEFT without ensure_weight_tying=True"
            )


def refuse_broken_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    """Check the gradients before a step, while the weights are unchanged.

    Raises:
        SPFError: If a gradient is not finite.
    """
    for name, parameter in parameters.items():
        # A finite sum has finite summands, and is cheaper to test than all summands.
        gradient = parameter.grad
        if gradient is None or bool(torch.isfinite(gradient.sum(dtype=torch.float32))):
            continue
        if not bool(torch.isfinite(gradient).all()):
            raise SPFError(
                f"{name}: expected a finite gradient before optimizer.step(), found NaN or inf; the weights are as "
                "they were: lower the learning rate, or leave the batch out"
            )


def warn_of_rounding(parameters: Mapping[str, nn.Parameter]) -> None:
    """Log a warning if weights have fewer bits than a projection needs."""
    types = {parameter.dtype for parameter in parameters.values()} - {torch.float32, torch.float64}
    if types:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types))
        _LOGGER.warning(
            "the weights are %s: rounding them can undo part of a projection, and the certificate tolerates that much; "
            "train in float32, or give SPF(master_weights=True), for a constraint that binds",
            names,
        )


def warn_of_unguarded(model: nn.Module, guarded: Mapping[str, nn.Parameter]) -> None:
    """Log a warning if trainable parameters of a model are not under guard.

    Args:
        model: The model.
        guarded: The parameters under guard, by name.
    """
    trainable = {name: weight.numel() for name, weight in model.named_parameters() if weight.requires_grad}
    held = {name: weight.numel() for name, weight in guarded.items()}
    outside = [name for name in trainable if name not in held]
    if outside:
        _LOGGER.warning(
            "SPF guards %.0f %% of the trainable parameters: no guarded optimizer holds %s, in all %d parameters whose "
            "moves are not measured; attach SPF to all optimizers, spf.attach(model, [first, second]), or freeze what "
            "is not trained",
            100 * sum(held.values()) / sum((trainable | held).values()), ", ".join(outside[:3]), len(outside),
        )  # fmt: skip
