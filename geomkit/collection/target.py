"""The parameters that are to be collected, and what is learnt about them on the way."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from geomkit.gradients.arithmetic import zero_gradient
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.inputs.batches import Batch
from geomkit.inputs.loss import example_losses, token_losses
from geomkit.utils.precision import at_least_fp32


@dataclass
class Target:
    """What to collect from a model, over all its batches.

    Attributes:
        model: The model.
        names: Every name of each chosen parameter to the one it is collected under.
        notes: What a reader should know about a parameter.
        ran: Names of parameters whose module was called.
        verified: Parameters whose doubtful split was found right, with the batch size it was right for.
        inseparable: Parameters whose split was found wrong.
    """

    model: nn.Module
    names: dict[str, str]
    notes: dict[str, str] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)
    verified: set[tuple[str, int]] = field(default_factory=set)
    inseparable: set[str] = field(default_factory=set)

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The chosen parameters, in the model's order."""
        wanted = set(self.names.values())
        return {name: parameter for name, parameter in self.model.named_parameters() if name in wanted}

    def by_autograd(self, batch: Batch, names: Sequence[str]) -> dict[str, LayerGradient]:
        """Return the gradients of the sum of the examples' losses as autograd forms them.

        Args:
            batch: The examples.
            names: Which parameters.
        """
        parameters = [self.parameters[name] for name in names]
        with torch.enable_grad():
            loss = example_losses(token_losses(self.model, batch), batch).sum()
            if not loss.requires_grad:
                return {name: zero_gradient(one.shape, one.device) for name, one in zip(names, parameters, strict=True)}
            found = torch.autograd.grad(loss, parameters, materialize_grads=True)
        tokens = int(batch.attention_mask.sum())
        return {name: DenseGradient(at_least_fp32(value), tokens) for name, value in zip(names, found, strict=True)}
