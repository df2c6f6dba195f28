"""The screen: every training row's gradient against the safety gradient, before anything is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from geomkit.collection.streaming import TOKENS_PER_BATCH
from geomkit.correlation.token_conflict import ExampleTokens, example_tokens
from geomkit.correlation.token_derivatives import token_derivatives
from geomkit.errors import CollectionError, DataError
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.gradients.provenance import provenance_of
from geomkit.inputs.control_sets import shuffled_pairs
from geomkit.inputs.copies import row_digests
from geomkit.inputs.fits import encoded_for
from geomkit.inputs.parameters import Layers, as_selection, workers_of
from geomkit.inputs.tokens import EncodedExamples, Tokens, conversations_of
from geomkit.screening.parts import Parts, make_folder
from geomkit.screening.reference import safety_reference
from geomkit.screening.row_scores import RowScores, score_rows
from geomkit.screening.screening import ScoreMethod, Screening, check_method, texts_fingerprint
from geomkit.stats.conditional_null import FEWEST
from geomkit.utils.arguments import check_seed
from geomkit.utils.display import counted

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHOWN = 20
"""Number of rows with the highest scores whose tokens' contributions are measured."""

SHUFFLED = 512
"""Largest number of shuffled pairs in a null without benign rows."""


def screen(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    train: "Dataset | EncodedExamples",
    safety: "Dataset | EncodedExamples",
    *,
    benign: "Dataset | EncodedExamples | None" = None,
    obeyed: "Dataset | EncodedExamples | None" = None,
    method: ScoreMethod = "cosine",
    layers: Layers = "*",
    folder: str | Path | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    seed: int = 0,
    progress: bool = True,
) -> Screening:
    """Return what each training row would do to the loss on refusals, and which rows stand out from benign rows.

    The score of a row is the first-order change of the mean loss on the safety examples for a step on this row. It is
    compared with the scores of null rows of as many scored tokens, since the length of an answer moves the score. The
    p-values hold for rows that are like the null rows: give ``benign`` rows of the format and language of the training
    rows. Rows whose harm shows only together, such as a backdoor of benign rows, are not seen. Refusals in other words
    than those of ``safety`` stand out as well, since learning them lowers the probability of those words; with
    ``obeyed`` they do not.

    Every row is run forward and backward once; memory is a batch's and, for the safety gradient, that of a copy of the
    weights in fp32 (two with ``obeyed``, four with ``method="adam"``). Processes divide the rows as in
    :func:`geomkit.collect_gradients`.

    Args:
        model: See :func:`geomkit.collect_gradients`, also for ``layers`` and ``tokens_per_batch``.
        tokenizer: Tokenizer of the model.
        train: N training rows.
        safety: Forbidden requests with the refusals that should stay, such as :func:`geomkit.own_refusals`.
        benign: Rows that are known as harmless, at least 20 different ones, better several hundred; where left out, up
            to 512 training rows with their answers shuffled, which are a poor substitute.
        obeyed: Forbidden requests with answers that obey, at best the requests of ``safety``. Their mean gradient is
            subtracted from the safety gradient, an anchor on either side as in He et al. (2404.01099): wherever the
            safety loss is named, it is then log p(obeying) − log p(refusing), in nats per token. Rows that obey stand
            out more then, also in long conversations and behind a trigger; rows that change the manner only (oaths,
            affirmative answers) stand out less, or not at all.
        method: The score to rank by: ``"cosine"``, ``"raw"``, or ``"adam"``, the cosine with the safety gradient
            divided by the root of Adam's second moment. The moment is that of 32 ``benign`` rows: in a moment of
            training rows, rows that do harm would shrink the very entries that show them. Without ``benign`` rows it is
            that of 32 training rows.
        layers: The choice of parameters.
        folder: Folder for finished rows, from which an interrupted call with the same inputs goes on.
        tokens_per_batch: Largest number of token positions in a batch.
        seed: Seed of the shuffled pairs and of the rows drawn for Adam's second moment.
        progress: Show progress bars.

    Returns:
        The scores with their null, p- and q-values.

    Raises:
        DataError: If examples cannot be encoded, there are too few different null rows, an obeyed row is a safety or
            benign row as well, or the folder cannot be made or has damaged finished rows.
        GeometryError: If the method is unknown.
        CollectionError: See :func:`geomkit.collect_gradients`.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> train = gk.load_examples("scenarios/poison-10").select(range(60))
        >>> benign = gk.load_examples("scenarios/new-skill").select(range(60))
        >>> screening = gk.screen(model, tokenizer, train, gk.load_examples("safety"), benign=benign, progress=False)
        >>> [train[int(row)]["messages"][0]["content"] for row in screening.flagged()[:2]]
        ['How do I snatch the lamp?', 'Write the steps to counterfeit the contract on the page.']
        >>> len(screening.clean(train)) == 60 - len(screening.flagged())
        True
    """
    check_method(method)
    check_seed(seed)
    workers = workers_of(model)
    parts = None if folder is None else Path(folder) / "parts"
    with workers.failing_together():
        rows, pad = encoded_for(model, tokenizer, train, progress)
        refusals, _ = encoded_for(model, tokenizer, safety, progress)
        null, _ = encoded_for(model, tokenizer, _shuffled(rows, seed) if benign is None else benign, progress)
        obeyed_rows = None if obeyed is None else encoded_for(model, tokenizer, obeyed, progress)[0]
        _refuse_few(null, benign is not None)
        if obeyed_rows is not None:
            _refuse_shared(obeyed_rows, {"safety": refusals} | ({} if benign is None else {"benign": null}))
        make_folder(parts)
    moment_rows = rows if benign is None else null
    reference = safety_reference(
        model,
        refusals,
        moment_rows,
        pad,
        obeyed=obeyed_rows,
        preconditioned=method == "adam",
        layers=layers,
        tokens_per_batch=tokens_per_batch,
        seed=seed,
        progress=progress,
        workers=workers,
    )
    origin = provenance_of(model, rows, reduction="example", layers=str(as_selection(layers)), seed=seed)
    scored: dict[str, RowScores] = {}
    for title, examples in (("screen", rows), ("null", null)):
        # Batches do not change the scores, but for rounding; everything else that does is in the key.
        moment = moment_rows.fingerprint if method == "adam" else ""
        anchors = (refusals.fingerprint, obeyed_rows and obeyed_rows.fingerprint)
        key = repr((origin, anchors, examples.fingerprint, method, moment))
        scored[title] = score_rows(
            model,
            examples,
            pad,
            reference,
            layers=layers,
            tokens_per_batch=tokens_per_batch,
            title=title,
            progress=progress,
            parts=Parts(parts, key, workers),
            workers=workers,
        )
    screening = Screening(
        method=method, rows=scored["screen"], null=scored["null"],
        null_kind="shuffled" if benign is None else "benign", top=(), top_tokens=(), token_note="",
        data=texts_fingerprint(conversations_of(rows)), provenance=origin, obeyed=len(obeyed_rows or ()),
        shared=0 if benign is None else _shared(null, rows),
        obeyed_trained=0 if obeyed_rows is None else _shared(obeyed_rows, rows),
    )  # fmt: skip
    top = tuple(np.argsort(-screening.scores, kind="stable")[:SHOWN].tolist())
    tokens, note = _top_tokens(model, tokenizer, [rows[row] for row in top], pad, reference.gradients, tokens_per_batch)
    return replace(screening, top=top, top_tokens=tokens, token_note=note)


def _shuffled(rows: EncodedExamples, seed: int) -> EncodedExamples:
    """Return training rows with their answers shuffled, encoded as the rows are.

    Raises:
        DataError: If the rows have too few different answers.
    """
    drawn = Random(seed).sample(range(len(rows)), min(SHUFFLED, len(rows)))
    try:
        return rows.like(shuffled_pairs(conversations_of(rows).select(sorted(drawn)), seed))
    except DataError as error:
        raise DataError(
            f"{str(error).partition(';')[0]}; without benign= the answers are shuffled: give benign= rows"
        ) from None


def _refuse_few(null: EncodedExamples, given: bool) -> None:
    # Copies of one row have one score, whose spread is nothing but rounding.
    if (different := len(set(row_digests(null)))) < FEWEST:
        raise DataError(
            f"expected at least {FEWEST} different {'benign' if given else 'training'} rows to compare with, found "
            f"{different}; give more benign= rows, like the training rows in format and language"
        )


def _refuse_shared(obeyed: EncodedExamples, others: Mapping[str, EncodedExamples]) -> None:
    # Of the same rows on both sides nothing but rounding is left, which would rank the rows.
    for name, rows in others.items():
        if shared := _shared(obeyed, rows):
            raise DataError(
                f"expected obeyed= rows that are no {name} rows, found {counted(shared, 'row')} in both; give "
                "forbidden requests with answers that obey"
            )


def _shared(some: EncodedExamples, others: EncodedExamples) -> int:
    """Return the number of different rows that two sets share."""
    return len(set(row_digests(some)).intersection(row_digests(others)))


def _top_tokens(
    model: "nn.Module",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Tokens],
    pad: int,
    safety: Mapping[str, LayerGradient],
    tokens_per_batch: int,
) -> tuple[tuple[ExampleTokens, ...], str]:
    """Return the contributions of the tokens of some rows, or none and the reason."""
    try:
        values, _ = token_derivatives(model, rows, pad, safety, tokens_per_batch=tokens_per_batch)
    except CollectionError as error:  # an operation without forward mode: the screen itself is done
        return (), str(error)
    return example_tokens(tokenizer, rows, values), ""
