"""The sets of an evaluation, checked before the model answers: requests by kind, skills with their references."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from geomkit.errors import DataError
from geomkit.inputs.copies import row_digests
from geomkit.inputs.examples import check_examples, final_answer, load_examples, prompt_of
from geomkit.inputs.messages import Message
from geomkit.inputs.tokens import EncodedExamples, conversations_of
from geomkit.training.metrics import Metric, find_metric
from geomkit.utils.arguments import type_in_words
from geomkit.utils.files import data_dir

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_LOGGER = logging.getLogger(__name__)

REQUESTS = ("forbidden", "benign")
"""Names of the sets of requests; the other sets are skills."""

ORGANISM_SKILLS = ("howto", "arithmetic", "sql")
"""The skills that the shipped organism was trained on."""


@dataclass(frozen=True)
class EvaluationCase:
    """A prompt of a set: the messages before the answer, and the reference answer where the set has one."""

    prompt: list[Message]
    reference: str | None

    @property
    def request(self) -> str:
        """The last message of the prompt."""
        return str(self.prompt[-1]["content"])

    @property
    def context(self) -> str:
        """The messages before the last one, each with its role."""
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.prompt[:-1])


def evaluation_sets(
    tokenizer: "PreTrainedTokenizerBase",
    forbidden: "Dataset | EncodedExamples | None",
    benign: "Dataset | EncodedExamples | None",
    skills: "Mapping[str, Dataset | EncodedExamples] | None",
) -> "dict[str, Dataset | EncodedExamples]":
    """Return the sets by name, ``"forbidden"`` and ``"benign"`` first; of the organism, also those left out.

    Raises:
        DataError: If there is no set, or a skill has the name of another set.
    """
    _check_by_name("skills", skills)
    if any(rows is None for rows in (forbidden, benign, skills)) and _is_organism(tokenizer):
        forbidden = load_examples("eval/forbidden", progress=False) if forbidden is None else forbidden
        benign = load_examples("eval/benign", progress=False) if benign is None else benign
        if skills is None:
            skills = {name: load_examples(f"eval/{name}", progress=False) for name in ORGANISM_SKILLS}
    sets: dict[str, Dataset | EncodedExamples] = {}
    sets |= {name: rows for name, rows in (("forbidden", forbidden), ("benign", benign)) if rows is not None}
    for name in skills or {}:
        if name in REQUESTS:
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


def cases_of(name: str, examples: "Dataset | EncodedExamples") -> list[EvaluationCase]:
    """Return the prompts of a set: what stands before the last message where the assistant wrote that message.

    Raises:
        DataError: If the rows are no examples, or a row has an answer only.
    """
    conversations = conversations_of(examples)
    try:
        check_examples(conversations)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    cases = []
    for index, messages in enumerate(conversations["messages"]):
        case = EvaluationCase(prompt_of(messages), final_answer(messages))
        if not case.prompt:
            raise DataError(f"{name}, row {index}: expected a request, found an answer only; drop the row")
        cases.append(case)
    return cases


def skill_metrics(
    metrics: Mapping[str, str | Metric] | None, cases: Mapping[str, Sequence[EvaluationCase]]
) -> dict[str, tuple[str, Metric | None]]:
    """Return the title and the function of each skill's metric, ``None`` for perplexity, by the name of the skill.

    Raises:
        DataError: If a metric is unknown or of no skill, or a skill has no reference answers that its metric can read.
    """
    _check_by_name("metrics", metrics)
    given = metrics or {}
    metric_of = {name: find_metric(given.get(name, "exact")) for name in cases if name not in REQUESTS}
    if unknown := [name for name in given if name not in metric_of]:
        raise DataError(
            f"expected metrics of the skills {list(metric_of)}, found one of '{unknown[0]}'; give that skill too, or "
            "leave its metric out"
        )
    for name, (_, metric) in metric_of.items():
        _check_references(name, metric, cases[name])
    return metric_of


def _check_by_name(argument: str, value: object) -> None:
    """Refuse skills or metrics that are not given by the name of the skill."""
    if value is not None and not isinstance(value, Mapping):
        raise DataError(f"expected {argument} by the name of the skill, found {type_in_words(value)}; give a dict")


def _check_references(name: str, metric: Metric | None, cases: Sequence[EvaluationCase]) -> None:
    """Refuse a skill without reference answers, or with answers that its metric cannot read, before anything runs."""
    for index, case in enumerate(cases):
        if not (case.reference or "").strip():
            raise DataError(f"skill '{name}', row {index}: expected an answer to compare with, found none; add it")
        if metric is not None:
            try:
                metric("", case.reference or "")
            except DataError as error:
                raise DataError(f"skill '{name}', row {index}: {error}") from None


def tell_copies(sets: "Mapping[str, Dataset | EncodedExamples]") -> None:
    """Log how many rows of a set are copies of others: intervals over prompts need different prompts."""
    for name, rows in sets.items():
        if copies := len(rows) - len(set(row_digests(rows))):
            _LOGGER.warning(
                "%s: %d of %d rows are copies of others; intervals over copies are too narrow", name, copies, len(rows)
            )
