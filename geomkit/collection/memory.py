"""Memory of a collection, from the shapes of the parameters and the numbers of tokens."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from torch import nn

from geomkit.collection.hooks import ClosedForm, closed_form
from geomkit.inputs.tokens import Tokens

_INDEX = 8  # bytes of a row number
_LOGIT_COPIES = 4  # fp32 tensors of the size of the logits, at the peak of the backward pass of the loss
_LINEAR_COPIES = 1.0  # tensors of the size of a linear layer's input and output that autograd stores
_NORM_COPIES = 2  # fp32 tensors that autograd stores for a norm


@dataclass(frozen=True)
class Amount:
    """Numbers on which the rows of a gradient's factors depend.

    Attributes:
        tokens: Number of tokens.
        scored: Number of scored tokens: only these reach the head.
        ids: Number of distinct token ids.
    """

    tokens: int
    scored: int
    ids: int


@dataclass
class Counts:
    """Counts of a set of examples, on which the sizes of gradients depend.

    Attributes:
        lengths: Number of tokens of each example.
        scored: Number of scored tokens of all examples.
        reaching: Number of tokens of all examples that reach the loss: those before the last scored one.
        ids: Distinct token ids of the set.
        ids_by_example: Number of distinct token ids of an example, summed over the examples.
    """

    lengths: list[int] = field(default_factory=list)
    scored: int = 0
    reaching: int = 0
    ids: set[int] = field(default_factory=set)
    ids_by_example: int = 0

    @property
    def tokens(self) -> int:
        """Number of tokens of all examples."""
        return sum(self.lengths)

    @classmethod
    def of(cls, rows: Iterable[Tokens]) -> Self:
        """Return the counts of examples."""
        counts = cls()
        for row in rows:
            counts.add(row)
        return counts

    def add(self, tokens: Tokens) -> None:
        """Add an example to the counts."""
        distinct = set(tokens.input_ids)
        self.lengths.append(len(tokens))
        self.scored += tokens.loss_tokens
        self.reaching += max((place for place, scored in enumerate(tokens.loss_mask) if scored), default=0)
        self.ids |= distinct
        self.ids_by_example += len(distinct)

    @property
    def total(self) -> Amount:
        """The numbers of all examples together, of the tokens that reach the loss."""
        return Amount(self.reaching, self.scored, len(self.ids))

    def by_example(self) -> list[Amount]:
        """Return the numbers of each example, with the mean shares of reaching, of scored and of distinct tokens."""
        counts = (self.reaching, self.scored, self.ids_by_example)
        shares = [count / max(self.tokens, 1) for count in counts]
        return [Amount(*(round(share * length) for share in shares)) for length in self.lengths]

    def subset(self, most: int) -> "Counts":
        """Return counts as if at most so many of the examples had been drawn, with means in place of what is random."""
        if len(self.lengths) <= most:
            return self
        share = most / len(self.lengths)
        lengths = np.quantile(self.lengths, (np.arange(most) + 0.5) / most).round().astype(int).tolist()
        ids = set(sorted(self.ids)[: max(round(share * self.ids_by_example), 1)])
        scored, reaching, by_example = (
            round(share * count) for count in (self.scored, self.reaching, self.ids_by_example)
        )
        return Counts(lengths, scored, reaching, ids, by_example)


@dataclass(frozen=True, eq=False)
class ParameterAlias:
    """A name of a parameter; a tied parameter has several. For each name, one call of its module is assumed.

    Attributes:
        name: The name.
        module: The module that owns the parameter under this name.
        role: ``"input"`` for the token embedding, ``"output"`` for the head, otherwise ``""``.
    """

    name: str
    module: nn.Module
    role: str = ""

    @property
    def form(self) -> ClosedForm | None:
        """Closed form of the gradient, if there is one."""
        return closed_form(self.module)

    @property
    def looks_up(self) -> bool:
        """Whether the module looks up rows of the parameter, scaled or not."""
        return self.form in {"lookup", "scaled lookup"}


def aliases_by_parameter(model: nn.Module) -> dict[str, list[ParameterAlias]]:
    """Return all names of each parameter, by its first name."""
    roles = {id(_part(model, f"get_{role}_embeddings")): role for role in ("input", "output")}
    modules = dict(model.named_modules(remove_duplicate=False))
    first_names: dict[int, str] = {}
    aliases: dict[str, list[ParameterAlias]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module = modules[name.rpartition(".")[0]]
        first_name = first_names.setdefault(id(parameter), name)
        aliases.setdefault(first_name, []).append(ParameterAlias(name, module, roles.get(id(module), "")))
    return aliases


def _part(model: nn.Module, getter: str) -> nn.Module | None:
    try:
        part = getattr(model, getter)()
    except (AttributeError, NotImplementedError):  # not a model of transformers, or without this method
        return None
    return part if isinstance(part, nn.Module) else None


def most_result_bytes(
    parameter: nn.Parameter, aliases: Sequence[ParameterAlias], counts: Counts | None, *, keep_factors: bool
) -> int | None:
    """Return an upper bound of the bytes of a summed gradient; ``None`` if it depends on tokens that are not known.

    Args:
        parameter: The parameter.
        aliases: All names of the parameter.
        counts: Counts of the examples, if there are any.
        keep_factors: Whether factors are stored even if the dense form is smaller.
    """
    dense = parameter.numel() * _item(parameter)
    if not _thin(parameter, aliases):
        return dense
    if counts is None:
        tables = sum(alias.looks_up for alias in aliases) * len(parameter) * _INDEX
        return dense + tables if not keep_factors else None
    rows = [_rows(alias, parameter, counts) for alias in aliases]
    tables = sum(count * _INDEX for count, alias in zip(rows, aliases, strict=True) if alias.looks_up)
    thin = _thin_numbers(parameter, aliases, rows) * _item(parameter)
    return tables + (thin if keep_factors else min(thin, dense))


def most_sample_bytes(parameter: nn.Parameter, aliases: Sequence[ParameterAlias], counts: Counts | None) -> int | None:
    """Return an upper bound of the bytes of all examples' gradients of a parameter, which are stored as factors."""
    if counts is None:
        return None
    if not _thin(parameter, aliases):
        return len(counts.lengths) * parameter.numel() * _item(parameter)
    rows = [_rows_by_example(alias, parameter, counts) for alias in aliases]
    tables = sum(count * _INDEX for count, alias in zip(rows, aliases, strict=True) if alias.looks_up)
    return tables + _thin_numbers(parameter, aliases, rows) * _item(parameter)


def most_collected_bytes(model: nn.Module, counts: Counts, names: Collection[str], *, keep_factors: bool) -> int | None:
    """Return an upper bound of the bytes of a summed gradient and of all examples' gradients.

    Args:
        model: The model.
        counts: Counts of the examples.
        names: First names of the parameters that are collected.
        keep_factors: Whether factors are stored even if the dense form is smaller.
    """
    aliases = aliases_by_parameter(model)
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in names}
    samples = (most_sample_bytes(parameter, aliases[name], counts) for name, parameter in parameters.items())
    sums = (
        most_result_bytes(parameter, aliases[name], counts, keep_factors=keep_factors)
        for name, parameter in parameters.items()
    )
    return total_bytes((*samples, *sums))


def _thin(parameter: nn.Parameter, aliases: Sequence[ParameterAlias]) -> bool:
    return parameter.ndim == 2 and all(alias.form is not None for alias in aliases)


def _rows(alias: ParameterAlias, parameter: nn.Parameter, counts: Counts) -> int:
    """Return an upper bound of the rows of a summed gradient's factors: token positions, or distinct table rows."""
    if alias.looks_up:
        return min(len(parameter), len(counts.ids) if alias.role == "input" else counts.tokens)
    return counts.scored if alias.role == "output" else counts.tokens


def _rows_by_example(alias: ParameterAlias, parameter: nn.Parameter, counts: Counts) -> int:
    """Return an upper bound of the rows of the factors of the examples' gradients, summed over the examples."""
    if alias.looks_up and alias.role != "input":
        return sum(min(len(parameter), length) for length in counts.lengths)
    return counts.ids_by_example if alias.looks_up else _rows(alias, parameter, counts)


def _thin_numbers(parameter: nn.Parameter, aliases: Sequence[ParameterAlias], rows: Sequence[int]) -> int:
    height, width = parameter.shape
    return sum(
        count * (width if alias.looks_up else height + width) for count, alias in zip(rows, aliases, strict=True)
    )


def _item(parameter: nn.Parameter) -> int:
    """Return the bytes of a number of the gradient: 4 for fp32, or 8 if the parameter is fp64."""
    return int(torch.promote_types(parameter.dtype, torch.float32).itemsize)


def logit_bytes(model: nn.Module, positions: int) -> int:
    """Return the estimated bytes of the logits, their softmax and the gradients of both, in fp32.

    Args:
        model: The model; the estimate is 0 if the model does not name its head.
        positions: Number of token positions in the batch.
    """
    weight = getattr(_part(model, "get_output_embeddings"), "weight", None)
    return _LOGIT_COPIES * 4 * positions * len(weight) if isinstance(weight, torch.Tensor) else 0


def activation_bytes(model: nn.Module, positions: int) -> int:
    """Return the estimated bytes of the activations that are stored for the backward pass, without the logits.

    Linear layers store their inputs, and the operations after them about as much as their outputs. Norms store a few
    fp32 tensors. Experts store inputs and outputs for the experts that a token is sent to.

    Args:
        model: The model.
        positions: Number of token positions in the batch.
    """
    head = _part(model, "get_output_embeddings")
    experts = getattr(getattr(model, "config", None), "num_experts_per_tok", None) or 1
    owned = (
        (module, parameter)
        for module in model.modules()
        if module is not head
        for parameter in module.parameters(recurse=False)
    )
    return int(positions * sum(_bytes_per_position(module, parameter, experts) for module, parameter in owned))


def _bytes_per_position(module: nn.Module, weight: nn.Parameter, experts: int) -> float:
    """Return the estimated bytes that autograd stores per token position because of a parameter."""
    if weight.ndim < 2:  # the bias of a linear layer needs nothing
        return 0.0 if closed_form(module) else _NORM_COPIES * 4.0 * weight.numel()
    if closed_form(module) in {"lookup", "scaled lookup"}:
        return float(weight.shape[1] * weight.element_size())
    calls = experts if weight.ndim > 2 else 1
    return _LINEAR_COPIES * calls * sum(weight.shape[-2:]) * weight.element_size()


def total_bytes(sizes: Iterable[int | None]) -> int | None:
    """Return the sum of sizes; ``None`` if a size is not known."""
    all_sizes = list(sizes)
    return None if None in all_sizes else sum(size for size in all_sizes if size is not None)
