"""From examples to gradients: the loop that runs a model over a set and adds up what the hooks hand out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from geomkit.algebra import add
from geomkit.errors import CollectionError
from geomkit.gradients import Coverage, GradientSet
from geomkit.hooks import Tape, can_split, recording, replayed_gradients, splits_by_example, tap_gradients
from geomkit.layer_gradient import DenseGradient, LayerGradient
from geomkit.loss import Reduction, example_losses, reduce_losses, scored, token_losses
from geomkit.state import as_found, full_precision
from geomkit.tokens import AssistantMask, Batch, Tokens, batches, encode, pad_id

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Form = Literal["auto", "factored"]


def collect_gradients(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: "Dataset",
    per_sample: bool = False,
    *,
    layers: str | Sequence[str] = "*",
    reduction: Reduction = "example",
    form: Form = "auto",
    batch_size: int = 8,
    assistant_mask: AssistantMask = "template",
    max_length: int | None = None,
    progress: bool = True,
) -> GradientSet:
    """Collect the gradient of the loss on a set of examples, for every trainable parameter.

    The loss is the cross-entropy on assistant tokens, averaged within each example and over the examples. The model
    runs in eval mode (no dropout noise) and is left as found: modes, ``.grad``, hooks and random state.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer, with a chat template and a pad token.
        examples: Rows with a column ``messages``; :func:`geomkit.load_examples` makes them.
        per_sample: Also keep the gradient of each example's own loss, in ``.samples``. All samples hold the same
            parameters: one that cannot be told apart for some example is left out of every sample.
        layers: Glob pattern, or several, on parameter names, such as ``"*.mlp.*"``.
        reduction: ``"example"`` weighs examples alike; ``"token"`` weighs tokens alike, as ``model(labels=…)`` does.
        form: ``"auto"`` keeps the two factors of a linear layer while they are the smaller form; ``"factored"``
            always keeps them, as token matching and the random-factor null need.
        batch_size: Examples run at a time.
        assistant_mask: How assistant tokens are found, see :func:`geomkit.tokens.encode`.
        max_length: Cut longer examples to this many tokens.
        progress: Show a bar.

    Returns:
        A :class:`~geomkit.gradients.GradientSet`: parameter name to gradient, in the model's order.

    Raises:
        DataError: If the examples cannot be encoded.
        CollectionError: If no trainable parameter matches, or a loss or gradient is not finite.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> gradients = gk.collect_gradients(model, tokenizer, gk.load_examples("safety").select([0]), progress=False)
        >>> gradients["lm_head.weight"].tokens < 30, gradients.coverage.share
        (True, 1.0)
    """
    encoded = encode(tokenizer, examples, assistant_mask=assistant_mask, max_length=max_length)
    return gradients_of(
        model,
        encoded,
        pad_id(tokenizer),
        per_sample=per_sample,
        layers=layers,
        reduction=reduction,
        form=form,
        batch_size=batch_size,
        progress=progress,
    )


def gradients_of(
    model: nn.Module,
    rows: Sequence[Tokens],
    pad: int,
    *,
    per_sample: bool = False,
    layers: str | Sequence[str] = "*",
    reduction: Reduction = "example",
    form: Form = "auto",
    batch_size: int = 8,
    progress: bool = False,
) -> GradientSet:
    """Collect gradients of examples that are already tokens; see :func:`collect_gradients`."""
    from tqdm.auto import tqdm

    wanted = _wanted(model, layers)
    total = _Total(
        model, wanted, keep_factors=form == "factored", examples=len(rows), tokens=sum(r.loss_tokens for r in rows)
    )
    length = sum(map(len, rows))
    with (
        as_found(model),
        full_precision(),
        tqdm(total=length, desc="gradients", unit="token", disable=not progress) as bar,
    ):
        model.eval()
        for batch in batches(rows, pad, batch_size):
            _collect_batch(total, batch, reduction=reduction, per_sample=per_sample)
            bar.update(int(batch.attention_mask.sum()))
    return total.finish(rows if per_sample else ())


def _wanted(model: nn.Module, layers: str | Sequence[str]) -> dict[str, str]:
    """Map every name of each wanted parameter (a tied one has two) to the first of its names."""
    patterns = [layers] if isinstance(layers, str) else list(layers)
    first: dict[int, str] = {}
    wanted = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        canonical = first.setdefault(id(parameter), name)
        if parameter.requires_grad and any(fnmatchcase(canonical, pattern) for pattern in patterns):
            wanted[name] = canonical
    if not wanted:
        trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        some = ", ".join(trainable[:3]) or "none"
        raise CollectionError(
            f"expected trainable parameters that match {patterns}, found none among {len(trainable)} ({some}, …); "
            "change layers= or unfreeze the model"
        )
    return wanted


@dataclass
class _Total:
    """What has been added up so far, and what could not be."""

    model: nn.Module
    wanted: dict[str, str]
    keep_factors: bool
    examples: int
    tokens: int
    loss: float = 0.0
    layers: dict[str, LayerGradient] = field(default_factory=dict)
    samples: list[dict[str, LayerGradient]] = field(default_factory=list)
    sample_losses: list[float] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, gradients: Mapping[str, Sequence[LayerGradient]]) -> None:
        for name, parts in gradients.items():
            held = [self.layers[name]] if name in self.layers else []
            self.layers[name] = add([*held, *parts], keep_factors=self.keep_factors)

    def finish(self, rows: Sequence[Tokens]) -> GradientSet:
        # Samples are compared with one another, and one whose calls split only in part would be a part of a gradient.
        held = set.intersection(*map(set, self.samples)) - set(self.reasons) if self.samples else set()
        parts = [{name: layers[name] for name in layers if name in held} for layers in self.samples]
        samples = tuple(
            GradientSet(self._ordered(layers), loss, 1, row.loss_tokens, self._coverage(layers))
            for layers, loss, row in zip(parts, self.sample_losses, rows, strict=True)
        )
        coverage = self._coverage(self.layers)
        return GradientSet(self._ordered(self.layers), self.loss, self.examples, self.tokens, coverage, samples)

    def _ordered(self, layers: Mapping[str, LayerGradient]) -> dict[str, LayerGradient]:
        return {name: layers[name] for name in dict.fromkeys(self.wanted.values()) if name in layers}

    def _coverage(self, layers: Mapping[str, LayerGradient]) -> Coverage:
        parameters = dict(self.model.named_parameters())
        sizes = {name: parameters[name].numel() for name in dict.fromkeys(self.wanted.values())}
        return Coverage(
            seen={name: size for name, size in sizes.items() if name in layers},
            missing={name: size for name, size in sizes.items() if name not in layers},
            reasons={name: self._reason(name) for name in sizes if name not in layers},
        )

    def _reason(self, name: str) -> str:
        whose = " of every example" if name in self.layers else ""
        return self.reasons.get(name, f"has no part in the loss{whose}")


def _collect_batch(total: _Total, batch: Batch, *, reduction: Reduction, per_sample: bool) -> None:
    batch = batch.to(next(total.model.parameters()).device)
    with torch.enable_grad(), recording(total.model, total.wanted) as tape:
        losses = token_losses(total.model, batch)
        own = example_losses(losses, batch)
        _check_losses(own, batch)
        share = reduce_losses(losses, batch, reduction, examples=total.examples, tokens=total.tokens)
        whole = _unsplit_parameters(total, tape)
        sources = [*(tap.output for tap in tape.taps), *(get_gradient_edge(weight) for weight in whole.values())]
        results = torch.autograd.grad(share, sources, allow_unused=True)
    total.loss += float(share.detach())
    deltas, direct = results[: len(tape.taps)], results[len(tape.taps) :]
    for name, result in zip([tap.name for tap in tape.taps] + list(whole), results, strict=True):
        _check_gradient(name, result, batch)
    total.add(_split_gradients(tape, deltas, skip=whole))
    positions = int(batch.attention_mask.sum())
    total.add(
        {
            name: [DenseGradient(result.float(), positions)]
            for name, result in zip(whole, direct, strict=True)
            if result is not None
        }
    )
    if per_sample:
        weights = 1 / total.examples if reduction == "example" else scored(batch).sum(1) / total.tokens
        scales = (1 / torch.as_tensor(weights)).expand(len(batch.examples)).tolist()
        _collect_samples(total, tape, deltas, scales)
        total.sample_losses.extend(own.detach().tolist())


def _unsplit_parameters(total: _Total, tape: Tape) -> dict[str, nn.Parameter]:
    """Choose the parameters whose summed gradient autograd itself should form: those without a closed form."""
    parameters = dict(total.model.named_parameters())
    split = {name for tap in tape.taps if can_split(tap.module) for name in tap.parameters.values()}
    other = {name for tap in tape.taps if not can_split(tap.module) for name in tap.parameters.values()}
    names = dict.fromkeys(total.wanted.values())
    return {name: parameters[name] for name in names if name not in split or name in other}


def _split_gradients(
    tape: Tape, deltas: Sequence[Tensor | None], skip: Mapping[str, object]
) -> dict[str, list[LayerGradient]]:
    gradients: dict[str, list[LayerGradient]] = {}
    for tap, delta in zip(tape.taps, deltas, strict=True):
        if delta is not None and can_split(tap.module):
            for name, gradient in tap_gradients(tap, delta).items():
                if name not in skip:
                    gradients.setdefault(name, []).append(gradient)
    return gradients


def _check_losses(losses: Tensor, batch: Batch) -> None:
    broken = torch.nonzero(~torch.isfinite(losses))
    if len(broken):
        row = int(broken[0, 0])
        raise CollectionError(
            f"example {batch.examples[row]}: expected a finite loss, found {float(losses[row].detach())}; "
            "check the model's weights, or run it in fp32"
        )


def _check_gradient(name: str, gradient: Tensor | None, batch: Batch) -> None:
    if gradient is not None and not bool(torch.isfinite(gradient).all()):
        raise CollectionError(
            f"{name}: expected a finite gradient, found NaN or inf in a batch of examples {list(batch.examples)}; "
            "run the model in fp32, or drop the example"
        )


def _collect_samples(total: _Total, tape: Tape, deltas: Sequence[Tensor | None], scales: Sequence[float]) -> None:
    for row, scale in enumerate(scales):
        parts: dict[str, list[LayerGradient]] = {}
        for tap, delta in zip(tape.taps, deltas, strict=True):
            if delta is None:
                continue
            if not splits_by_example(tap, delta, len(scales)):
                reason = "its module mixes the examples of a batch; collect per sample with batch_size=1"
                total.reasons.update(dict.fromkeys(tap.parameters.values(), reason))
                continue
            compute = tap_gradients if can_split(tap.module) else replayed_gradients
            for name, gradient in compute(tap, delta, row).items():
                parts.setdefault(name, []).append(gradient.scaled(scale))
        total.samples.append({name: add(held, keep_factors=True) for name, held in parts.items()})
