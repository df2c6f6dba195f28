"""Other ways to the gradient of every single example, each used as its documentation says."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.agreement import Reference, error_of_samples
from tests.benchmarks.contender import Contender, Piece, whole
from tests.benchmarks.workload import Workload

Stacked = dict[str, Tensor]
"""(B, *shape) gradients by parameter."""


def _error(stacked: Stacked, _workload: Workload, reference: Reference) -> float:
    return error_of_samples(stacked.get, reference)


def one_at_a_time(workload: Workload) -> Stacked:
    """Run each example alone and copy ``.grad``."""
    stored = {
        name: parameter.new_empty((workload.batch, *parameter.shape))
        for name, parameter in workload.model.named_parameters()
    }
    for row in range(workload.batch):
        workload.model.zero_grad(set_to_none=True)
        workload.loss(workload.input_ids[row : row + 1]).backward()
        for name, parameter in workload.model.named_parameters():
            stored[name][row] = parameter.grad
    workload.model.zero_grad(set_to_none=True)
    return stored


def one_at_a_time_read(workload: Workload) -> None:
    """Run each example alone and keep nothing: what is left for someone who only reduces ``.grad``."""
    for row in range(workload.batch):
        workload.model.zero_grad(set_to_none=True)
        workload.loss(workload.input_ids[row : row + 1]).backward()
    workload.model.zero_grad(set_to_none=True)


def prepare_torch_func(workload: Workload) -> Sequence[Piece]:
    """``vmap(grad(functional_call))``, as in PyTorch's tutorial on per-sample gradients."""
    from torch.func import functional_call, grad, vmap

    weights = {name: parameter.detach() for name, parameter in workload.model.named_parameters()}

    def loss(parameters: Stacked, ids: Tensor) -> Tensor:
        # No mask: building one looks at its values, which vmap forbids, and all rows are full.
        batch = {"input_ids": ids[None], "labels": ids[None]}
        value: Tensor = functional_call(workload.model, parameters, (), batch).loss
        return value

    return [Piece(lambda: vmap(grad(loss), in_dims=(None, 0))(weights, workload.input_ids))]


def prepare_opacus(workload: Workload) -> Sequence[Piece]:
    """Wrap a copy of the model in ``GradSampleModule``, with opacus' own sampler for its RMSNorm.

    LlamaRMSNorm is not torch's, so opacus would differentiate it with functorch; it gets the sampler that opacus
    registers for torch's, which is faster. ``strict=False`` lets the rotary buffers pass.
    """
    from opacus.grad_sample import GradSampleModule, compute_rms_norm_grad_sample
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def norm_sampler(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
        layer.normalized_shape, layer.eps = layer.weight.shape, layer.variance_epsilon
        found: dict[nn.Parameter, Tensor] = compute_rms_norm_grad_sample(layer, activations, backprops)
        return found

    copied = workload.copy().train()  # opacus records nothing in eval mode; there is no dropout here
    wrapped = GradSampleModule(copied, batch_first=True, loss_reduction="mean", strict=False)
    wrapped.GRAD_SAMPLERS = {**wrapped.GRAD_SAMPLERS, LlamaRMSNorm: norm_sampler}
    return [Piece(partial(_run_opacus, wrapped, workload.input_ids))]


def _run_opacus(wrapped: Any, input_ids: Tensor) -> Stacked:
    wrapped.zero_grad(set_to_none=True)
    mask = torch.ones_like(input_ids)
    wrapped(input_ids=input_ids, attention_mask=mask, labels=input_ids).loss.backward()
    parameters = dict(wrapped._module.named_parameters())
    return {name: parameter.grad_sample for name, parameter in parameters.items()}


def prepare_dense_svd(workload: Workload) -> Sequence[Piece]:
    """``torch.linalg.svdvals`` of one example's gradient of each shape, times the number of such gradients.

    The decompositions alone: forming the gradients comes on top. All of them would take minutes.
    """
    names = list(workload.linears)
    gradients = workload.gradients(slice(0, 1), names)
    shapes = {tuple(gradients[name].shape): name for name in names}
    of_shape = [tuple(gradients[name].shape) for name in names]
    return [
        Piece(partial(torch.linalg.svdvals, gradients[name]), times=of_shape.count(shape) * workload.batch)
        for shape, name in shapes.items()
    ]


OPPONENTS = (
    Contender("autograd, one example at a time", whole(one_at_a_time), _error),
    Contender("the same, keeping nothing", whole(one_at_a_time_read)),
    Contender("torch.func vmap(grad)", prepare_torch_func, _error),
    Contender("opacus GradSampleModule", prepare_opacus, _error),
    Contender("dense svdvals, decompositions only", prepare_dense_svd, memory=False),
)
