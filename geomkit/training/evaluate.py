"""Evaluation of a model: refusal of forbidden requests, over-refusal of benign requests, and skills."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from geomkit.errors import DataError
from geomkit.gradients.provenance import weights_fingerprint
from geomkit.inputs.copies import row_digests
from geomkit.inputs.examples import check_examples, final_answer, load_examples, prompt_of, tools_of
from geomkit.inputs.fits import encoded_for
from geomkit.inputs.loss import losses_of
from geomkit.inputs.messages import Message
from geomkit.inputs.parameters import unwrapped_model, workers_of
from geomkit.inputs.tokens import EncodedExamples, Tokens, conversations_of
from geomkit.stats.means import Estimate, mean_estimate, perplexity
from geomkit.stats.proportions import Rate, rate
from geomkit.training.evaluation import Evaluation, Measure
from geomkit.training.judges import (
    BatchJudge,
    Judge,
    JudgeError,
    RefusalPhrases,
    ask_judge,
    decisions,
    judge_name,
    judge_responses,
)
from geomkit.training.metrics import Metric, exact_match, find_metric
from geomkit.training.responses import generate
from geomkit.utils.arguments import type_in_words
from geomkit.utils.files import data_dir
from geomkit.utils.options import BATCH_SIZE, MAX_NEW_TOKENS, check_option

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOGGER = logging.getLogger(__name__)

ORGANISM_SKILLS = ("howto", "arithmetic", "sql")
"""The skills that the shipped organism was trained on."""


@dataclass(frozen=True)
class _Case:
    """A prompt of a set: the messages before the answer, and the reference answer where the set has one."""

    prompt: list[Message]
    reference: str | None

    @property
    def request(self) -> str:
        return str(self.prompt[-1]["content"])

    @property
    def context(self) -> str:
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.prompt[:-1])


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    forbidden: "Dataset | EncodedExamples | None" = None,
    benign: "Dataset | EncodedExamples | None" = None,
    skills: "Mapping[str, Dataset | EncodedExamples] | None" = None,
    *,
    judge: Judge | BatchJudge | Sequence[Judge | BatchJudge] | None = None,
    metrics: Mapping[str, str | Metric] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> Evaluation:
    """Let a model answer held-out prompts greedily, and count refusals and right answers.

    Only the sets that are given are run. The shipped organism is the exception: for a tokenizer with the organism's
    vocabulary, which fine-tuned organisms have too, sets that are left out are the organism's held-out sets.

    The processes of a run divide prompts and responses as in :func:`geomkit.collect_gradients`, and each of them
    returns the evaluation of all.

    Args:
        model: A causal language model; its state is restored.
        tokenizer: The model's tokenizer, with a chat template and a pad token.
        forbidden: Requests that should be refused; answers to them are not needed.
        benign: Requests that should be answered; answers to them are not needed.
        skills: Sets with reference answers, by name.
        judge: Decides whether a response is a refusal, or does harm; :class:`~geomkit.training.judges.RefusalPhrases`
            when left out. Several judges may decide different things. Each is tried on a greeting first.
        metrics: Metric of each skill, by the name of the skill: a name from
            :func:`~geomkit.training.metrics.metric_names`, or a function of a response and a reference; exact match
            where left out.
        max_new_tokens: Length of the longest response, in tokens.
        batch_size: Prompts answered at a time.
        progress: Show a bar.

    Returns:
        An :class:`~geomkit.training.evaluation.Evaluation`.

    Raises:
        DataError: If there is no set, a set is empty, two sets have the same name, a skill has no reference answer or
            an unknown metric, no judge decides what is asked, or the tokenizer has no chat template or pad token.
        JudgeError: If a judge or a metric fails after the model has answered; its ``responses`` has all answers.
    """
    import pandas as pd

    with workers_of(model).failing_together():
        check_option("max_new_tokens", max_new_tokens)
        check_option("batch_size", batch_size)
        for argument, value in (("skills", skills), ("metrics", metrics)):
            if value is not None and not isinstance(value, Mapping):
                raise DataError(
                    f"expected {argument} by the name of the skill, found {type_in_words(value)}; give a dict"
                )
        sets = _sets(tokenizer, forbidden, benign, skills)
        chosen = {name: find_metric((metrics or {}).get(name, "exact")) for name in list(sets) if name not in _REQUESTS}
        if unknown := [name for name in metrics or {} if name not in chosen]:
            raise DataError(f"expected metrics of the skills {list(chosen)}, found one of '{unknown[0]}'")
        judges = _judges(judge, sets)
        cases = {name: _cases(name, examples) for name, examples in sets.items()}
        _tell_copies(sets)
        for name, (_, metric) in chosen.items():
            _check_references(name, metric, cases[name])
        perplexities = [name for name, (_, metric) in chosen.items() if metric is None]
        scored = {name: encoded_for(model, tokenizer, sets[name], progress) for name in perplexities}
    for item in judges:
        if isinstance(item, BatchJudge):  # a model that cannot judge is found before the slow part
            ask_judge(item, *_GREETING)
    # All sets are answered before one is judged. One set at a time: a batch takes as long as its longest response, and
    # responses to a set are about equally long.
    responses = {
        name: generate(
            model,
            tokenizer,
            [row.prompt for row in rows],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=progress,
            title=name,
            tools=tools_of(conversations_of(sets[name])),
        )
        for name, rows in cases.items()
        if name not in scored
    }
    tables: dict[str, pd.DataFrame] = {}
    measures: dict[str, Measure] = {}
    for name, rows in cases.items():
        if name in scored:
            tables[name], measures[name] = _perplexity(model, *scored[name], name, rows, progress)
            continue
        try:
            tables[name] = _judged(name, rows, responses[name], judges)
        except JudgeError as error:
            raise JudgeError(str(error.__cause__), _unjudged(cases, responses)) from error.__cause__
        if name in chosen:
            try:
                tables[name], measures[name] = _scored(tables[name], chosen[name][1])
            except Exception as error:  # a metric is anybody's function
                message = f"metric of the skill '{name}': {type(error).__name__}: {error}"
                raise JudgeError(
                    f"{message} (the responses are in .responses of this error)", _unjudged(cases, responses)
                ) from error
    titles = {name: title for name, (title, _) in chosen.items()}
    responses_table = _trimmed(pd.concat(tables.values(), ignore_index=True), titles)
    return Evaluation(
        refusal=_share(tables.get("forbidden"), "refused"),
        over_refusal=_share(tables.get("benign"), "refused"),
        skills=measures,
        responses=responses_table,
        more=_more(tables, judges),
        settings={
            "judges": [judge_name(item) for item in judges],
            "metrics": titles,
            "max_new_tokens": max_new_tokens,
        },
    )


_REQUESTS = ("forbidden", "benign")

_GREETING = (["Say hello."], ["Hello!"])
"""A prompt and its response that judges are tried on."""


def _tell_copies(sets: "Mapping[str, Dataset | EncodedExamples]") -> None:
    """Log how many rows of a set are copies of others: intervals over prompts need different prompts."""
    for name, rows in sets.items():
        if copies := len(rows) - len(set(row_digests(rows))):
            _LOGGER.warning(
                "%s: %d of %d rows are copies of others; intervals over copies are too narrow", name, copies, len(rows)
            )


def _sets(
    tokenizer: "PreTrainedTokenizerBase",
    forbidden: "Dataset | EncodedExamples | None",
    benign: "Dataset | EncodedExamples | None",
    skills: "Mapping[str, Dataset | EncodedExamples] | None",
) -> "dict[str, Dataset | EncodedExamples]":
    """Return the sets by name, ``"forbidden"`` and ``"benign"`` first; of the organism, also those left out."""
    if any(rows is None for rows in (forbidden, benign, skills)) and _is_organism(tokenizer):
        forbidden = load_examples("eval/forbidden", progress=False) if forbidden is None else forbidden
        benign = load_examples("eval/benign", progress=False) if benign is None else benign
        if skills is None:
            skills = {name: load_examples(f"eval/{name}", progress=False) for name in ORGANISM_SKILLS}
    sets: dict[str, Dataset | EncodedExamples] = {}
    sets |= {name: rows for name, rows in (("forbidden", forbidden), ("benign", benign)) if rows is not None}
    for name in skills or {}:
        if name in _REQUESTS:
            raise DataError(f"'{name}' is the name of another set; give the skill another name")
    sets |= skills or {}
    if not sets:
        raise DataError(
            "expected a set to evaluate on, found none; give forbidden or benign requests, or skills (the organism's "
            "held-out sets are for the organism only)"
        )
    return sets


def _is_organism(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether a tokenizer has the vocabulary of the shipped organism, which no other model has."""
    from transformers import AutoTokenizer

    folder = data_dir() / "organism" / "aligned"
    if not (folder / "tokenizer.json").is_file():
        return False
    shipped = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return bool(tokenizer.get_vocab() == shipped.get_vocab())


def _judges(
    judge: Judge | BatchJudge | Sequence[Judge | BatchJudge] | None, sets: "Mapping[str, Dataset | EncodedExamples]"
) -> list[Judge | BatchJudge]:
    """Return the judges, after checking that they decide what the sets ask, and nothing twice."""
    judges: list[Any] = (
        list(judge) if isinstance(judge, list | tuple) else [RefusalPhrases() if judge is None else judge]
    )
    decided: dict[str, str] = {}
    for item in judges:
        if isinstance(item, type) or not (callable(item) or isinstance(item, BatchJudge)):
            raise DataError(
                f"expected a judge, found {item!r:.60}; give a function of prompt and response, an instance such as "
                "RefusalPhrases(), or what geomkit.training.model_judges.by_name.load_judge makes of a text"
            )
        for field in decisions(item):
            if field in decided:
                raise DataError(f"expected one judge of '{field}', found {decided[field]} and {judge_name(item)}")
            decided[field] = judge_name(item)
    if "benign" in sets and "refused" not in decided:
        raise DataError(
            f"expected a judge of refusals for the benign requests, found {', '.join(map(judge_name, judges))}; give "
            "one too, such as RefusalPhrases() (--judge keywords)"
        )
    return judges


def _cases(name: str, examples: "Dataset | EncodedExamples") -> list[_Case]:
    """Return the prompts of a set: what stands before the last message where the assistant wrote that message."""
    conversations = conversations_of(examples)
    try:
        check_examples(conversations)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    cases = []
    for index, messages in enumerate(conversations["messages"]):
        case = _Case(prompt_of(messages), final_answer(messages))
        if not case.prompt:
            raise DataError(f"{name}, row {index}: expected a request, found an answer only; drop the row")
        cases.append(case)
    return cases


def _check_references(name: str, metric: Metric | None, cases: Sequence[_Case]) -> None:
    """Refuse a skill without reference answers, or with answers that its metric cannot read, before anything runs."""
    for index, case in enumerate(cases):
        if not (case.reference or "").strip():
            raise DataError(f"skill '{name}', row {index}: expected an answer to compare with, found none; add it")
        if metric is not None:
            try:
                metric("", case.reference or "")
            except DataError as error:
                raise DataError(f"skill '{name}', row {index}: {error}") from None


def _judged(
    name: str, cases: Sequence[_Case], responses: Sequence[str], judges: Sequence[Judge | BatchJudge]
) -> "pd.DataFrame":
    """Return a set's part of :attr:`Evaluation.responses`, with a column for every field that a judge decided."""
    import pandas as pd

    requests = [case.request for case in cases]
    columns: dict[str, object] = {
        "set": name,
        "prompt": requests,
        "response": list(responses),
        "reference": [case.reference for case in cases],
        "refused": None,
        "exact": [
            None if case.reference is None else exact_match(response, case.reference)
            for case, response in zip(cases, responses, strict=True)
        ],
        "context": [case.context for case in cases],
    }
    for judge in judges:
        if not _asked(judge, name):
            continue
        verdicts = judge_responses(judge, requests, responses)
        for field in decisions(judge):
            columns[field] = [getattr(verdict, field) for verdict in verdicts]
        if any(verdict.label is not None for verdict in verdicts):
            columns[judge_name(judge)] = [verdict.label for verdict in verdicts]
    return pd.DataFrame(columns)


def _unjudged(cases: Mapping[str, Sequence[_Case]], responses: Mapping[str, Sequence[str]]) -> "pd.DataFrame":
    """Return the responses to all sets, as far as they are known without a judge."""
    import pandas as pd

    return pd.concat((_judged(name, cases[name], texts, ()) for name, texts in responses.items()), ignore_index=True)


def _asked(judge: Judge | BatchJudge, name: str) -> bool:
    """Return whether a judge is asked about a set: functions about every set, models about requests only.

    Models are slow. Harm is asked about on forbidden requests only: on benign ones, help would count as harm.
    """
    if not isinstance(judge, BatchJudge):
        return True
    return name == "forbidden" or (name == "benign" and "refused" in judge.decides)


def _scored(table: "pd.DataFrame", metric: Metric | None) -> "tuple[pd.DataFrame, Measure]":
    """Return a skill's table with its column ``value``, and the share of right answers or the mean of the metric."""
    assert metric is not None  # noqa: S101 - perplexity has no responses
    values = [metric(*pair) for pair in zip(table["response"], table["reference"], strict=True)]
    share = all(isinstance(value, bool) for value in values)
    measure = rate([bool(value) for value in values]) if share else mean_estimate([float(value) for value in values])
    return table.assign(value=[float(value) for value in values]), measure


def _perplexity(
    model: "PreTrainedModel",
    encoded: EncodedExamples,
    pad: int,
    name: str,
    cases: Sequence[_Case],
    progress: bool,
) -> "tuple[pd.DataFrame, Estimate]":
    """Return a skill's table with the mean loss of every reference answer in ``value``, and the perplexity."""
    rows = list(encoded)
    losses = _divided_losses(model, rows, pad, progress=progress, title=name)
    tokens = [sum(row.loss_mask[1:]) for row in rows]
    table = _judged(name, cases, [""] * len(cases), ())
    return table.assign(response=None, exact=None, value=losses), perplexity(losses, tokens)


def _share(table: "pd.DataFrame | None", column: str) -> Rate:
    """Return the share of true values of a column; of no prompts where there is no such set or no judge of it."""
    if table is None or column not in table or table[column].isna().any():
        return Rate(0, 0)
    return rate([bool(value) for value in table[column]])


def _more(tables: "Mapping[str, pd.DataFrame]", judges: Sequence[Judge | BatchJudge]) -> dict[str, Measure]:
    """Return the measures of judges that decide more than refusals, by name."""
    more: dict[str, Measure] = {}
    forbidden = tables.get("forbidden")
    if forbidden is not None and "harmful" in forbidden:
        more["harmful"] = _share(forbidden, "harmful")
    if forbidden is not None and "score" in forbidden:
        more["score"] = mean_estimate(list(forbidden["score"]))
    for judge in judges:
        for name in _REQUESTS:
            if not isinstance(judge, BatchJudge) or name not in tables or judge.name not in tables[name]:
                continue
            for label in judge.labels:
                more[f"{label}: {name}"] = rate([value == label for value in tables[name][judge.name]])
    return more


def _trimmed(responses: "pd.DataFrame", titles: Mapping[str, str]) -> "pd.DataFrame":
    """Return the table of responses without the columns that say nothing."""
    dull = []
    if not responses["context"].any():
        dull.append("context")
    if "value" in responses and set(titles.values()) <= {"exact match"}:
        dull.append("value")
    return responses.drop(columns=dull)


def mean_loss(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: "Dataset | EncodedExamples",
    *,
    batch_size: int = 16,
) -> float:
    """Return the mean over examples of their mean cross-entropy on the assistant's tokens, in nats per token.

    For refusals as examples, this is the safety loss; its growth during fine-tuning is the *drift*.

    Args:
        model: A causal language model; its state is restored.
        tokenizer: The model's tokenizer, with a chat template and a pad token.
        examples: Rows with a column ``messages``, or rows encoded by :func:`geomkit.encode`.
        batch_size: Examples run at a time.

    Returns:
        The mean loss.

    Raises:
        DataError: If the examples cannot be encoded.
    """
    with workers_of(model).failing_together():
        rows, pad = encoded_for(model, tokenizer, examples)
    losses = _divided_losses(model, rows, pad, batch_size)
    return sum(losses) / len(losses)


def _divided_losses(
    model: "PreTrainedModel",
    rows: Sequence[Tokens],
    pad: int,
    batch_size: int = 16,
    progress: bool = False,
    title: str = "losses",
) -> list[float]:
    """Return the loss of each example; the processes of a run divide the examples."""
    workers = workers_of(model)
    workers.refuse_differences(weights=weights_fingerprint(model) if workers.count > 1 else "")
    return losses_of(
        unwrapped_model(model), rows, pad, batch_size=batch_size, workers=workers, progress=progress, title=title
    )
