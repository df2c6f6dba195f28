"""Description of a collection before it runs: parameters, closed forms, batches and memory; times where asked for."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from torch import nn

from geomkit.collection.collect import Form
from geomkit.collection.memory import (
    Counts,
    ParameterAlias,
    activation_bytes,
    aliases_by_parameter,
    logit_bytes,
    most_result_bytes,
    most_sample_bytes,
    total_bytes,
)
from geomkit.collection.streaming import TOKENS_PER_BATCH, padded_length
from geomkit.errors import DataError
from geomkit.inputs.batches import plan_batches
from geomkit.inputs.fits import refuse_unfit
from geomkit.inputs.parameters import Layers, as_selection, chosen_parameters, kind_of, layer_index, unwrapped_model
from geomkit.inputs.tokens import EncodedExamples, as_encoded
from geomkit.planning.description import Description, Memory, ParameterPlan, Workload
from geomkit.planning.prediction import Pace, Prediction, analysed, drawn_anchors, predict_tasks
from geomkit.planning.rehearsal import rehearse
from geomkit.planning.speed import Speed, measure_speed
from geomkit.utils.workers import first_process

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def describe(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    examples: "Dataset | EncodedExamples | None" = None,
    *,
    per_sample: bool = False,
    layers: Layers = "*",
    form: Form = "auto",
    tokens_per_batch: int = TOKENS_PER_BATCH,
    predict: bool | Speed = False,
    progress: bool = True,
) -> Description:
    """Return what :func:`geomkit.collect_gradients` would do with these arguments; only times need the model to run.

    The model may be on the meta device, which shows what a large model needs before it is loaded. Findings that need a
    run, such as uses of a weight outside its module, are in ``coverage`` of the collected gradients.

    Args:
        model: See :func:`geomkit.collect_gradients`, also for the arguments below.
        tokenizer: Tokenizer of the model; needed with examples.
        examples: Examples, whose tokens and batches are counted. Without examples, bounds hold for any number of
            examples, in batches of ``tokens_per_batch``.
        per_sample: Whether the gradients of single examples are stored.
        layers: The choice of parameters.
        form: Form of the summed gradients.
        tokens_per_batch: Largest number of token positions in a batch.
        predict: Also predict time and memory of a collection of the trainable parameters, an analysis of three such
            sets, and a step of a fine-tune with default settings, plain and under SPF. It needs examples. The model is
            run for some seconds to measure its speed, and the work on gradients is done once for each shape, on random
            ones; on the meta device there is memory only, unless the speed that
            :func:`geomkit.planning.speed.measure_speed` measured on another model is given in place of ``True``.
        progress: Show bars while speeds are measured.

    Returns:
        The description; ``print`` shows it as a table.

    Raises:
        DataError: If only one of tokenizer and examples is given, the examples cannot be encoded, or predictions are
            wanted without examples.
        CollectionError: If no trainable parameter matches.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> with torch.device("meta"):
        ...     model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2))
        >>> description = describe(model, layers="*.mlp.*")
        >>> round(description.share, 2), round(description.memory.result / 2**30, 2)
        (0.41, 1.01)
    """
    if (tokenizer is None) != (examples is None):
        given, missing = ("examples", "a tokenizer") if tokenizer is None else ("a tokenizer", "examples")
        raise DataError(f"expected a tokenizer and examples or neither, found only {given}; give {missing} too")
    if predict and examples is None:
        raise DataError("expected examples to predict from, found none; give a tokenizer and examples too")
    inner, shown = unwrapped_model(model), progress and first_process()
    selection = as_selection(layers)
    counts = None
    if tokenizer is not None and examples is not None:
        rows = as_encoded(tokenizer, examples, shown)
        refuse_unfit(inner, rows)
        counts = Counts.of(rows)
    workload = _workload(counts, tokens_per_batch) if counts else None
    chosen_names = set(chosen_parameters(inner, selection).values())
    aliases = aliases_by_parameter(inner)
    parameters = [
        _planned(
            name,
            parameter,
            aliases[name],
            counts,
            chosen=name in chosen_names,
            per_sample=per_sample,
            keep_factors=form == "factored",
        )
        for name, parameter in inner.named_parameters()
    ]
    return Description(
        model=type(inner).__name__,
        choice=str(selection),
        parameters=tuple(parameters),
        workload=workload,
        memory=_memory(inner, parameters, workload.positions if workload else tokens_per_batch),
        per_sample=per_sample,
        predictions=tuple(_predictions(inner, counts, tokens_per_batch, predict, shown)) if counts and predict else (),
    )


def _predictions(
    model: "PreTrainedModel", counts: Counts, tokens_per_batch: int, speed: Literal[True] | Speed, progress: bool
) -> list[Prediction]:
    if speed is True:
        if any(parameter.is_meta for parameter in model.parameters()):
            return predict_tasks(model, counts, tokens_per_batch, None)
        speed = measure_speed(model, progress=progress)
    rehearsal = rehearse(model, analysed(counts), drawn_anchors(counts), speed, progress=progress)
    return predict_tasks(model, counts, tokens_per_batch, Pace(speed, rehearsal))


def _workload(counts: Counts, tokens_per_batch: int) -> Workload:
    batches = [[counts.lengths[index] for index in batch] for batch in plan_batches(counts.lengths, tokens_per_batch)]
    positions = [len(lengths) * padded_length(lengths) for lengths in batches]
    return Workload(
        examples=len(counts.lengths),
        tokens=counts.tokens,
        loss_tokens=counts.scored,
        batches=len(batches),
        positions=max(positions),
        padding=1 - counts.tokens / sum(positions),
    )


def _planned(
    name: str,
    parameter: nn.Parameter,
    aliases: Sequence[ParameterAlias],
    counts: Counts | None,
    *,
    chosen: bool,
    per_sample: bool,
    keep_factors: bool,
) -> ParameterPlan:
    sample_bytes = most_sample_bytes(parameter, aliases, counts) if per_sample else 0
    return ParameterPlan(
        name=name,
        others=tuple(alias.name for alias in aliases if alias.name != name),
        kind=kind_of(name),
        layer=layer_index(name),
        shape=tuple(parameter.shape),
        module=" + ".join(dict.fromkeys(type(alias.module).__name__ for alias in aliases)),
        way="closed form" if all(alias.form for alias in aliases) else "autograd, samples by replay",
        trainable=parameter.requires_grad,
        chosen=chosen,
        result=most_result_bytes(parameter, aliases, counts, keep_factors=keep_factors) if chosen else None,
        samples=sample_bytes if chosen else None,
    )


def _memory(model: nn.Module, parameters: Sequence[ParameterPlan], positions: int) -> Memory:
    chosen = [plan for plan in parameters if plan.chosen]
    by_autograd = sum(4 * plan.entries for plan in chosen if plan.way != "closed form")
    return Memory(
        result=total_bytes(plan.result for plan in chosen),
        samples=total_bytes(plan.samples for plan in chosen),
        logits=logit_bytes(model, positions),
        activations=activation_bytes(model, positions) + by_autograd,
        weights=sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
    )
