"""What judges and metrics say of the responses of an evaluation: its tables, shares and means."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from geomkit.inputs.tokens import EncodedExamples
from geomkit.stats.means import Estimate, mean_estimate, perplexity
from geomkit.stats.proportions import Rate, rate
from geomkit.training.evaluation import Measure
from geomkit.training.evaluation_sets import REQUESTS, EvaluationCase
from geomkit.training.judges import BatchJudge, Judge, JudgeError, ask_judge, decisions, judge_name
from geomkit.training.losses import divided_losses
from geomkit.training.metrics import Metric, exact_match

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel


def judged_tables(
    cases: Mapping[str, Sequence[EvaluationCase]],
    responses: Mapping[str, Sequence[str]],
    judges: Sequence[Judge | BatchJudge],
) -> "dict[str, pd.DataFrame]":
    """Return each set's part of :attr:`Evaluation.responses`, with a column for every field that a judge decided.

    Raises:
        JudgeError: If a judge fails; the error has the responses to all sets.
    """
    try:
        return {name: _judged(name, cases[name], texts, judges) for name, texts in responses.items()}
    except Exception as error:  # a judge is anybody's function
        unjudged = [_judged(name, cases[name], texts, ()) for name, texts in responses.items()]
        raise JudgeError(error, joined(unjudged)) from error


def _judged(
    name: str, cases: Sequence[EvaluationCase], responses: Sequence[str], judges: Sequence[Judge | BatchJudge]
) -> "pd.DataFrame":
    """Return the rows of a set, with the verdicts of the judges that are asked about it."""
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
        verdicts = ask_judge(judge, requests, responses)
        for field in decisions(judge):
            columns[field] = [getattr(verdict, field) for verdict in verdicts]
        if any(verdict.label is not None for verdict in verdicts):
            columns[judge_name(judge)] = [verdict.label for verdict in verdicts]
    return pd.DataFrame(columns)


def _asked(judge: Judge | BatchJudge, name: str) -> bool:
    """Return whether a judge is asked about a set: functions about every set, models about requests only.

    Models are slow. Harm is asked about on forbidden requests only: on benign ones, help would count as harm.
    """
    if not isinstance(judge, BatchJudge):
        return True
    return name == "forbidden" or (name == "benign" and "refused" in judge.decides)


def score_skill(name: str, tables: "Mapping[str, pd.DataFrame]", metric: Metric) -> "tuple[pd.DataFrame, Measure]":
    """Return a skill's table with its column ``value``, and the share of right answers or the mean of the metric.

    Raises:
        JudgeError: If the metric fails; the error has the responses to all sets.
    """
    table = tables[name]
    try:
        values = [metric(*pair) for pair in zip(table["response"], table["reference"], strict=True)]
        numbers = [float(value) for value in values]
    except Exception as error:  # a metric is anybody's function
        raise JudgeError(error, joined(list(tables.values())), f"metric of the skill '{name}': ") from error
    are_shares = all(isinstance(value, bool) for value in values)
    measure = rate([bool(value) for value in values]) if are_shares else mean_estimate(numbers)
    return table.assign(value=numbers), measure


def perplexity_of(
    model: "PreTrainedModel",
    encoded: EncodedExamples,
    pad: int,
    name: str,
    cases: Sequence[EvaluationCase],
    progress: bool,
) -> "tuple[pd.DataFrame, Estimate]":
    """Return a skill's table with the mean loss of every reference answer in ``value``, and the perplexity."""
    rows = list(encoded)
    losses = divided_losses(model, rows, pad, progress=progress, title=name)
    tokens = [sum(row.loss_mask[1:]) for row in rows]
    table = _judged(name, cases, [""] * len(cases), ())
    return table.assign(response=None, exact=None, value=losses), perplexity(losses, tokens)


def share(table: "pd.DataFrame | None", column: str) -> Rate:
    """Return the share of true values of a column; of no prompts where there is no such set or no judge of it."""
    if table is None or column not in table or table[column].isna().any():
        return Rate(0, 0)
    return rate([bool(value) for value in table[column]])


def measures_of_judges(
    tables: "Mapping[str, pd.DataFrame]", judges: Sequence[Judge | BatchJudge]
) -> dict[str, Measure]:
    """Return the measures of judges that decide more than refusals, by name."""
    more: dict[str, Measure] = {}
    forbidden = tables.get("forbidden")
    if forbidden is not None and "harmful" in forbidden:
        more["harmful"] = share(forbidden, "harmful")
    if forbidden is not None and "score" in forbidden:
        more["score"] = mean_estimate(list(forbidden["score"]))
    for judge in judges:
        for name in REQUESTS:
            if not isinstance(judge, BatchJudge) or name not in tables or judge.name not in tables[name]:
                continue
            for label in judge.labels:
                more[f"{label}: {name}"] = rate([value == label for value in tables[name][judge.name]])
    return more


def joined(tables: "Sequence[pd.DataFrame]", titles: Mapping[str, str] | None = None) -> "pd.DataFrame":
    """Return :attr:`Evaluation.responses`: the tables of all sets, without the columns that say nothing.

    Args:
        tables: The table of each set.
        titles: Title of each skill's metric.
    """
    import pandas as pd

    responses = pd.concat(tables, ignore_index=True)
    dull = []
    if not responses["context"].any():
        dull.append("context")
    if "value" in responses and set((titles or {}).values()) <= {"exact match"}:
        dull.append("value")
    return responses.drop(columns=dull)
