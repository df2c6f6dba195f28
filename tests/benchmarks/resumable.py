"""Cells of a table that are written to a file one by one, so that a run that was stopped can go on."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


def measured_cells(wanted: Iterable[Cell], measure: Callable[[Cell], Cell], path: Path | None) -> Iterator[Cell]:
    """Yield each wanted cell with what was measured: from the file where it is there already, or else anew.

    Args:
        wanted: For each cell the values that identify it.
        measure: Returns the measurements of a cell.
        path: A file with a cell a line; ``None`` for no file.
    """
    lines = path.read_text().splitlines() if path and path.exists() else []
    done = [json.loads(line) for line in lines]
    for cell in wanted:
        stored = next((one for one in done if cell.items() <= one.items()), None)
        if stored is None:
            stored = cell | measure(cell)
            if path:
                with path.open("a") as file:
                    file.write(json.dumps(stored) + "\n")
        yield stored
