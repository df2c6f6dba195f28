"""The weights that a guard protects, divided into blocks, and the weights that it refuses."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from geomkit.errors import SPFError
from geomkit.inputs.parameters import unwrapped_model
from geomkit.spf.rule import Level
from geomkit.spf.weights.adapters import Adapter, Adapters, find_adapters, make_gradient, warn_of_factors
from geomkit.spf.weights.blocks import Block, Move, ProductBlock, TensorBlock
from geomkit.spf.weights.processes import Processes
from geomkit.spf.weights.sharding import gathered, is_sharded, local_rows, process_group, reshard
from geomkit.spf.weights.trained import can_move, held_parameters, refuse_frozen, trained_parameters, unwrapped
from geomkit.utils.precision import at_least_fp32, full_precision, no_autocast

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_LOGGER = logging.getLogger(__name__)


class Guarded:
    """The weights that a guard protects, divided into blocks.

    Args:
        model: The model that is trained.
        optimizer: An optimizer of the model, with or without wrapper.
        level: The rule's level. For ``"update"`` the product of an adapter is one block; for ``"gradient"`` its two
            factors are two blocks, since each factor has a gradient.
        master: Whether to store fp32 master weights for weights of fewer bits.

    Attributes:
        model: The model, unwrapped.
        optimizer: The optimizer, unwrapped.
        parameters: The trained parameters, by name.
        blocks: The blocks, by the name of the parameter whose gradient is collected for the block.
        by_factor: For each adapted layer that is protected factor by factor, not as a product, the reason.
        processes: The processes that train the model.
    """

    def __init__(self, model: nn.Module, optimizer: Any, level: Level, *, master: bool = False) -> None:
        """Collect the weights that the optimizer moves, and divide them into blocks."""
        self.model, self.optimizer = unwrapped_model(model), unwrapped(optimizer)
        self._level, self._master = level, master
        self._signature: list[tuple[object, ...]] | None = None
        self.parameters: dict[str, nn.Parameter] = {}
        self.blocks: dict[str, Block] = {}
        self._collected: dict[str, nn.Parameter] = {}  # parameter whose gradient is collected, by block
        self._adapters: Mapping[str, Adapter] = {}  # adapters of the blocks that are products
        self.by_factor: Mapping[str, str] = {}
        self.refresh()
        sharded = [parameter for parameter in self.parameters.values() if is_sharded(parameter)]
        if sharded and master and self.fp32_masters():
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
        """Divide the weights anew if the set of trained weights has changed, and return whether it has changed.

        Raises:
            SPFError: If no weight is trained, or a weight cannot be guarded.
        """
        reshard(self.model)
        held = held_parameters(self.optimizer)
        refuse_frozen(held)
        signature = _places(filter(can_move, held))
        if signature == self._signature:
            return False
        if self._signature and _identities(signature) == _identities(self._signature):
            self.follow_storage()
            return False
        changed, self._signature = self._signature is not None, signature
        self.parameters = trained_parameters(self.model, self.optimizer)
        adapters = self._find_adapters() if self._level == "update" else Adapters({}, {})
        self._adapters, self.by_factor = adapters.products, adapters.by_factor
        self.blocks, self._collected = self._divide()
        if changed:
            _LOGGER.warning("other weights are trained from this step on: %d blocks", len(self.blocks))
        warn_of_factors(self.by_factor)
        return changed

    def follow_storage(self) -> None:
        """Divide the weights anew where new tensors have been assigned to the parameters' ``data``.

        Raises:
            SPFError: If the new tensors have other shapes, types or devices.
        """
        before, now = self._signature or [], _places(self.parameters.values())
        if now == before:
            return
        if _identities(now) != _identities(before):
            raise SPFError(
                "expected optimizer.step() to keep the shape, type and device of every parameter, found another; let "
                "steps change values only"
            )
        masters, self._signature = self.fp32_masters(), now
        self.blocks, self._collected = self._divide()
        self.load_fp32_masters(masters)

    @property
    def share(self) -> float:
        """Share of the model's trainable parameters, counted as numbers, that is under guard."""
        trainable = {id(weight): weight.numel() for weight in self.model.parameters() if weight.requires_grad}
        guarded = {id(weight): weight.numel() for weight in self.parameters.values()}
        return sum(guarded.values()) / sum((trainable | guarded).values())

    def _find_adapters(self) -> Adapters:
        """Return the adapted layers.

        Raises:
            SPFError: If an adapter whose product is a block is sharded.
        """
        adapters = find_adapters(self.model, self.parameters)
        for name, adapter in adapters.products.items():
            factors = [factor for term in adapter.terms for factor in (term.first, term.second)]
            if any(map(is_sharded, (*factors, adapter.base))):
                raise SPFError(
                    f"expected whole adapters, found '{name}' with sharded ones; train adapters with DDP or on one "
                    "device"
                )
        return adapters

    def refuse_open_products(self, rule: str) -> None:
        """Check that the products of adapters can stay outside a subspace that a rule closes for good.

        Args:
            rule: Name of the rule.

        Raises:
            SPFError: If the product of an adapter cannot.
        """
        for name, block in self.blocks.items():
            if isinstance(block, ProductBlock) and not block.can_be_closed:
                raise SPFError(
                    f"expected new adapters of linear layers, whose B is zero, under rule '{rule}', found another at "
                    f"'{name}', whose product leaves the subspace whenever A moves; merge it into the model and "
                    "train a new one, or take a rule that closes no subspace, such as 'left'"
                )

    def _divide(self) -> tuple[dict[str, Block], dict[str, nn.Parameter]]:
        """Return the blocks, and for each block the parameter whose gradient is collected."""
        blocks: dict[str, Block] = {}
        collected: dict[str, nn.Parameter] = {}
        factors: set[int] = set()
        for name, adapter in self._adapters.items():
            blocks[name] = adapter.block()
            collected[name] = adapter.base
            factors |= {id(factor) for term in adapter.terms for factor in (term.first, term.second)}
        for name, parameter in self.parameters.items():
            if id(parameter) not in factors:
                blocks[name] = tensor_block(parameter, parameter, master=self._master)
                collected[name] = parameter
        return blocks, collected

    def as_used(self, products: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the products ⟨W, g⟩ of the blocks that store exactly the parameters with which the model computes.

        Args:
            products: By parameter the inner products that the pass over the anchors has computed.
        """
        return {name: product for name, product in products.items() if self.blocks[name].is_used}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Gather sharded weights inside the ``with`` block, where only the collected parameters need a gradient."""
        with ExitStack() as stack:
            stack.enter_context(gathered(self.model))
            before = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
            try:
                for name, parameter in self.model.named_parameters():
                    parameter.requires_grad_(name in self._collected)
                yield
            finally:
                for parameter, requires_grad in before:
                    parameter.requires_grad_(requires_grad)

    def gradient_block(self, name: str) -> Block | None:
        """Return the block of the step −g_u for a parameter's gradient g_u; ``None`` if it has no gradient."""
        parameter = self.parameters[name]
        return None if parameter.grad is None else tensor_block(_dense(name, parameter.grad), parameter, scale=-1.0)

    def add_to_gradients(self, name: str, moves: Sequence[Move]) -> None:
        """Add gradients of a block to ``.grad`` of its trainable parameters."""
        if name in self._adapters:
            self._adapters[name].add_to_gradients(moves)
            return
        parameter = self.parameters[name]
        if parameter.requires_grad:
            tensor_block(_dense(name, make_gradient(parameter)), parameter).apply(moves)

    def pull_updates_into_masters(self) -> None:
        """Add the optimizer's change of the rounded weights to their fp32 master weights."""
        for block in self._tensors().values():
            block.pull_update_into_master()

    def round_masters_into_weights(self) -> None:
        """Set the model's weights to their rounded fp32 master weights."""
        for block in self._tensors().values():
            block.round_master_into_weight()

    @property
    def unmoved(self) -> dict[str, nn.Parameter]:
        """The model's parameters that the optimizer holds, but that no step may move: frozen, and without gradient."""
        held = {id(parameter) for parameter in held_parameters(self.optimizer) if not can_move(parameter)}
        return {name: parameter for name, parameter in self.model.named_parameters() if id(parameter) in held}

    @property
    def all_trainable(self) -> bool:
        """Whether every guarded parameter is trainable, rather than frozen and with a gradient all the same."""
        return all(parameter.requires_grad for parameter in self.parameters.values())

    def reading(self) -> dict[str, Tensor]:
        """Return W r of every guarded parameter W, with a fixed random r: (rows on this process,), to tell a change."""
        products = {}
        for name, parameter in self.parameters.items():
            values = parameter.detach()
            local = cast("DTensor", values).to_local() if is_sharded(parameter) else values
            matrix = at_least_fp32(local.reshape(-1, local.shape[-1] if local.ndim > 1 else 1))
            generator = torch.Generator().manual_seed(matrix.shape[1])
            direction = torch.randn(matrix.shape[1], generator=generator, dtype=matrix.dtype)
            with full_precision(), no_autocast(matrix.device):
                products[name] = matrix @ direction.to(matrix.device)
        return products

    def _tensors(self) -> dict[str, TensorBlock]:
        return {name: block for name, block in self.blocks.items() if isinstance(block, TensorBlock)}

    def without_masters(self) -> dict[str, nn.Parameter]:
        """Return the parameters without an fp32 master weight."""
        masters = self.fp32_masters()
        return {name: parameter for name, parameter in self.parameters.items() if name not in masters}

    def fp32_masters(self) -> dict[str, Tensor]:
        """Return the fp32 master weights, by the names of the weights of fewer bits."""
        return {name: block.master for name, block in self._tensors().items() if block.master is not None}

    def load_fp32_masters(self, saved: Mapping[str, Tensor]) -> None:
        """Set the fp32 master weights to saved master weights."""
        for name, master in self.fp32_masters().items():
            master.copy_(saved[name])


def _places(parameters: Iterable[nn.Parameter]) -> list[tuple[object, ...]]:
    """Return for each parameter its identity, shape, type and device, and last its place in memory."""
    return [
        (
            id(parameter), parameter.shape, parameter.dtype, parameter.device,
            0 if is_sharded(parameter) else parameter.data_ptr(),
        )
        for parameter in parameters
    ]  # fmt: skip


def _identities(places: Sequence[tuple[object, ...]]) -> list[tuple[object, ...]]:
    """Return the places without the last entry, the place in memory."""
    return [place[:-1] for place in places]


def tensor_block(tensor: Tensor, parameter: nn.Parameter, *, scale: float = 1.0, master: bool = False) -> TensorBlock:
    """Return the block of a tensor that has the layout of a parameter, sharded or whole.

    Args:
        tensor: The parameter itself, or its gradient.
        parameter: The parameter.
        scale: See :class:`TensorBlock`.
        master: See :class:`TensorBlock`.
    """
    if not is_sharded(parameter):
        return TensorBlock(tensor.detach(), scale=scale, master=master)
    local = cast("DTensor", tensor.detach()).to_local()
    # Sharded along the first dimension of a tensor (E, m, n): each of its indices has m rows of the matrix (E·m, n).
    indices = local_rows(parameter)
    height = parameter.shape[1:-1].numel()
    rows = slice(indices.start * height, indices.stop * height)
    return TensorBlock(local, scale=scale, rows=rows, master=master)


def _dense(name: str, gradient: Tensor) -> Tensor:
    """Return the gradient.

    Raises:
        SPFError: If the gradient is a sparse tensor.
    """
    if gradient.is_sparse:
        raise SPFError(
            f"expected dense gradients for a rule that changes them, found a sparse one of '{name}'; make the "
            "embedding with sparse=False, or take a rule on the update"
        )
    return gradient
