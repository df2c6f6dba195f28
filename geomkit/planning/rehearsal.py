"""Seconds of the work on gradients, from the work itself, done once for each shape of the model on random gradients.

What an analysis computes of a parameter, and what a guard of SPF does to a block of weights, depends on shapes and on
numbers of tokens only. No formula of operations tells its seconds: decompositions, products and conversions run at
speeds that differ by ten.
"""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from geomkit.analysis.parameter_measures import measure_parameters
from geomkit.analysis.probe import Probe
from geomkit.collection.memory import Amount, Counts, ParameterAlias, aliases_by_parameter
from geomkit.errors import GeometryError
from geomkit.gradients.gradient_set import Coverage, GradientSet
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.inputs.tokens import Tokens
from geomkit.planning.random_gradients import GradientKind
from geomkit.planning.speed import Clock, Speed, median_seconds
from geomkit.spf.anchors import AnchorPool
from geomkit.spf.constraints import ConstraintMeter
from geomkit.spf.demands import Demands, Measured
from geomkit.spf.guard import Guard, Options
from geomkit.spf.rules import DEFAULT_RULE, get_rule
from geomkit.spf.weights.guarded import Guarded

_SETS = ("safety", "control", "utility")
_FEWEST = 3
_MOST_OPERATIONS = 5e10
"""Operations of the measurements of one shape, up to which all examples take part: seconds on one CPU thread."""


@dataclass(frozen=True)
class Rehearsal:
    """Seconds of the work on gradients, the passes that make the gradients not included.

    Attributes:
        analysis: Measurements of an analysis on all parameters.
        guard: What a guard with the default rule does in a step, on all blocks.
    """

    analysis: float
    guard: float


# ------------------------------------------------------------------------------------------------------ analysis


def kinds(model: nn.Module) -> Counter[GradientKind]:
    """Return how many trainable parameters of each kind there are."""
    aliases = aliases_by_parameter(model)
    return Counter(
        GradientKind.of(parameter, aliases[name])
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )


def analysis_seconds(kind: GradientKind, counts: Counts, device: torch.device, clock: Clock) -> float:
    """Return the seconds in which an analysis of three sets like these examples measures one parameter.

    Of a large parameter fewer examples take part, and the seconds are scaled by the operations, see :func:`operations`.
    """
    few = counts
    while operations(kind, few) > _MOST_OPERATIONS and len(few.lengths) > _FEWEST:
        few = counts.subset(max(len(few.lengths) // 2, _FEWEST))
    generator = torch.Generator(device).manual_seed(0)
    sets = {name: _gradient_set([kind.sample(amount, generator) for amount in few.by_example()]) for name in _SETS}

    def measure() -> None:
        # Alone, a parameter without a spectrum, such as a vector, is an error at the end of its measurements.
        with suppress(GeometryError):
            measure_parameters(sets, rank=Probe.rank, null_draws=Probe.null_draws, seed=0, progress=False)

    seconds = median_seconds(measure, device, clock)
    return seconds * operations(kind, counts) / operations(kind, few)


def _gradient_set(samples: Sequence[LayerGradient]) -> GradientSet:
    coverage = Coverage({"": samples[0].tensors[0].numel()}, {}, {})
    one = [GradientSet({"": sample}, 0.0, 1, sample.tokens, coverage) for sample in samples]
    return GradientSet({}, 0.0, len(one), sum(part.loss_tokens for part in one), coverage, tuple(one))


def operations(kind: GradientKind, counts: Counts) -> float:
    """Return the fp32 operations of the measurements of a matrix, for T tokens of each of three sets; 1 for vectors.

    1. Inner products of the examples within the three sets, and of two pairs of sets: from Gram matrices of tokens
       2 T² (m + n), or from the gradients 2 T m n and N² m n, whichever is less.
    2. A decomposition of the mean gradient of each set with r = min(T, m, n): a reduction to r × r, and about 9 r³
       for the singular vectors (Golub and Van Loan, Matrix Computations, table 8.6.1), in fp64, which counts twice.
    """
    if len(kind.shape) != 2:
        return 1.0
    rows, columns = kind.shape
    examples = len(counts.lengths)
    tokens = counts.scored if any(role == "output" for _, role in kind.uses) else counts.reaching
    pairs = min(2 * tokens**2 * (rows + columns), 2 * (tokens + examples**2) * rows * columns)
    r = min(tokens, rows, columns)
    decomposition = 2 * tokens * r * (rows + columns) + 9 * r**3
    return 5.0 * pairs + 2.0 * len(_SETS) * decomposition


# ----------------------------------------------------------------------------------------------------------- SPF


@dataclass(frozen=True, eq=False)
class Unit:
    """A module with trainable weights of its own, such as a linear layer, alone or with its adapters.

    Attributes:
        module: The module.
        kinds: The kind of each weight, by its name within the module.
    """

    module: nn.Module
    kinds: dict[str, GradientKind]

    @property
    def signature(self) -> tuple[Any, ...]:
        """What two units have in common if a guard does the same work on them."""
        weights = self.module.named_parameters(recurse=is_adapted(self.module))
        types = [(weight.dtype, weight.requires_grad) for _, weight in weights]
        return (type(self.module), *types, *self.kinds.items())


def is_adapted(module: nn.Module) -> bool:
    """Return whether a module is a layer that PEFT has wrapped with its adapters."""
    return hasattr(module, "get_base_layer")


def units(model: nn.Module) -> list[tuple[Unit, int]]:
    """Return a unit of each signature, with how many of them the model has; every trainable weight is in one."""
    aliases = aliases_by_parameter(model)
    by_id = {id(parameter): aliases[name] for name, parameter in model.named_parameters()}
    found = [_unit(module, by_id) for module in _owners(model)]
    first = {unit.signature: unit for unit in reversed(found)}
    counts = Counter(unit.signature for unit in found)
    return [(unit, counts[signature]) for signature, unit in first.items()]


def _owners(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the adapted layers, and the modules outside them that own a trainable weight that no other one has."""
    seen: set[int] = set()
    inside: set[int] = set()
    for module in model.modules():
        if id(module) in inside:
            continue
        weights = [weight for weight in module.parameters(recurse=is_adapted(module)) if weight.requires_grad]
        if is_adapted(module):
            inside |= {id(part) for part in module.modules()}
        if weights and not all(id(weight) in seen for weight in weights):
            seen |= {id(weight) for weight in weights}
            yield module


def _unit(module: nn.Module, aliases: dict[int, list[ParameterAlias]]) -> Unit:
    named = module.named_parameters(recurse=is_adapted(module))
    return Unit(module, {name: GradientKind.of(weight, aliases[id(weight)]) for name, weight in named})


def guard_seconds(layers: Sequence[Unit], amount: Amount, device: torch.device, clock: Clock) -> float:
    """Return the seconds that the hooks of a guard with the default rule add to a step of a model of some units.

    Weights and gradients are zero and the optimizer moves nothing: what is timed is the measurement of the subspaces,
    the readings, the addition of the safety gradient and the checks. No block conflicts, as is usual after mixing.

    Args:
        layers: Modules with trainable weights.
        amount: Tokens of the anchors of a step.
        device: Where the work is done.
        clock: What tells the time.
    """
    model = nn.ModuleList(_zeros_like(layer, device) for layer in layers)
    kind = {f"{place}.{name}": kind for place, layer in enumerate(layers) for name, kind in layer.kinds.items()}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    guarded = Guarded(model, _NoOptimizer(trained), "update")
    generator = torch.Generator(device).manual_seed(0)
    gradients = {name: kind[name].summed(amount, generator) for name in guarded.blocks}
    Guard(guarded, get_rule(DEFAULT_RULE), _KnownGradients(gradients), Options())
    guarded.optimizer.step()  # the first step of anything is slower
    return median_seconds(guarded.optimizer.step, device, clock)


def _small_unit() -> Unit:
    """Return a unit of a single number, whose guard does little but what it does once a step."""
    layer = nn.Module()
    layer.register_parameter("weight", nn.Parameter(torch.zeros(1)))
    return Unit(layer, {"weight": GradientKind((1,), torch.float32, ((None, ""),))})


def _zeros_like(unit: Unit, device: torch.device) -> nn.Module:
    """Return a module with weights like those of a unit, all of them zero; a copy of the layer if it is adapted."""
    if is_adapted(unit.module):
        layer = copy.deepcopy(unit.module).to_empty(device=device)
    else:
        layer = nn.Module()
        for name, weight in unit.module.named_parameters(recurse=False):
            empty = torch.empty_like(weight, device=device)
            layer.register_parameter(name, nn.Parameter(empty, requires_grad=weight.requires_grad))
    for weight in layer.parameters():
        nn.init.zeros_(weight)
    return layer


class _NoOptimizer(torch.optim.Optimizer):
    """An optimizer that moves nothing."""

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        super().__init__(weights, {"lr": 0.0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing."""


class _KnownGradients(ConstraintMeter):
    """Returns the same gradients at every step, in new objects, since a gradient remembers its norm."""

    def __init__(self, gradients: dict[str, LayerGradient]) -> None:
        self._gradients = gradients
        self._pool = AnchorPool((Tokens((0,), (True,)),), 1)
        self.references = self.benign_references = np.array([])
        self.reference_model = None

    def measure(self, step: int, blocks: Iterable[str]) -> Measured:  # noqa: ARG002 - that of the class above
        """Return the gradients of these blocks; ⟨W, g⟩ is known, as it is after a pass."""
        found = {name: (copy.copy(self._gradients[name]),) for name in blocks}
        dots = {name: torch.zeros(1, dtype=torch.float64, device=part[0].device) for name, part in found.items()}
        return Measured(found, Demands(np.ones(1), np.zeros(1), np.full(1, np.inf)), 0.0, 0.0, (0,), dots)


# ---------------------------------------------------------------------------------------------------- everything


def rehearse(
    model: nn.Module,
    analysed: Counts,
    anchors: Counts,
    speed: Speed,
    *,
    progress: bool = False,
) -> Rehearsal:
    """Return the seconds of the work on the gradients of a model's trainable parameters.

    Args:
        model: The model; its weights may be on the meta device.
        analysed: The examples of each of the three sets of an analysis.
        anchors: The anchors of a step.
        speed: The speed that was measured, on whose device and by whose clock the work is timed.
        progress: Show a bar, in shapes.
    """
    from tqdm.auto import tqdm

    by_kind, by_unit = kinds(model), units(model)
    where = (speed.device, speed.clock)
    with tqdm(total=len(by_kind) + len(by_unit), desc="rehearse", unit="shape", disable=not progress) as bar:
        analysis = 0.0
        for kind, count in by_kind.items():
            analysis += count * analysis_seconds(kind, analysed, *where)
            bar.update()
        # What a guard does once a step, whatever the number of blocks; the rest is proportional to it.
        once, twice = (guard_seconds([_small_unit()] * count, anchors.total, *where) for count in (1, 2))
        guard = fixed = max(2 * once - twice, 0.0)
        for unit, count in by_unit:
            guard += count * max(guard_seconds([unit], anchors.total, *where) - fixed, 0.0)
            bar.update()
    return Rehearsal(analysis, guard)
