"""Collection of the gradient of the loss on a set of examples, and of each example's loss."""

import logging
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import nn

from geomkit.collection.exchange import exchange_samples, exchange_sums
from geomkit.collection.memory import Counts, most_collected_bytes
from geomkit.collection.passes import ProductSink
from geomkit.collection.streaming import TOKENS_PER_BATCH, StreamResult, stream
from geomkit.collection.target import Target
from geomkit.errors import CollectionError
from geomkit.gradients.accumulator import Accumulator
from geomkit.gradients.arithmetic import zero_gradient
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.gradient_set import Coverage, GradientSet
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.gradients.provenance import provenance_of
from geomkit.inputs.fits import encoded_for
from geomkit.inputs.loss import Reduction, TokenLoss, token_losses
from geomkit.inputs.parameters import Layers, as_selection, chosen_parameters, unwrapped_model, workers_of
from geomkit.inputs.tokens import EncodedExamples, Tokens, tokens_fingerprint
from geomkit.utils.display import human_bytes
from geomkit.utils.free_memory import free_bytes
from geomkit.utils.workers import ALONE, Workers, first_process

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOGGER = logging.getLogger(__name__)

Form = Literal["auto", "factored"]
"""Form of the summed gradient of a matrix: factors if that is smaller than dense, or factors always."""


def collect_gradients(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: "Dataset | EncodedExamples",
    per_sample: bool = False,
    *,
    layers: Layers = "*",
    reduction: Reduction = "example",
    form: Form = "auto",
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: bool = True,
) -> GradientSet:
    """Return the gradient of the loss on a set of examples, for every trainable parameter.

    The loss is the cross-entropy on assistant tokens, averaged within each example and over the examples. The model
    runs in eval mode. Its state is restored afterwards, also after an exception: modes, ``.grad``, hooks,
    ``requires_grad`` and random state. Memory does not grow with the number of examples, unless ``per_sample`` is set:
    a warning is logged where more memory may then be needed than is free.

    The processes of a run with :mod:`torch.distributed`, as ``accelerate launch`` starts them, divide the examples, and
    every process returns the gradient of all. So all processes must make the call, with the same examples; calls of one
    process go into a block ``with geomkit.utils.workers.by_itself()``.

    Args:
        model: A causal language model. DDP and ``torch.compile`` are unwrapped.
        tokenizer: Tokenizer of the model, with a chat template and a pad token.
        examples: N rows with a column ``messages``; :func:`geomkit.load_examples` makes them.
        per_sample: Also store the gradient of each example's loss, in ``samples``. :func:`geomkit.measure_samples`
            stores a few numbers of each gradient instead.
        layers: Glob pattern on parameter names such as ``"*.mlp.*"``, numbers of decoder layers such as ``[10, 20]``, a
            list of patterns or of numbers, or :func:`geomkit.select`.
        reduction: ``"example"`` gives all examples the same weight in the mean; ``"token"`` gives all tokens the same
            weight, as ``model(labels=…)`` does.
        form: ``"auto"`` stores the two factors of a linear layer as long as they are smaller than the dense gradient;
            ``"factored"`` stores them always, as token matching and the random-factor null need.
        tokens_per_batch: Largest number of token positions in a batch, padding included; lower it to save memory.
        progress: Show a progress bar, in tokens.

    Returns:
        The gradients: a mapping from parameter names, in the order of the model, to gradients.

    Raises:
        DataError: If the examples cannot be encoded.
        CollectionError: If no trainable parameter matches, weights are sharded or on the meta device, or a loss or
            gradient is not finite.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> gradients = gk.collect_gradients(model, tokenizer, gk.load_examples("safety").select([0]), progress=False)
        >>> gradients["lm_head.weight"].tokens < 30, gradients.coverage.share
        (True, 1.0)
    """
    workers = workers_of(model)
    with workers.failing_together():
        rows, pad = encoded_for(model, tokenizer, examples, progress)
        if per_sample:
            _warn_if_large(unwrapped_model(model), rows, layers, keep_factors=form == "factored")
    gradients = collect_from_tokens(
        model,
        rows,
        pad,
        per_sample=per_sample,
        layers=layers,
        reduction=reduction,
        form=form,
        tokens_per_batch=tokens_per_batch,
        progress=progress,
        workers=workers,
    )
    origin = provenance_of(model, rows, reduction=reduction, layers=str(as_selection(layers)))
    # The row of each sample is told by the fingerprint of its tokens, so that copies are found.
    samples = tuple(
        replace(sample, provenance=replace(origin, data=tokens_fingerprint([row]), examples=1))
        for sample, row in zip(gradients.samples, rows if per_sample else (), strict=True)
    )
    return replace(gradients, samples=samples, provenance=origin)


def _warn_if_large(model: nn.Module, rows: EncodedExamples, layers: Layers, *, keep_factors: bool) -> None:
    """Log a warning if the gradients of the examples may not fit into memory: no error could tell of that later."""
    chosen = set(chosen_parameters(model, as_selection(layers)).values())
    devices: dict[torch.device, set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters():
        if name in chosen:
            devices[parameter.device].add(name)
    counts = Counts.of(rows)
    for device, names in devices.items():
        needed, free = most_collected_bytes(model, counts, names, keep_factors=keep_factors), free_bytes(device)
        if needed is not None and free is not None and needed > free and first_process():
            _LOGGER.warning(
                "the gradients of %d examples take up to %s, and %s of memory are free; give fewer examples or a part "
                "of the layers (layers=), or take geomkit.measure_samples",
                len(rows), human_bytes(needed), human_bytes(free),
            )  # fmt: skip


def collect_from_tokens(
    model: nn.Module,
    rows: Sequence[Tokens],
    pad: int,
    *,
    per_sample: bool = False,
    layers: Layers = "*",
    reduction: Reduction = "example",
    form: Form = "auto",
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: bool = False,
    products: ProductSink | None = None,
    token_loss: TokenLoss = token_losses,
    workers: Workers = ALONE,
) -> GradientSet:
    """Return the gradient of the loss on examples that are already tokens; see :func:`collect_gradients`.

    ``pad`` is the id of the token that fills short rows. ``products`` receives, part by part, the inner products ⟨W, G⟩
    of the weights and the gradient of the summed loss, not of the mean; see :func:`geomkit.collection.passes.run_pass`.
    With a ``token_loss`` other than the cross-entropy, ``per_sample`` is not available. ``workers`` divide the
    examples, and ``products`` receives the part of this worker only.
    """
    if form not in get_args(Form):
        raise CollectionError(
            f"expected the form {' or '.join(get_args(Form))}, found {form!r}; give one of these as form="
        )
    sums: dict[str, Accumulator] = defaultdict(lambda: Accumulator(keep_factors=form == "factored"))
    samples: list[dict[str, LayerGradient]] = [{} for _ in rows]

    def store_samples(name: str, examples: Sequence[int], gradients: Sequence[LayerGradient]) -> None:
        for example, gradient in zip(examples, gradients, strict=True):
            samples[example][name] = gradient

    result = stream(
        model,
        rows,
        pad,
        as_selection(layers),
        reduction=reduction,
        tokens_per_batch=tokens_per_batch,
        progress=progress,
        sums=lambda name, gradient: sums[name].add(gradient),
        samples=store_samples if per_sample else None,
        products=products,
        token_loss=token_loss,
        workers=workers,
    )
    exchange_sums(workers, sums, result.target.parameters, keep_factors=form == "factored")
    exchange_samples(workers, samples if per_sample else [], result.target.parameters)
    # The gradient of the mean Σ_i w_i loss_i / Σ_i w_i is the gradient of the sum, divided by the total weight.
    weights = result.loss_tokens if reduction == "token" else [1] * len(rows)
    parameters = result.target.parameters
    means = {name: sums.pop(name).total(1 / sum(weights)) for name in parameters if name in sums}
    _refuse_overflow(means)
    coverage = coverage_of(result.target, means)
    return GradientSet(
        means,
        loss=sum(loss * weight for loss, weight in zip(result.losses, weights, strict=True)) / sum(weights),
        examples=len(rows),
        loss_tokens=sum(result.loss_tokens),
        coverage=coverage,
        samples=_sample_sets(samples, result, means, coverage) if per_sample else (),
    )


def _refuse_overflow(gradients: Mapping[str, LayerGradient]) -> None:
    """Raise an error if a dense sum has overflowed; the values of factors are not sums over examples."""
    dense = {name: gradient.tensor for name, gradient in gradients.items() if isinstance(gradient, DenseGradient)}
    # The sum of all entries is finite only if all entries are, and needs one transfer from the device.
    for name in (name for name, tensor in dense.items() if not bool(torch.isfinite(tensor.sum()))):
        if not bool(torch.isfinite(dense[name]).all()):
            raise CollectionError(
                f"expected a finite sum of gradients of {name}, found an overflow; run the model in fp64"
            )


def _sample_sets(
    samples: Sequence[Mapping[str, LayerGradient]],
    result: StreamResult,
    means: Mapping[str, LayerGradient],
    coverage: Coverage,
) -> tuple[GradientSet, ...]:
    """Return a set per example, all with the same parameters; a missing gradient is zero."""
    return tuple(
        GradientSet(
            {name: gradients.get(name) or zero_gradient(mean.shape, mean.device) for name, mean in means.items()},
            loss,
            1,
            loss_tokens,
            coverage,
        )
        for gradients, loss, loss_tokens in zip(samples, result.losses, result.loss_tokens, strict=True)
    )


def coverage_of(target: Target, with_gradient: Collection[str]) -> Coverage:
    """Return which of the chosen parameters have a gradient, and the reason for each parameter without a gradient.

    Args:
        target: The chosen parameters, after the passes.
        with_gradient: Names of the parameters with a gradient.
    """
    sizes = {name: parameter.numel() for name, parameter in target.parameters.items()}
    missing = {name: size for name, size in sizes.items() if name not in with_gradient}
    return Coverage(
        seen={name: size for name, size in sizes.items() if name in with_gradient},
        missing=missing,
        reasons={
            name: "has no part in the loss" if name in target.called else "its module never ran" for name in missing
        },
        notes={name: note for name, note in target.notes.items() if name in with_gradient},
    )
