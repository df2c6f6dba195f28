"""Execute notebooks and store them with their outputs, each figure as plotly and as PNG.

python .ci/notebooks.py                  # all of them
python .ci/notebooks.py 02_spectra       # one

Needs the dev extra, with kaleido and pillow, and a browser for the PNGs.
"""

import base64
import io
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
import plotly.graph_objects as go
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parents[1] / "notebooks"
PLOTLY, PNG = "application/vnd.plotly.v1+json", "image/png"
WIDGET = "application/vnd.jupyter.widget-view+json"
MOST_BYTES = 1_500_000
COLOURS = 255
"""Colours of a PNG: enough for lines, markers and colour scales, at a third of the size of all colours."""


def stored(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return an executed notebook as it is stored: without progress bars and times, with a PNG beside each figure."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [with_png(output) for output in cell.outputs if not is_progress(output)]
    return notebook


def is_progress(output: Any) -> bool:
    """Tell whether an output is a progress bar or a widget, which a stored notebook cannot show."""
    return output.get("name") == "stderr" or WIDGET in output.get("data", {})


def with_png(output: Any) -> Any:
    """Return an output with the PNG of its figure, if it is a figure."""
    if PLOTLY in output.get("data", {}):
        output.data[PLOTLY] = rounded(output.data[PLOTLY])
        figure = go.Figure({key: output.data[PLOTLY][key] for key in ("data", "layout")})
        size = {"width": figure.layout.width or 900, "height": figure.layout.height or 480}
        image = Image.open(io.BytesIO(figure.to_image("png", **size))).convert("RGB").quantize(COLOURS)
        image.save(file := io.BytesIO(), "png", optimize=True)
        output.data[PNG] = base64.b64encode(file.getvalue()).decode()
        output.data.pop("text/html", None)
    return output


def rounded(value: Any) -> Any:
    """Return JSON with its floats to five significant digits: finer than a screen shows."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    """Execute and store the notebooks named on the command line, or all of them."""
    os.environ |= {"PLOTLY_RENDERER": "plotly_mimetype", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for path in [FOLDER / f"{name}.ipynb" for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(
            notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": FOLDER}}
        ).execute()
        notebook.metadata.language_info = {"name": "python"}
        text = nbformat.writes(stored(notebook)) + "\n"
        sys.stdout.write(f"{path.name}: {len(text.encode()):,} bytes\n")
        if len(text.encode()) > MOST_BYTES:
            raise SystemExit(f"{path.name}: expected at most {MOST_BYTES:,} bytes; show fewer or smaller figures")
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
