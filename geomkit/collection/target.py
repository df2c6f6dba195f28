"""The parameters of a model whose gradients are collected, and findings about them from passes over batches."""

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
    """The parameters of a model to collect, with findings that last over all batches.

    Attributes:
        model: The model.
        canonical_names: Every name of each parameter to collect, mapped to the name that it is collected under.
        notes: Remarks on parameters, for :class:`~geomkit.gradients.gradient_set.Coverage`.
        called: Names of the parameters whose module was called.
        verified: Parameters whose doubtful split into examples was verified, with the batch size.
        inseparable: Parameters whose split into examples was wrong.
    """

    model: nn.Module
    canonical_names: dict[str, str]
    notes: dict[str, str] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)
    verified: set[tuple[str, int]] = field(default_factory=set)
    inseparable: set[str] = field(default_factory=set)

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters to collect by name, in the order of the model."""
        collected = set(self.canonical_names.values())
        return {name: parameter for name, parameter in self.model.named_parameters() if name in collected}

    def by_autograd(self, batch: Batch, names: Sequence[str]) -> dict[str, LayerGradient]:
        """Return dense gradients of the sum of the examples' losses, computed by ``torch.autograd.grad``.

        Args:
            batch: The examples.
            names: Names of the parameters.
        """
        parameters = [self.parameters[name] for name in names]
        with torch.enable_grad():
            loss = example_losses(token_losses(self.model, batch), batch).sum()
            if not loss.requires_grad:
                return {
                    name: zero_gradient(parameter.shape, parameter.device)
                    for name, parameter in zip(names, parameters, strict=True)
                }
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        tokens = int(batch.attention_mask.sum())
        return {
            name: DenseGradient(at_least_fp32(gradient), tokens)
            for name, gradient in zip(names, gradients, strict=True)
        }
