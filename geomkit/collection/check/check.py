"""Check that gradients are right on a model and machine, measured on a few examples."""

from typing import TYPE_CHECKING

from geomkit.collection.check.questions import (
    all_skipped_but,
    attention,
    complete,
    dtype,
    padding_and_batch,
    repeatable,
)
from geomkit.collection.check.subject import Subject
from geomkit.collection.check.verdicts import Check, CollectionCheck
from geomkit.collection.streaming import prepared
from geomkit.errors import DataError
from geomkit.gradients.gradient_set import Coverage
from geomkit.inputs.fits import encoded_for
from geomkit.inputs.parameters import Layers, as_selection
from geomkit.inputs.tokens import EncodedExamples
from geomkit.utils.options import check_option
from geomkit.utils.workers import first_process

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXAMPLES = 4
"""Default number of examples; each is compared in every parameter."""


def check_collection(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: "Dataset | EncodedExamples",
    *,
    count: int = EXAMPLES,
    layers: Layers = "*",
    progress: bool = True,
) -> CollectionCheck:
    """Return seven checks of the gradients of a model, with advice for those that fail.

    ``repeatable``: the same call gives the same gradients again. ``complete``: the gradients of a batch equal
    autograd's, for every parameter. ``padding right`` and ``padding left``: an example has the same gradients with
    padding as alone. ``batch``: an example has the same gradients in a batch as alone. ``attention``: the attention
    kernel of the model gives the same gradients as eager attention. ``dtype``: the dtype of the model gives the same
    gradients as fp32. A check fails if a difference is larger than the rounding of the model's dtype explains.

    The state of the model is restored afterwards, also after an exception. Memory is needed for the gradients of
    ``count`` examples and, for a model below fp32, for a copy in fp32; without enough memory for it, ``dtype`` is
    skipped.

    Args:
        model: See :func:`geomkit.collect_gradients`, also for ``layers``.
        tokenizer: Tokenizer of the model.
        examples: Examples, of which the first ``count`` are used.
        count: Number of examples, at least 2.
        layers: The choice of parameters.
        progress: Show a progress bar, in forward and backward passes.

    Returns:
        The checks; ``print`` shows them as a table.

    Raises:
        DataError: If there are fewer than 2 examples, or they cannot be encoded.
        CollectionError: If no trainable parameter matches, or a loss or gradient is not finite.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> check = check_collection(model, tokenizer, gk.load_examples("safety"), layers="*.mlp.*", progress=False)
        >>> check.ok, check["padding right"].verdict, check["dtype"].note
        (True, 'ok', 'the model computes in float32 already')
    """
    from tqdm.auto import tqdm

    check_option("examples", count, shown="count")
    number = min(count, len(examples))
    if number < 2:
        raise DataError(
            f"expected at least 2 examples, to compare an example alone and in a batch, found {number}; "
            "give more examples, or a larger count"
        )
    rows, pad = encoded_for(model, tokenizer, examples.select(range(number)))
    selection = as_selection(layers)
    hidden = not (progress and first_process())
    with prepared(model, selection) as target, tqdm(desc="checks", unit="pass", disable=hidden) as bar:
        subject = Subject(target, selection, rows, pad, bar.update)
        checks, coverage = _all_checks(subject)
        return CollectionCheck({check.name: check for check in checks}, coverage, str(subject))


def _all_checks(subject: Subject) -> tuple[list[Check], Coverage]:
    """Return all checks; if gradients are not repeatable, the other checks are skipped."""
    batched = subject.gradients(subject.batch)
    repeats = repeatable(subject, batched)
    if repeats.verdict == "fails":
        return [repeats, *all_skipped_but(repeats.name)], subject.summed()[1]
    completeness, coverage = complete(subject)
    alone = padding_and_batch(subject, batched)
    return [repeats, completeness, *alone, attention(subject, batched), dtype(subject, batched)], coverage
