"""The command ``geomkit compare``: evaluations over the same prompts, by paired tests."""

from pathlib import Path
from typing import Annotated

import typer

from geomkit.cli.options import Json
from geomkit.cli.outputs import check_writable, write_json
from geomkit.errors import DataError
from geomkit.utils.terminal import show_table


def compare(
    files: Annotated[list[Path], typer.Argument(help="Files of geomkit evaluate --json; the first is the baseline.")],
    json_file: Json = None,
) -> None:
    """Compare evaluations over the same prompts by paired tests."""
    from geomkit.training.compare import compare_evaluations
    from geomkit.training.evaluation import load_evaluation

    check_writable(json_file and json_file.parent)
    if len(set(files)) < len(files):
        raise DataError(f"expected different files, found {', '.join(map(str, files))}; give each file once")
    result = compare_evaluations({str(path): load_evaluation(path) for path in files})
    shown = result.to_frame() if len(files) > 2 else result.to_frame().drop(columns="evaluation")
    show_table(shown, f"{result}" if len(files) > 2 else f"{files[1]}: {result}")
    if json_file is not None:
        rows = result.to_frame().to_dict("records")
        write_json(json_file, {"baseline": result.baseline, "rows": rows})
