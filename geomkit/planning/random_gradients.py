"""Random gradients in the forms and sizes in which a collection would return them.

The contributions of their tokens fall as 1/t, and so, about, do their singular values: iterations on a flat spectrum
would take longer than those on a gradient's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from geomkit.collection.hooks import ClosedForm
from geomkit.collection.memory import Amount, ParameterAlias
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.indexed import IndexedGradient
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.gradients.summed import SumGradient


@dataclass(frozen=True)
class GradientKind:
    """What two parameters have in common if the work on their gradients is the same.

    Attributes:
        shape: Shape of the parameter.
        dtype: Type of the gradient's numbers.
        uses: Closed form and role of each use of the parameter; a tied parameter has several uses.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    uses: tuple[tuple[ClosedForm | None, str], ...]

    @classmethod
    def of(cls, parameter: nn.Parameter, aliases: Sequence[ParameterAlias]) -> "GradientKind":
        """Return the kind of a parameter with all its names."""
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return cls(tuple(parameter.shape), dtype, tuple((alias.form, alias.role) for alias in aliases))

    @property
    def is_thin(self) -> bool:
        """Whether the gradient of an example is stored as factors."""
        return len(self.shape) == 2 and all(form is not None for form, _ in self.uses)

    def sample(self, amount: Amount, generator: torch.Generator) -> LayerGradient:
        """Return a random gradient of an example, in factors where it is thin."""
        if not self.is_thin:
            return DenseGradient(self._random(generator, *self.shape), amount.tokens)
        parts = [self._part(form, role, amount, generator) for form, role in self.uses]
        return parts[0] if len(parts) == 1 else SumGradient(tuple(parts))

    def summed(self, amount: Amount, generator: torch.Generator) -> LayerGradient:
        """Return a random gradient of a set: in factors, unless the matrix is smaller."""
        gradient = self.sample(amount, generator)
        entries = sum(tensor.numel() for tensor in gradient.tensors)
        is_smaller = entries < torch.Size(self.shape).numel()
        return gradient if is_smaller else DenseGradient(gradient.dense(), amount.tokens)

    def _part(self, form: ClosedForm | None, role: str, amount: Amount, generator: torch.Generator) -> LayerGradient:
        height, width = self.shape
        if form in {"lookup", "scaled lookup"}:
            rows = max(min(height, amount.ids if role == "input" else amount.tokens), 1)
            indices = torch.arange(rows, device=generator.device) * (height // rows)
            return IndexedGradient(indices, self._falling(generator, rows, width), height, amount.tokens)
        tokens = max(amount.scored if role == "output" else amount.tokens, 1)
        return FactoredGradient(self._falling(generator, tokens, height), self._random(generator, tokens, width))

    def _falling(self, generator: torch.Generator, rows: int, columns: int) -> Tensor:
        places = torch.arange(1, rows + 1, dtype=self.dtype, device=generator.device)
        return self._random(generator, rows, columns) / places[:, None]

    def _random(self, generator: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=self.dtype, device=generator.device)
