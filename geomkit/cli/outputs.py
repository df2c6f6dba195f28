"""What a command writes and prints: reports, files of numbers, and the tables of an analysis."""

import json
import math
import shlex
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from geomkit.errors import DataError
from geomkit.utils.files import write_atomically
from geomkit.utils.terminal import say, show_table

if TYPE_CHECKING:
    from geomkit.analysis.analysis import Analysis
    from geomkit.experiments.tour import Tour
    from geomkit.utils.display import Result


def check_writable(*folders: Path | None) -> None:
    """Refuse a folder that cannot be written to, before minutes of work.

    Raises:
        DataError: If there is such a folder.
    """
    for folder in filter(None, folders):
        try:
            places = (folder, *folder.absolute().parents)
            if any(path.is_symlink() and not path.exists() for path in places):
                raise DataError(
                    f"expected a folder that can be written to at {folder}, found a link that leads nowhere, or in a "
                    "circle; choose another"
                )
            existing = next(path for path in places if path.exists())
            # Writing is tried, because permissions do not tell of a read-only disk or of /proc.
            tempfile.TemporaryFile(dir=existing).close()
        except OSError as error:
            raise DataError(
                f"expected a folder that can be written to at {folder}, found none ({error.strerror}); choose another"
            ) from None


def show_analysis(analysis: "Analysis", title: str) -> None:
    """Print the summary, the numbers, the claims with their verdicts, and the caution."""
    from geomkit.analysis.claims import VERDICTS, claims_table

    say(" ".join(analysis.summary))
    show_table(analysis.numbers(), f"{title}; 95 % intervals over examples in brackets")
    show_table(claims_table(analysis.claims()), "What survives its controls")
    say(f"{VERDICTS}.")
    if analysis.caution:
        say(f"Caution: {analysis.caution}.")


def write_results(out: Path, json_file: Path | None, result: "Analysis | Tour", title: str = "") -> None:
    """Write the report, and the numbers as JSON if there is a file for them; one of several processes does both."""
    from geomkit.utils.workers import first_process

    if not first_process():
        return
    write_report(out, result, title)
    if json_file is not None:
        write_json(json_file, result.to_dict())


def write_report(out: Path, result: "Result", title: str) -> None:
    """Write ``report.html`` with the command that was run, and print where it is."""
    from geomkit.plots.report_pages import write_result

    command = shlex.join(["geomkit", *sys.argv[1:]])
    typer.echo(f"wrote {write_result(result, out / 'report.html', title, {'command': command})}")


def write_json(file: Path, numbers: object) -> None:
    """Write numbers as JSON, with null for those that are not finite, and print where they are."""
    write_atomically(file, json.dumps(_finite_or_null(numbers), indent=2, allow_nan=False) + "\n")
    typer.echo(f"wrote {file}")


def _finite_or_null(value: object) -> object:
    """Return a value with null for every number that is not finite: JSON has neither NaN nor infinity."""
    if isinstance(value, Mapping):
        return {key: _finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
