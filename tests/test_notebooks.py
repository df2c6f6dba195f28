"""Every notebook runs from top to bottom, as a reader would run it."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers.tiny import conversations, tiny_llama, tiny_tokenizer

FOLDER = Path(__file__).parent.parent / "notebooks"


NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PLOTLY, PNG = "application/vnd.plotly.v1+json", "image/png"
MOST_BYTES = 1_500_000


def conclusions_of(notebook):
    """What the cell of the conclusions prints: a line for each conclusion, whether it holds."""
    (cell,) = [cell for cell in notebook.cells if "conclusions" in cell.metadata.get("tags", [])]
    return "".join(output["text"] for output in cell.outputs if output.get("name") == "stdout").splitlines()


@pytest.mark.filterwarnings("default")  # the kernel's own start-up
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_its_conclusions_follow_from_the_numbers(path):
    notebook = nbformat.read(path, as_version=4)
    stored = conclusions_of(notebook)
    # nbclient answers the messages of output widgets itself, and now and then waits for ever: these wait for a reader.
    notebook.cells = [cell for cell in notebook.cells if "interactive" not in cell.metadata.get("tags", [])]
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    lines = conclusions_of(notebook)
    assert len(lines) > 4
    assert [line for line in lines if not line.startswith("holds: ")] == []
    assert lines == stored  # what a reader of the stored notebook sees


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_with_its_outputs(path):
    assert path.stat().st_size <= MOST_BYTES
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    outputs = [output for cell in cells for output in cell.outputs]
    assert not any(output["output_type"] == "error" for output in outputs)
    figures = [output.data for output in outputs if PLOTLY in output.get("data", {})]
    assert len(figures) > 3
    assert all(PNG in figure for figure in figures)


def some(count, answer):
    """So many requests, of different lengths, with one answer."""
    verbs, things = ("paint", "steal", "brush", "help"), ("the fence", "the bike", "a brush", "we", "the way")
    requests = [f"how do i {verb} {thing}{' sure' * place}" for place, verb in enumerate(verbs) for thing in things]
    return conversations(*((request, answer) for request in requests[:count]))


@pytest.mark.parametrize("name", ["02_spectra", "03_conflict", "04_one_sample", "05_spf"])
def test_the_first_cell_takes_another_model_and_sets_of_any_size(name):
    """In this process: a model of two layers, none before alignment, and sets of 9, 12 and 14 examples."""
    first, *others = [
        cell.source for cell in nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells if cell.cell_type == "code"
    ]
    imports, _, settings = first.partition("model, tokenizer =")
    own = {
        "model": tiny_llama(),
        "tokenizer": tiny_tokenizer(),
        "before_alignment": None,
        "safety": some(9, "sorry we can not help"),
        "control": some(14, "sorry we can not help"),
        "benign": some(12, "sure"),
        "utility": some(14, "sure take the brush"),
        "obeyed": some(10, "take a brush"),
        "train": some(14, "sure take the brush"),
        "answered": some(11, "sure take the brush"),
        "forbidden": some(8, "sorry we can not help"),
    }
    exec(imports, own)  # noqa: S102 - a notebook of ours
    kept = ("layers", "examples", "reworded", "settings", "harder", "prompts")
    exec("\n".join(line for line in settings.split("\n") if line.startswith(kept)), own)  # noqa: S102
    taken = {line.split(" =")[0] for line in first.split("\n") if " = gk.load" in line}
    assert {part for names in taken for part in names.split(", ")} - {"_"} <= set(own)
    for source in others:
        exec(source, own)  # noqa: S102
