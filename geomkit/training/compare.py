"""Comparison of evaluations over the same prompts, by paired tests."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from geomkit.errors import DataError
from geomkit.stats.multiple_testing import benjamini_hochberg
from geomkit.stats.permutation import mcnemar_p_value, sign_flip_p_value
from geomkit.training.evaluation import Evaluation
from geomkit.utils.display import Result

if TYPE_CHECKING:
    import pandas as pd

Key = tuple[str, str, str, int]
"""A prompt: the messages before it, its text, its reference answer, and how often it came before in its set."""

_SETS = {"forbidden": ("refused", "harmful", "score"), "benign": ("refused",)}
"""The columns that are compared, by set; all other sets are skills."""

_NAMES = {("forbidden", "refused"): "refusal", ("benign", "refused"): "over-refusal"}


@dataclass(frozen=True)
class EvaluationComparison(Result):
    """Differences of evaluations from the first of them, measure by measure, with paired tests over prompts.

    Attributes:
        baseline: Name of the evaluation that the others are compared with.
        rows: One row per evaluation and measure, see :meth:`to_frame`.
    """

    baseline: str
    rows: "pd.DataFrame" = field(repr=False)

    def __str__(self) -> str:
        """Return what is compared with what."""
        return f"Differences from {self.baseline}, with paired tests over prompts"

    def to_frame(self) -> "pd.DataFrame":
        """Return one row per evaluation and measure.

        Columns: ``evaluation``, ``measure``, ``baseline`` and ``value`` (means over prompts), ``difference``, ``n``
        prompts, ``more`` and ``less`` (prompts with a larger and a smaller value than under the baseline), ``test``,
        its two-sided ``p``, and ``q`` (Benjamini and Hochberg's over all rows).
        """
        return self.rows


def compare_evaluations(evaluations: Mapping[str, Evaluation]) -> EvaluationComparison:
    """Compare evaluations with the first of them, prompt by prompt.

    Prompts are matched by their text, in any order. Yes-or-no outcomes are tested by McNemar's exact test, others by
    flipping the signs of the differences.

    Args:
        evaluations: Two or more evaluations over the same prompts, by name; the first is the baseline.

    Returns:
        An :class:`EvaluationComparison`.

    Raises:
        DataError: If there are fewer than two evaluations, or they differ in sets, prompts, judges, metrics or the
            length of responses.
    """
    import pandas as pd

    if len(evaluations) < 2:
        raise DataError(
            f"expected two evaluations or more to compare, found {len(evaluations)}; give a baseline and another one"
        )
    (baseline, first), *others = evaluations.items()
    values = _values(baseline, first)
    rows: list[dict[str, object]] = []
    for name, evaluation in others:
        _check_settings(baseline, first, name, evaluation)
        other = _values(name, evaluation)
        _check_measures(baseline, values, name, other)
        for measure, outcomes in values.items():
            _check_prompts(measure, baseline, outcomes, name, other[measure])
            pairs = np.array([(outcomes[key], other[measure][key]) for key in outcomes], dtype=np.float64)
            rows.append({"evaluation": name, "measure": measure, **_tested(*pairs.T)})
    frame = pd.DataFrame(rows)
    return EvaluationComparison(baseline, frame.assign(q=benjamini_hochberg(frame["p"].to_numpy())))


def _values(name: str, evaluation: Evaluation) -> dict[str, dict[Key, float]]:
    """Return the value of every prompt, by measure."""
    metrics = evaluation.settings.get("metrics", {})
    values: dict[str, dict[Key, float]] = {}
    for part, table in evaluation.responses.groupby("set", sort=False):
        columns = _SETS.get(str(part), ("value" if "value" in table else "exact",))
        keys = _keys(table)
        for column in columns:
            if column not in table or table[column].isna().any():
                continue
            values[_measure_name(str(part), column, metrics)] = dict(
                zip(keys, table[column].astype(float), strict=True)
            )
    if not values:
        raise DataError(
            f"expected outcomes of prompts in {name}, found none; evaluate requests with a judge, or a skill"
        )
    return values


def _measure_name(part: str, column: str, metrics: Mapping[str, str]) -> str:
    if part in _SETS:
        return _NAMES.get((part, column), column)
    title = metrics.get(part, "exact match")
    return f"loss: {part}" if title == "perplexity" else f"{title}: {part}"


def _keys(table: "pd.DataFrame") -> list[Key]:
    """Return the key of every prompt; greedy answers to the same prompt are the same, so that any order will do."""
    seen: Counter[tuple[str, str, str]] = Counter()
    keys = []
    contexts = table["context"] if "context" in table else [""] * len(table)
    for context, prompt, reference in zip(contexts, table["prompt"], table["reference"], strict=True):
        text = (str(context or ""), str(prompt), reference if isinstance(reference, str) else "")
        keys.append((*text, seen[text]))
        seen[text] += 1
    return keys


def _check_settings(baseline: str, first: Evaluation, name: str, other: Evaluation) -> None:
    for setting in ("judges", "metrics", "max_new_tokens"):
        one, two = (evaluation.settings.get(setting) for evaluation in (first, other))
        if one != two:
            raise DataError(
                f"expected the same {setting} in {baseline} and {name}, found {one} and {two}; evaluate both alike"
            )


def _check_measures(baseline: str, first: Mapping[str, object], name: str, other: Mapping[str, object]) -> None:
    if set(first) != set(other):
        raise DataError(
            f"expected the same sets in {baseline} and {name}, found {', '.join(first)} and {', '.join(other)}; "
            "evaluate both alike"
        )


def _check_prompts(
    measure: str, baseline: str, first: Mapping[Key, float], name: str, other: Mapping[Key, float]
) -> None:
    """Refuse evaluations on other prompts, with the first prompt that only one of them has."""
    for here, there, label, missing in ((first, other, baseline, name), (other, first, name, baseline)):
        if alone := [key for key in here if key not in there]:
            raise DataError(
                f"{measure}: expected the same prompts in {baseline} and {name}, found {len(alone)} of {len(here)} in "
                f"{label} that {missing} lacks, the first {alone[0][1]!r:.60}; evaluate both on the same files"
            )


def _tested(before: np.ndarray, after: np.ndarray) -> dict[str, object]:
    """Return the means of (n,) outcomes of two evaluations, and the paired test of their difference."""
    differences = after - before
    more, less = int((differences > 0).sum()), int((differences < 0).sum())
    flags = bool(np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all())
    return {
        "baseline": float(before.mean()),
        "value": float(after.mean()),
        "difference": float(differences.mean()),
        "n": len(before),
        "more": more,
        "less": less,
        "test": "McNemar" if flags else "sign flips",
        "p": mcnemar_p_value(more, less) if flags else sign_flip_p_value(differences),
    }
