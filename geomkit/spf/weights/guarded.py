"""Which weights a guard watches, in which blocks, and which it cannot."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor, nn

from geomkit.errors import SPFError
from geomkit.inputs.parameters import refuse_unseen_values, unwrapped_model
from geomkit.spf.rules import Level
from geomkit.spf.weights.adapters import Adapter, adapters
from geomkit.spf.weights.blocks import Block, Move, ProductBlock, TensorBlock
from geomkit.spf.weights.processes import Processes
from geomkit.spf.weights.sharding import gathered, is_sharded, local_rows, process_group, reshard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_LOGGER = logging.getLogger(__name__)


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer inside a wrapper such as accelerate's, whose own hooks do not fire.

    Raises:
        SPFError: If there is none, or DeepSpeed's is among the wrappers.
    """
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        _refuse_deepspeed(optimizer)
        if not hasattr(optimizer, "optimizer"):
            raise SPFError(f"expected a torch optimizer, or a wrapper of one, found {type(optimizer).__name__}")
        optimizer = optimizer.optimizer
    _refuse_deepspeed(optimizer)
    return optimizer


def _refuse_deepspeed(part: Any) -> None:
    if any(each.__module__.startswith(("deepspeed", "accelerate.utils.deepspeed")) for each in type(part).__mro__):
        _refuse_deepspeed_of(type(part).__name__)


def _refuse_deepspeed_of(found: str) -> NoReturn:
    raise SPFError(
        f"expected an optimizer that steps when it is told to, found DeepSpeed's ({found}), which steps inside "
        "backward() on flat parts of the weights; train with DDP, FSDP2 or on one device"
    )


def trained_parameters(model: nn.Module, optimizer: Any) -> dict[str, nn.Parameter]:
    """Return the trainable parameters that an optimizer holds, by their name in the model.

    Raises:
        SPFError: If there are none, one is not the model's, or one has no values here.
    """
    _refuse_deepspeed(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = {}
    for group in unwrapped(optimizer).param_groups:
        for parameter in group["params"]:
            if hasattr(parameter, "ds_id"):
                _refuse_deepspeed_of("a parameter in pieces")
            if not parameter.requires_grad:
                continue
            if id(parameter) not in names:
                raise SPFError(
                    f"expected the optimizer to hold the model's parameters, found one of shape "
                    f"{tuple(parameter.shape)} that is not; build the optimizer from this very model"
                )
            trained[names[id(parameter)]] = parameter
    if not trained:
        raise SPFError(
            "expected an optimizer with trainable parameters, found none; unfreeze the model, or after changing "
            "adapters build a new optimizer and attach again"
        )
    refuse_unseen_values({name: one for name, one in trained.items() if not is_sharded(one)}, SPFError)
    return trained


class Guarded:
    """The weights that a guard watches.

    Args:
        model: The model that is trained.
        optimizer: Its optimizer.
        level: Where the rule projects: an adapter's product is one block of the update; gradients are of its factors.
        master: Whether weights below fp32 are kept in fp32 beside.
    """

    def __init__(self, model: nn.Module, optimizer: Any, level: Level, *, master: bool = False) -> None:
        """Find them."""
        self.model = unwrapped_model(model)
        self._optimizer, self._level, self._master = optimizer, level, master
        self._signature: object = None
        self.parameters: dict[str, nn.Parameter] = {}
        self.blocks: dict[str, Block] = {}
        self._moved: dict[str, nn.Parameter] = {}  # what is collected for each block
        self._adapters: dict[str, Adapter] = {}  # of the blocks that are products
        self.refresh()
        sharded = [parameter for parameter in self.parameters.values() if is_sharded(parameter)]
        if sharded and master and self.masters():
            raise SPFError(
                "expected whole weights for master_weights, found sharded ones; have FSDP2 itself keep fp32 weights, "
                "with a mixed precision policy"
            )
        groups = {process_group(parameter) for parameter in sharded}
        if len(groups) > 1:
            raise SPFError(
                f"expected weights that are sharded over one group of processes, found {len(groups)}; use one mesh"
            )
        self.processes = Processes.of_this_run(next(iter(groups), None))

    def refresh(self) -> bool:
        """Find the weights again if others are trained than before; return whether that is so."""
        reshard(self.model)
        groups = unwrapped(self._optimizer).param_groups
        trained = [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]
        signature = [(id(one), 0 if is_sharded(one) else one.data_ptr()) for one in trained]
        if signature == self._signature:
            return False
        changed, self._signature = self._signature is not None, signature
        self.parameters = trained_parameters(self.model, self._optimizer)
        self._adapters = self._found_adapters() if self._level == "update" else {}
        self.blocks, self._moved = self._divided()
        if changed:
            _LOGGER.warning("other weights are trained from this step on: %d blocks", len(self.blocks))
        return changed

    def _found_adapters(self) -> dict[str, Adapter]:
        """Return the adapters whose product is a block, by the name of the weight that they are added to."""
        found = {}
        for name, adapter in adapters(self.model, self.parameters):
            if name in self.parameters:  # where the base is trained as well, a sum moves and no product alone
                continue
            if any(map(is_sharded, (adapter.first, adapter.second, adapter.base))):
                raise SPFError(
                    f"expected whole adapters, found '{name}' with sharded ones; train adapters with DDP or on one "
                    "device"
                )
            found[name] = adapter
        return found

    def _divided(self) -> tuple[dict[str, Block], dict[str, nn.Parameter]]:
        """Divide the weights into blocks."""
        blocks: dict[str, Block] = {}
        moved: dict[str, nn.Parameter] = {}
        factors: set[int] = set()
        for name, adapter in self._adapters.items():
            blocks[name] = ProductBlock(adapter.first.detach(), adapter.second.detach(), adapter.scaling)
            moved[name] = adapter.base
            factors |= {id(adapter.first), id(adapter.second)}
        for name, parameter in self.parameters.items():
            if id(parameter) not in factors:
                blocks[name] = tensor_block(parameter, parameter, master=self._master)
                moved[name] = parameter
        return blocks, moved

    def as_used(self, products: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return those of some inner products with parameters that are their blocks' as well."""
        return {name: one for name, one in products.items() if self.blocks[name].is_used}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Have the blocks' weights whole, and them alone trainable, inside the block."""
        with ExitStack() as stack:
            stack.enter_context(gathered(self.model))
            wanted = set(self._moved)
            found = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
            try:
                for name, parameter in self.model.named_parameters():
                    parameter.requires_grad_(name in wanted)
                yield
            finally:
                for parameter, needs in found:
                    parameter.requires_grad_(needs)

    def gradient_block(self, name: str) -> Block | None:
        """Return the block that holds a step −g_u, g_u being a parameter's gradient; ``None`` where it has none."""
        parameter = self.parameters[name]
        return None if parameter.grad is None else tensor_block(_dense(name, parameter.grad), parameter, scale=-1.0)

    def add_to_gradients(self, name: str, moves: Sequence[Move]) -> None:
        """Add gradients by a block to those of its parameters: for W = s·BA, s·GAᵀ to B's and s·BᵀG to A's."""
        adapter = self._adapters.get(name)
        if adapter is None:
            parameter = self.parameters[name]
            tensor_block(_dense(name, _make_gradient(parameter)), parameter).apply(moves)
            return
        first, second, scaling = adapter.first.detach().double(), adapter.second.detach().double(), adapter.scaling
        for gradient, amount in moves:
            parts = ((adapter.first, gradient.rmatmul(second.T)), (adapter.second, gradient.matmul(first.T)))
            for factor, part in parts:
                if factor.requires_grad:
                    _make_gradient(factor).add_((amount * scaling * part).to(factor.dtype))

    def settle(self) -> None:
        """Take in what the optimizer did to weights that are kept in fp32 beside."""
        for block in self._tensors().values():
            block.settle()

    def release(self) -> None:
        """Round weights that are kept in fp32 beside into the model's."""
        for block in self._tensors().values():
            block.release()

    def _tensors(self) -> dict[str, TensorBlock]:
        return {name: block for name, block in self.blocks.items() if isinstance(block, TensorBlock)}

    def without_masters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that have no fp32 weights beside them."""
        kept = set(self.masters())
        return {name: parameter for name, parameter in self.parameters.items() if name not in kept}

    def masters(self) -> dict[str, Tensor]:
        """Return the fp32 weights that are kept beside those of fewer bits."""
        return {name: block.master for name, block in self._tensors().items() if block.master is not None}

    def load_masters(self, masters: Mapping[str, Tensor]) -> None:
        """Take over fp32 weights that were saved."""
        for name, own in self.masters().items():
            own.copy_(masters[name])


def tensor_block(tensor: Tensor, parameter: nn.Parameter, *, scale: float = 1.0, master: bool = False) -> TensorBlock:
    """Return the block of a tensor that is laid out as a parameter is, sharded or whole.

    Args:
        tensor: The parameter itself, or its gradient.
        parameter: The parameter.
        scale: See :class:`TensorBlock`.
        master: See :class:`TensorBlock`.
    """
    if not is_sharded(parameter):
        return TensorBlock(tensor.detach(), scale=scale, master=master)
    local = cast("DTensor", tensor.detach()).to_local()
    first = local_rows(parameter)
    each = parameter.shape[1:-1].numel()
    rows = slice(first.start * each, first.stop * each)
    return TensorBlock(local, scale=scale, rows=rows, master=master)


def _dense(name: str, gradient: Tensor) -> Tensor:
    """Return a gradient that is not sparse.

    Raises:
        SPFError: If it is.
    """
    if gradient.is_sparse:
        raise SPFError(
            f"expected dense gradients for a rule that changes them, found a sparse one of '{name}'; make the "
            "embedding with sparse=False, or take a rule on the update"
        )
    return gradient


def _make_gradient(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's gradient, one of zeros where it has none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def refuse_broken_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse a step with a gradient that is not finite, while the weights are still as they were.

    Raises:
        SPFError: If there is one.
    """
    for name, parameter in parameters.items():
        # A sum that is finite has finite parts only, and takes one look at them.
        gradient = parameter.grad
        if gradient is None or bool(torch.isfinite(gradient.sum(dtype=torch.float32))):
            continue
        if not bool(torch.isfinite(gradient).all()):
            raise SPFError(
                f"{name}: expected a finite gradient before optimizer.step(), found NaN or inf; the weights are as "
                "they were: lower the learning rate, or leave the batch out"
            )


def warn_of_rounding(parameters: Mapping[str, nn.Parameter]) -> None:
    """Log a warning where weights are kept in fewer bits than a projection needs."""
    types = {parameter.dtype for parameter in parameters.values()} - {torch.float32, torch.float64}
    if types:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types))
        _LOGGER.warning(
            "the weights are %s: rounding them can undo part of a projection, and the certificate tolerates that much; "
            "train in float32, or give SPF(master_weights=True), for a constraint that binds",
            names,
        )
