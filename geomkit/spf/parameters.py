"""Which parameters a guard watches, and which it cannot."""

import logging
from typing import Any

import torch
from torch import nn

from geomkit.collection.selection import refuse_unseen_values
from geomkit.errors import SPFError

_LOGGER = logging.getLogger(__name__)


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer inside a wrapper such as accelerate's, whose own hooks do not fire.

    Raises:
        SPFError: If there is none.
    """
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        if not hasattr(optimizer, "optimizer"):
            raise SPFError(f"expected a torch optimizer, or a wrapper of one, found {type(optimizer).__name__}")
        optimizer = optimizer.optimizer
    return optimizer


def guarded_parameters(model: nn.Module, optimizer: Any) -> dict[str, nn.Parameter]:
    """Return the trainable parameters that an optimizer holds, by their name in the model.

    Raises:
        SPFError: If there are none, one is not the model's, or one has no whole values here: sharded, or on meta.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    guarded = {}
    for group in unwrapped(optimizer).param_groups:
        for parameter in group["params"]:
            if not parameter.requires_grad:
                continue
            if id(parameter) not in names:
                raise SPFError(
                    f"expected the optimizer to hold the model's parameters, found one of shape "
                    f"{tuple(parameter.shape)} that is not; build the optimizer from this very model"
                )
            guarded[names[id(parameter)]] = parameter
    if not guarded:
        raise SPFError("expected an optimizer with trainable parameters, found none; unfreeze the model first")
    refuse_unseen_values(guarded, SPFError)
    return guarded


def warn_of_rounding(parameters: dict[str, nn.Parameter]) -> None:
    """Log a warning where weights are kept in fewer bits than a projection needs."""
    types = {parameter.dtype for parameter in parameters.values()} - {torch.float32, torch.float64}
    if types:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types))
        _LOGGER.warning(
            "the weights are %s: rounding them can undo part of a projection, and the certificate tolerates that much; "
            "train in float32 for a constraint that binds",
            names,
        )
