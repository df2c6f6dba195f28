"""What every contender runs on: a random Llama, one batch of random tokens, and the step that all are compared with."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from geomkit.inputs.tokens import Tokens
from tests.benchmarks.shapes import SHAPES, random_llama, random_tokens


@dataclass(frozen=True, eq=False)
class Workload:
    """A model and one batch in which every token is scored.

    Attributes:
        model: In eval mode, all parameters trainable.
        input_ids: (B, T) tokens.
    """

    model: LlamaForCausalLM
    input_ids: Tensor

    @classmethod
    def build(
        cls, size: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32, batch: int = 8, tokens: int = 128
    ) -> "Workload":
        shape = SHAPES[size]
        return cls(random_llama(shape, device, dtype), random_tokens(shape, batch, tokens).to(device))

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    @property
    def batch(self) -> int:
        return len(self.input_ids)

    @property
    def rows(self) -> list[Tokens]:
        """The batch as geomkit takes it."""
        return [Tokens(tuple(row), (True,) * len(row)) for row in self.input_ids.tolist()]

    @cached_property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def stored_bytes(self) -> int:
        """What one gradient for each sample takes in fp32."""
        return self.batch * self.parameters * 4

    @property
    def linear_share(self) -> float:
        """Share of the parameters that are weights of linear layers; a tied head counts as one."""
        return sum(layer.weight.numel() for layer in self.linears.values()) / self.parameters

    @property
    def checked(self) -> list[str]:
        """The parameters that contenders are checked on: all, or of a large model the first and last layer's."""
        names = [name for name, _ in self.model.named_parameters()]
        last = self.model.config.num_hidden_layers - 1
        inner = [name for name in names if name.startswith("model.layers.")]
        kept = [name for name in inner if name.startswith(("model.layers.0.", f"model.layers.{last}."))]
        return names if self.parameters < 1e8 else [*kept, *(name for name in names if name not in inner)]

    @cached_property
    def linears(self) -> dict[str, torch.nn.Linear]:
        """The linear layers, by the name that the model gives their weight: a tied head has the embedding's."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        layers = [module for module in self.model.modules() if isinstance(module, torch.nn.Linear)]
        return {names[id(layer.weight)]: layer for layer in layers}

    def copy(self) -> LlamaForCausalLM:
        """Return a copy of the model, for a contender that changes it."""
        return copy.deepcopy(self.model)

    def loss(self, input_ids: Tensor) -> Tensor:
        """Return the mean loss; all rows are equally long, so it is also the mean of the examples' losses."""
        mask = torch.ones_like(input_ids)
        loss: Tensor = self.model(input_ids=input_ids, attention_mask=mask, labels=input_ids).loss
        return loss

    def plain_step(self) -> None:
        """One forward and one backward: the unit of every ratio."""
        self.model.zero_grad(set_to_none=True)
        self.loss(self.input_ids).backward()

    def gradients(self, rows: slice, names: Sequence[str]) -> dict[str, Tensor]:
        """Return what ``loss.backward()`` leaves in ``.grad`` for some rows of the batch, in fp32."""
        self.model.zero_grad(set_to_none=True)
        self.loss(self.input_ids[rows]).backward()
        parameters = dict(self.model.named_parameters())
        found = {name: parameters[name].grad for name in names}
        self.model.zero_grad(set_to_none=True)
        return {name: gradient.float() for name, gradient in found.items() if gradient is not None}
