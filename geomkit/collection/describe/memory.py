"""How many bytes a collection needs, worked out from shapes and token counts alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from geomkit.collection.hooks import ClosedForm, closed_form
from geomkit.inputs.tokens import Tokens

_INDEX = 8  # bytes of a row number
_LOGIT_COPIES = 4  # fp32 tensors of the logits' size at the height of the loss's backward pass
_BESIDE_LINEAR = 1.0  # of a linear layer's inputs and outputs together, what is kept of them and around them
_NORM_COPIES = 2  # fp32 tensors that a norm keeps


@dataclass
class Counts:
    """What the size of gradients depends on, over a set of examples.

    Attributes:
        lengths: Number of tokens of each example.
        scored: Number of tokens scored.
        ids: Distinct tokens of the set.
        own_ids: Distinct tokens of each example, summed over the examples.
    """

    lengths: list[int] = field(default_factory=list)
    scored: int = 0
    ids: set[int] = field(default_factory=set)
    own_ids: int = 0

    @property
    def tokens(self) -> int:
        """Number of tokens of all examples."""
        return sum(self.lengths)

    def add(self, tokens: Tokens) -> None:
        """Count one more example."""
        distinct = set(tokens.input_ids)
        self.lengths.append(len(tokens))
        self.scored += tokens.loss_tokens
        self.ids |= distinct
        self.own_ids += len(distinct)


@dataclass(frozen=True, eq=False)
class ParameterAlias:
    """One name of a parameter; each stands for one call of its module.

    Attributes:
        name: The name.
        module: The module that owns the parameter by it.
        role: ``"input"`` for the embedding of tokens, ``"output"`` for the head, else ``""``.
    """

    name: str
    module: nn.Module
    role: str = ""

    @property
    def form(self) -> ClosedForm | None:
        """The closed form of its gradient, if there is one."""
        return closed_form(self.module)


def aliases_by_parameter(model: nn.Module) -> dict[str, list[ParameterAlias]]:
    """Return, by each parameter's first name, every name that it has."""
    roles = {id(_part(model, f"get_{role}_embeddings")): role for role in ("input", "output")}
    modules = dict(model.named_modules(remove_duplicate=False))
    first: dict[int, str] = {}
    uses: dict[str, list[ParameterAlias]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module = modules[name.rpartition(".")[0]]
        known = uses.setdefault(first.setdefault(id(parameter), name), [])
        known.append(ParameterAlias(name, module, roles.get(id(module), "")))
    return uses


def _part(model: nn.Module, getter: str) -> nn.Module | None:
    try:
        found = getattr(model, getter)()
    except (AttributeError, NotImplementedError):  # not a model of transformers, or one that does not say
        return None
    return found if isinstance(found, nn.Module) else None


def most_result_bytes(
    parameter: nn.Parameter, uses: Sequence[ParameterAlias], counts: Counts | None, *, keep_factors: bool
) -> int | None:
    """Bound the summed gradient of one parameter; ``None`` where only a number of tokens could.

    Args:
        parameter: The parameter.
        uses: Every name that it has; a name stands for one call of its module.
        counts: What there is to collect.
        keep_factors: Whether it stays factored where the dense form is smaller.
    """
    dense = parameter.numel() * _item(parameter)
    if not _thin(parameter, uses):
        return dense
    if counts is None:
        tables = sum(use.form == "lookup" for use in uses) * len(parameter) * _INDEX
        return dense + tables if not keep_factors else None
    rows = [_rows(use, parameter, counts) for use in uses]
    tables = sum(count * _INDEX for count, use in zip(rows, uses, strict=True) if use.form == "lookup")
    thin = _thin_numbers(parameter, uses, rows) * _item(parameter)
    return tables + (thin if keep_factors else min(thin, dense))


def most_sample_bytes(parameter: nn.Parameter, uses: Sequence[ParameterAlias], counts: Counts | None) -> int | None:
    """Bound the examples' own gradients of one parameter, all together; they stay factored."""
    if counts is None:
        return None
    if not _thin(parameter, uses):
        return len(counts.lengths) * parameter.numel() * _item(parameter)
    rows = [_own_rows(use, parameter, counts) for use in uses]
    tables = sum(count * _INDEX for count, use in zip(rows, uses, strict=True) if use.form == "lookup")
    return tables + _thin_numbers(parameter, uses, rows) * _item(parameter)


def _thin(parameter: nn.Parameter, uses: Sequence[ParameterAlias]) -> bool:
    return parameter.ndim == 2 and all(use.form is not None for use in uses)


def _rows(use: ParameterAlias, parameter: nn.Parameter, counts: Counts) -> int:
    """Bound the token positions, or the distinct rows of a table, that have a share in the sum."""
    if use.form == "lookup":
        return min(len(parameter), len(counts.ids) if use.role == "input" else counts.tokens)
    return counts.scored if use.role == "output" else counts.tokens


def _own_rows(use: ParameterAlias, parameter: nn.Parameter, counts: Counts) -> int:
    """Bound the same, of each example, summed over the examples."""
    if use.form == "lookup" and use.role != "input":
        return sum(min(len(parameter), length) for length in counts.lengths)
    return counts.own_ids if use.form == "lookup" else _rows(use, parameter, counts)


def _thin_numbers(parameter: nn.Parameter, uses: Sequence[ParameterAlias], rows: Sequence[int]) -> int:
    height, width = parameter.shape
    return sum(
        count * (width if use.form == "lookup" else height + width) for count, use in zip(rows, uses, strict=True)
    )


def _item(parameter: nn.Parameter) -> int:
    """Bytes of a number of its gradient: fp32, or fp64 if the parameter is."""
    return int(torch.promote_types(parameter.dtype, torch.float32).itemsize)


def logit_bytes(model: nn.Module, positions: int) -> int:
    """Estimate what the loss keeps: logits, their softmax and the gradients of both, in fp32.

    Args:
        model: The model; 0 for one that does not name its head.
        positions: Token positions of the batch.
    """
    weight = getattr(_part(model, "get_output_embeddings"), "weight", None)
    return _LOGIT_COPIES * 4 * positions * len(weight) if isinstance(weight, torch.Tensor) else 0


def activation_bytes(model: nn.Module, positions: int) -> int:
    """Estimate what the model below its logits keeps for the backward pass.

    Linear layers keep their inputs, and what comes after them about as much as their outputs again; norms keep a few
    fp32 tensors; experts keep the inputs and outputs of those that a token is sent to.

    Args:
        model: The model.
        positions: Token positions of the batch.
    """
    head = _part(model, "get_output_embeddings")
    experts = getattr(getattr(model, "config", None), "num_experts_per_tok", None) or 1
    owned = ((m, weight) for m in model.modules() if m is not head for weight in m.parameters(recurse=False))
    return int(positions * sum(_kept_per_position(module, weight, experts) for module, weight in owned))


def _kept_per_position(module: nn.Module, weight: nn.Parameter, experts: int) -> float:
    if weight.ndim < 2:
        # A linear layer's bias keeps nothing.
        return 0.0 if closed_form(module) else _NORM_COPIES * 4.0 * weight.numel()
    if closed_form(module) == "lookup":
        return float(weight.shape[1] * weight.element_size())
    calls = experts if weight.ndim > 2 else 1
    return _BESIDE_LINEAR * calls * sum(weight.shape[-2:]) * weight.element_size()


def total_bytes(sizes: Iterable[int | None]) -> int | None:
    """Add sizes up; ``None`` if one of them is not known."""
    known = list(sizes)
    return None if None in known else sum(size for size in known if size is not None)
