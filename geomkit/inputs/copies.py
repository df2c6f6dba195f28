"""Copies among examples: a sample of rows is a sample only of the different rows in it.

Twelve copies of one row have no spread, so every interval over them has the length zero, however little is known. A row
that is in two sets makes the sets alike where a measurement compares them.
"""

from collections.abc import Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING

from geomkit.errors import GeometryError
from geomkit.inputs.examples import tools_of
from geomkit.inputs.tokens import EncodedExamples, conversations_of
from geomkit.utils.display import counted

if TYPE_CHECKING:
    from datasets import Dataset


def row_digests(examples: "Dataset | EncodedExamples") -> list[bytes]:
    """Return a digest of 16 bytes for each example, equal for two examples with the same messages and tools."""
    rows = conversations_of(examples)
    tools = tools_of(rows) or [None] * len(rows)
    texts = (repr(pair) for pair in zip(rows["messages"], tools, strict=True))
    return [blake2b(text.encode(), digest_size=16).digest() for text in texts]


def without_copies(examples: "Dataset | EncodedExamples") -> "Dataset | EncodedExamples":
    """Return the examples with each row once, at its first place; the same object where no row is there twice."""
    digests = row_digests(examples)
    first = sorted({digest: place for place, digest in reversed(list(enumerate(digests)))}.values())
    return examples if len(first) == len(digests) else examples.select(first)


def check_different_rows(sets: Mapping[str, "Dataset | EncodedExamples"], minimum: int) -> str:
    """Check that every set has enough different rows, and enough rows that no other set has.

    Args:
        sets: The examples of each set, by name.
        minimum: Least number of such rows.

    Returns:
        How many rows are copies of others, and how many are in two sets, in words; empty if none are.

    Raises:
        GeometryError: If a set has fewer rows.
    """
    digests = {name: row_digests(rows) for name, rows in sets.items()}
    remarks = []
    for name, rows in digests.items():
        different = set(rows)
        if len(different) < minimum:
            raise GeometryError(
                f"expected at least {minimum} different {name} examples to tell their spread, found {len(different)} "
                f"in {counted(len(rows), 'row')}; copies of a row are no sample: give other rows"
            )
        if len(different) < len(rows):
            remarks.append(f"{len(rows) - len(different)} of {len(rows)} {name} rows are copies, and were left out")
    names = list(digests)
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            shared = set(digests[first]) & set(digests[second])
            for name in (first, second):
                if (left := len(set(digests[name]) - shared)) < minimum:
                    raise GeometryError(
                        f"expected at least {minimum} {name} examples that are not in the other set, found "
                        f"{left}: {first} and {second} share {counted(len(shared), 'row')}; "
                        "give other rows"
                    )
            if shared:
                remarks.append(f"{first} and {second} share {counted(len(shared), 'row')}, which makes them alike")
    return "; ".join(remarks)
