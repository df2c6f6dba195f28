"""The headline numbers as tables to read, a column for each set of examples, and three sentences that sum them up."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from geomkit.analysis import headlines as names
from geomkit.analysis.alignment import Alignment
from geomkit.analysis.claims import Claim
from geomkit.analysis.headlines import Headline, Headlines
from geomkit.utils.readable import MISSING, with_interval

if TYPE_CHECKING:
    import pandas as pd

_SETS = ("safety", "control", "utility")


class _Row(NamedTuple):
    """A row of a table, and the row with its null, where there is one that says something."""

    measure: str
    label: str
    null: str = ""


_TABLES: Mapping[str, Sequence[_Row]] = {
    "loss": (_Row(names.LOSS, "loss, nats per token"),),
    "low rank?": (
        _Row(names.RANK, "effective rank of the mean gradient", "of random directions"),
        _Row(names.CER, "share of its energy in 10 directions, CER(10)", "of random directions"),
        _Row(names.SPAN, "dimensions that the examples' gradients span", "of random directions"),
    ),
    "conflict?": (
        _Row(names.COSINE, "cosine with the utility gradient"),
        _Row(names.EQUAL_WEIGHTS, "the same at equal weights of examples and parameters"),
        _Row(names.MEAN_COSINE, "cosine of the mean gradients, with sampling noise", "if labels are shuffled"),
        _Row(names.NEGATIVE, "share of utility examples that oppose it", "of unrelated gradients"),
    ),
    "one sample?": (
        _Row(names.ONE_COSINE, "cosine of one example with the other safety examples' mean"),
        _Row(names.OVERLAP, "overlap of its leading directions with theirs", "of random subspaces"),
    ),
}
"""The rows of the tables by question."""

QUESTIONS = tuple(_TABLES)


def numbers_table(table: Headlines, questions: Sequence[str] = QUESTIONS) -> "pd.DataFrame":
    """Return the headline numbers as texts: a row per measure and null, a column per set that has a number.

    Args:
        table: The headline numbers.
        questions: The questions whose numbers are shown.
    """
    import pandas as pd

    rows = []
    for row in (row for question in questions for row in _TABLES[question]):
        found = {name: table[row.measure, name] for name in _SETS if (row.measure, name) in table}
        if found:
            rows.append({"measure": row.label, **{name: _number(line) for name, line in found.items()}})
        if found and row.null:
            rows.append({"measure": f"… {row.null}", **{name: _null(line) for name, line in found.items()}})
    columns = ["measure", *(name for name in _SETS if any(name in row for row in rows))]
    return pd.DataFrame([[row.get(name, MISSING) for name in columns] for row in rows], columns=columns)


def _number(line: Headline) -> str:
    return with_interval(line.value, line.interval, sign="cosine" in line.measure)


def _null(line: Headline) -> str:
    return with_interval(line.null, line.null_interval).removeprefix(f"{MISSING} ")


def summary_of(alignment: Alignment, claims: Sequence[Claim]) -> tuple[str, str, str]:
    """Return three sentences: whether the model refuses, which claims on the control set hold, and which do not.

    Args:
        alignment: How the model answers the safety requests.
        claims: The paper's claims with their numbers.
    """
    against = [claim for claim in claims if claim.against_control]
    held = [claim for claim in against if claim.verdict == "holds"]
    others = sorted(
        (claim for claim in against if claim.verdict != "holds"), key=lambda claim: claim.verdict == "not shown"
    )
    caveat = f"; all of this is {alignment.caveat}" if alignment.caveat else ""
    return (
        f"{str(alignment).partition(';')[0]}.",
        f"As the paper claims, {_joined(held)}{caveat}."
        if held
        else f"No difference between the safety set and the control set that the paper claims is shown{caveat}.",
        f"On the other hand, {_joined(others)}." if others else "No claim on the control set fails.",
    )


def _joined(claims: Sequence[Claim]) -> str:
    """Return the findings on claims as clauses of one sentence."""
    return "; ".join(f"{claim.finding[0].lower()}{claim.finding[1:].rstrip('.')}" for claim in claims)
