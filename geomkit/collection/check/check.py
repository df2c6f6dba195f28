"""Whether gradients can be trusted on this model and machine, measured on a few examples."""

from typing import TYPE_CHECKING

from geomkit.collection.check.questions import attention, complete, dtype, padding_and_batch, repeatable, unanswered
from geomkit.collection.check.subject import Subject
from geomkit.collection.check.verdicts import Check, CollectionCheck
from geomkit.collection.streaming import watched
from geomkit.errors import DataError
from geomkit.gradients.gradient_set import Coverage
from geomkit.inputs.parameters import Layers, as_selection
from geomkit.inputs.tokens import EncodedExamples, as_encoded, pad_id

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXAMPLES = 4
"""How many examples are enough: each is compared in every parameter."""


def check_collection(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: "Dataset | EncodedExamples",
    *,
    count: int = EXAMPLES,
    layers: Layers = "*",
    progress: bool = True,
) -> CollectionCheck:
    """Measure whether gradients depend on what they should not, and say what to change.

    Seven questions: does the same call give the same gradients again (``repeatable``); are they autograd's own, for
    every parameter (``complete``); are an example's the same alone and padded (``padding right``, as geomkit pads, and
    ``padding left``, as generation does), alone and beside others (``batch``), with the model's attention kernel and
    with the plain one (``attention``), in the model's type and in fp32 (``dtype``). A difference fails where it is
    larger than rounding in the model's type explains.

    The model is left as found, also after an exception. Memory is that of ``count`` examples' own gradients, and for
    a model below fp32 a copy in fp32, 4 bytes per parameter; where that does not fit, ``dtype`` is skipped.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        examples: Rows with a column ``messages``, of which the first few are used.
        count: How many, at least 2.
        layers: See :func:`geomkit.collect_gradients`, as for all that follow.
        progress: Show a bar, in forward and backward passes.

    Returns:
        A :class:`~geomkit.collection.check.verdicts.CollectionCheck`; ``print`` it.

    Raises:
        DataError: If there are fewer than 2 examples, or they cannot be encoded.
        CollectionError: If no trainable parameter matches, or a loss or gradient is not finite to begin with.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> found = check_collection(model, tokenizer, gk.load_examples("safety"), layers="*.mlp.*", progress=False)
        >>> found.ok, found["padding right"].verdict, found["dtype"].note
        (True, 'ok', 'the model computes in float32 already')
    """
    from tqdm.auto import tqdm

    number = min(count, len(examples))
    if number < 2:
        raise DataError(
            f"expected at least 2 examples, of which one can be alone or beside the other, found {number}; "
            "give more examples, or a larger count"
        )
    few = examples.select(range(number))
    rows = as_encoded(tokenizer, few)
    chosen = as_selection(layers)
    with watched(model, chosen) as target, tqdm(desc="checks", unit="pass", disable=not progress) as bar:
        subject = Subject(target, chosen, rows, pad_id(tokenizer), bar.update)
        checks, coverage = _all_checks(subject)
        return CollectionCheck({check.name: check for check in checks}, coverage, str(subject))


def _all_checks(subject: Subject) -> tuple[list[Check], Coverage]:
    """Ask every question, unless the first answer says that nothing can be compared."""
    together = subject.gradients(subject.batch)
    again = repeatable(subject, together)
    if again.verdict == "fails":
        return [again, *unanswered(again.name)], subject.summed()[1]
    whole, coverage = complete(subject)
    sides = padding_and_batch(subject, together)
    return [again, whole, *sides, attention(subject, together), dtype(subject, together)], coverage
