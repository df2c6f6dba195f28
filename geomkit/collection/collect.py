"""From examples to gradients: of a whole set, and of each example."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import nn

from geomkit.collection.passes import ProductSink
from geomkit.collection.streaming import TOKENS_PER_BATCH, Streamed, stream
from geomkit.collection.target import Target
from geomkit.errors import CollectionError
from geomkit.gradients.accumulator import Accumulator
from geomkit.gradients.arithmetic import zero_gradient
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.gradient_set import Coverage, GradientSet
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.gradients.provenance import provenance_of
from geomkit.inputs.loss import Reduction, TokenLoss, token_losses
from geomkit.inputs.parameters import Layers, as_selection
from geomkit.inputs.tokens import EncodedExamples, Tokens, as_encoded, pad_id

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Form = Literal["auto", "factored"]


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
    """Collect the gradient of the loss on a set of examples, for every trainable parameter.

    The loss is the cross-entropy on assistant tokens, averaged within each example and over the examples. The model
    runs in eval mode (no dropout noise) and is left as found, also when interrupted: modes, ``.grad``, hooks,
    trainable parameters and random state. Memory does not grow with the number of examples, unless ``per_sample``.

    Args:
        model: A causal language model; one inside DDP or ``torch.compile`` is unwrapped, so that the gradient is that
            of this process's examples.
        tokenizer: Its tokenizer, with a chat template and a pad token.
        examples: Rows with a column ``messages``; :func:`geomkit.load_examples` makes them.
        per_sample: Also keep the gradient of each example's own loss, in ``.samples``. To keep a few numbers of each
            instead, see :func:`geomkit.measure_samples`.
        layers: Glob pattern on parameter names such as ``"*.mlp.*"``, numbers of decoder layers such as ``[10, 20]``, a
            list of either, or :func:`geomkit.select`.
        reduction: ``"example"`` weighs examples alike; ``"token"`` weighs tokens alike, as ``model(labels=…)`` does.
        form: ``"auto"`` keeps the two factors of a linear layer while they are the smaller form; ``"factored"``
            always keeps them, as token matching and the random-factor null need.
        tokens_per_batch: Most token positions run at a time, padding included; the knob for memory.
        progress: Show a bar, in tokens.

    Returns:
        A :class:`~geomkit.gradients.gradient_set.GradientSet`: parameter name to gradient, in the model's order.

    Raises:
        DataError: If the examples cannot be encoded.
        CollectionError: If no trainable parameter matches, weights are sharded or on meta, or a loss or gradient is
            not finite.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> gradients = gk.collect_gradients(model, tokenizer, gk.load_examples("safety").select([0]), progress=False)
        >>> gradients["lm_head.weight"].tokens < 30, gradients.coverage.share
        (True, 1.0)
    """
    rows = as_encoded(tokenizer, examples)
    found = collect_from_tokens(
        model,
        rows,
        pad_id(tokenizer),
        per_sample=per_sample,
        layers=layers,
        reduction=reduction,
        form=form,
        tokens_per_batch=tokens_per_batch,
        progress=progress,
    )
    return replace(found, provenance=provenance_of(model, rows, reduction=reduction, layers=str(as_selection(layers))))


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
) -> GradientSet:
    """Collect gradients of examples that are already tokens; see :func:`collect_gradients`.

    With a ``token_loss`` of its own only the sum can be had, not each example's gradient. For ``products`` see
    :func:`geomkit.collection.passes.run_pass`: they are of the sum, not of the mean.
    """
    if form not in get_args(Form):
        raise CollectionError(f"expected the form {' or '.join(get_args(Form))}, found {form!r}")
    sums: dict[str, Accumulator] = defaultdict(lambda: Accumulator(keep_factors=form == "factored"))
    samples: list[dict[str, LayerGradient]] = [{} for _ in rows]

    def keep_samples(name: str, examples: Sequence[int], gradients: Sequence[LayerGradient]) -> None:
        for example, gradient in zip(examples, gradients, strict=True):
            samples[example][name] = gradient

    streamed = stream(
        model,
        rows,
        pad,
        as_selection(layers),
        reduction=reduction,
        tokens_per_batch=tokens_per_batch,
        progress=progress,
        whole=lambda name, gradient: sums[name].add(gradient),
        samples=keep_samples if per_sample else None,
        products=products,
        token_loss=token_loss,
    )
    weights = streamed.loss_tokens if reduction == "token" else [1] * len(rows)
    parameters = streamed.target.parameters
    found = {name: sums.pop(name).total(1 / sum(weights)) for name in parameters if name in sums}
    _refuse_overflow(found)
    coverage = coverage_of(streamed.target, found)
    return GradientSet(
        found,
        loss=sum(loss * weight for loss, weight in zip(streamed.losses, weights, strict=True)) / sum(weights),
        examples=len(rows),
        loss_tokens=sum(streamed.loss_tokens),
        coverage=coverage,
        samples=_sample_sets(samples, streamed, found, coverage) if per_sample else (),
    )


def _refuse_overflow(found: Mapping[str, LayerGradient]) -> None:
    """Refuse sums that left the range of their type, though each part is within it; factors are no sums."""
    dense = {name: gradient.tensor for name, gradient in found.items() if isinstance(gradient, DenseGradient)}
    # A total that is finite has finite entries only, and takes one look at them.
    for name in (name for name, tensor in dense.items() if not bool(torch.isfinite(tensor.sum()))):
        if not bool(torch.isfinite(dense[name]).all()):
            raise CollectionError(
                f"expected a finite sum of gradients of {name}, found an overflow; run the model in fp64"
            )


def _sample_sets(
    samples: Sequence[Mapping[str, LayerGradient]],
    streamed: Streamed,
    found: Mapping[str, LayerGradient],
    coverage: Coverage,
) -> tuple[GradientSet, ...]:
    """Make each example's set hold the same parameters: one that has no part in an example's loss has gradient zero."""
    return tuple(
        GradientSet(
            {name: layers.get(name) or zero_gradient(whole.shape, whole.device) for name, whole in found.items()},
            loss,
            1,
            loss_tokens,
            coverage,
        )
        for layers, loss, loss_tokens in zip(samples, streamed.losses, streamed.loss_tokens, strict=True)
    )


def coverage_of(target: Target, found: Collection[str]) -> Coverage:
    """Say which of the chosen parameters were seen, and why the others were not."""
    sizes = {name: parameter.numel() for name, parameter in target.parameters.items()}
    missing = {name: size for name, size in sizes.items() if name not in found}
    return Coverage(
        seen={name: size for name, size in sizes.items() if name in found},
        missing=missing,
        reasons={name: "has no part in the loss" if name in target.ran else "its module never ran" for name in missing},
        notes={name: note for name, note in target.notes.items() if name in found},
    )
