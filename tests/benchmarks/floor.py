"""The least that any hook-based collector has to do, written by hand for this one model: what the rest costs on top.

Weights are frozen, so autograd skips every weight gradient; hooks keep the inputs and the output gradients of the
linear layers and do nothing else.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from tests.benchmarks.agreement import Reference, error_of_samples
from tests.benchmarks.contender import Contender, whole
from tests.benchmarks.workload import Workload

Factors = dict[str, tuple[Tensor, Tensor]]


@contextmanager
def only_embeddings_train(model: nn.Module) -> Iterator[None]:
    """Freeze all weights; the output of the embedding still needs a gradient, so that deltas flow."""
    found = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    handle = model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, out: out.requires_grad_())
    try:
        model.requires_grad_(False)
        yield
    finally:
        handle.remove()
        for parameter, trains in found:
            parameter.requires_grad_(trains)


def keep_factors(workload: Workload) -> Factors:
    """Return the input and the output gradient of every linear layer."""
    kept: Factors = {}

    def recorder(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> None:
            output.register_hook(lambda delta: kept.update({name: (inputs[0].detach(), delta)}))

        return hook

    with only_embeddings_train(workload.model):
        handles = [layer.register_forward_hook(recorder(name)) for name, layer in workload.linears.items()]
        try:
            workload.loss(workload.input_ids).backward()
        finally:
            for handle in handles:
                handle.remove()
    return kept


def _error(factors: Factors, workload: Workload, reference: Reference) -> float:
    tied = workload.model.get_output_embeddings().weight is workload.model.get_input_embeddings().weight

    def gradient(name: str) -> Tensor | None:
        if name not in factors or (tied and "embed" in name):  # of a tied head, the factors are a part alone
            return None
        source, delta = factors[name]
        return workload.batch * delta.mT @ source  # the loss is the mean over the batch

    return error_of_samples(gradient, reference)


FLOOR = (Contender("hooks by hand, linear layers only", whole(keep_factors), _error),)
