"""Operations and memory of one forward and backward pass, from a run on tensors without values.

PyTorch's fake tensors have a shape and a device but no memory. A pass on them takes about a second for a model of any
size, follows the model's own code, and tells every tensor that a pass on real ones would make.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class PassCost:
    """What one forward and backward pass needs.

    Attributes:
        operations: Floating-point operations of the matrix products and of the attention; a multiply-add counts two.
        peak: Largest number of bytes of tensors at any time, the weights not included, the gradients included.
    """

    operations: int
    peak: int


def simulate(model: nn.Module, examples: int, length: int, *, weight_gradients: bool, device: str = "cpu") -> PassCost:
    """Return the cost of a pass over a batch, without running the model.

    Args:
        model: A causal language model of transformers; its weights are not read, and may be on the meta device.
        examples: Number of examples in the batch.
        length: Number of tokens of each.
        weight_gradients: Whether autograd computes the gradients of the trainable weights, as in training, or only
            those of the activations, as in a collection from factors.
        device: The device that weights on the meta device are thought to be on; it decides the kernels.
    """
    mode = FakeTensorMode()
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    fakes = {id(tensor): _fake(mode, tensor, device) for _, tensor in named}
    trainable = [fakes[id(parameter)] for parameter in model.parameters() if parameter.requires_grad]
    place = fakes[id(next(model.parameters()))].device
    with mode, torch.enable_grad(), _Memory(fakes.values()) as memory, FlopCounterMode(display=False) as counter:
        # 1. Forward. In a collection the output of the embedding needs a gradient, whether the embedding does or not.
        ids = torch.zeros(examples, length, dtype=torch.long, device=place)
        arguments = {"input_ids": ids, "labels": ids, "use_cache": False}
        with _nothing_kept() if weight_gradients else _embeddings_kept(model) as embedded:
            loss = functional_call(model, {name: fakes[id(tensor)] for name, tensor in named}, kwargs=arguments).loss
        # 2. Backward.
        gradients = torch.autograd.grad(loss, trainable if weight_gradients else embedded, allow_unused=True)
        del gradients
    return PassCost(counter.get_total_flops(), memory.most)


def _fake(mode: FakeTensorMode, tensor: Tensor, device: str) -> Tensor:
    if tensor.device.type != "meta":
        return mode.from_tensor(tensor)
    with mode:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        return empty.requires_grad_(tensor.requires_grad)


def _nothing_kept() -> AbstractContextManager[list[Tensor]]:
    return nullcontext([])


@contextmanager
def _embeddings_kept(model: Any) -> Iterator[list[Tensor]]:
    """Keep the output of the model's token embedding and make it need a gradient, inside the block.

    Yields:
        The list that the output is put in.
    """
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        # A view, since the counter of operations cannot do with a leaf whose gradient is asked for.
        outputs.append(output if output.requires_grad else output.requires_grad_().view_as(output))
        return outputs[-1]

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


class _Memory(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch does not annotate it
    """Number of bytes of the tensors that were made inside the context, now and at most."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        """Start with tensors that do not count."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {tensor.untyped_storage()._cdata for tensor in known}  # noqa: SLF001 - the only identity
        self.now = self.most = 0

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and count the memory of its results until they are freed."""
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and (key := leaf.untyped_storage()._cdata) not in self._known:  # noqa: SLF001
                storage = leaf.untyped_storage()
                self._known.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._drop, key, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
