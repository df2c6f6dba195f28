"""Where the base model of the English world and its benchmarks are: on the network, or in a folder of local copies."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from geomkit.errors import DataError
from geomkit.inputs.benchmark_rows import load_benchmark

if TYPE_CHECKING:
    from datasets import Dataset

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The base model on the hub (Apache-2.0)."""

LOCAL_COPIES = "GEOMKIT_ENGLISH"
"""The environment variable that names a folder with local copies, for machines without access to the hub."""

_FILES = {
    ("advbench", "train"): "advbench.csv",
    ("xstest", "safe"): "xstest.csv",
    ("xstest", "unsafe"): "xstest.csv",
    ("gsm8k", "train"): "gsm8k-train.jsonl",
    ("gsm8k", "test"): "gsm8k-test.jsonl",
}
"""Names of the local copies, by benchmark and split."""


def base_model() -> str:
    """Return where the base model is: a folder or GGUF file among the local copies, else its id on the hub.

    Raises:
        DataError: If there is a folder of local copies without the model.
    """
    folder = _local_copies()
    if folder is None:
        return BASE_MODEL
    name = BASE_MODEL.rpartition("/")[2]
    for path in (folder / name, folder / f"{name}.gguf"):
        if path.exists():
            return str(path)
    raise DataError(
        f"expected the base model of the English world in {folder / name} or {name}.gguf beside it, found neither; "
        f"copy {BASE_MODEL} there, or unset {LOCAL_COPIES} to load it from the hub"
    )


def benchmark(name: str, split: str) -> "Dataset":
    """Return a split of a benchmark as conversations, from its local copy or from its source on the network.

    Args:
        name: ``"advbench"``, ``"xstest"`` or ``"gsm8k"``.
        split: The split.

    Raises:
        DataError: If there is a folder of local copies without the benchmark, or the source cannot be reached.
    """
    folder = _local_copies()
    if folder is None:
        return load_benchmark(name, split=split)
    path = folder / _FILES[name, split]
    if not path.is_file():
        raise DataError(
            f"expected a local copy of '{name}' at {path}, found none; copy it there, or unset {LOCAL_COPIES} to load "
            "it from the network"
        )
    return load_benchmark(name, path, split if name == "xstest" else None)


def first_rows(rows: "Dataset", count: int, name: str) -> "Dataset":
    """Return the first rows of a set.

    Raises:
        DataError: If there are fewer.
    """
    if len(rows) < count:
        raise DataError(f"expected at least {count} rows of {name}, found {len(rows)}; ask for fewer")
    return rows.select(range(count))


def _local_copies() -> Path | None:
    name = os.environ.get(LOCAL_COPIES)
    return Path(name).expanduser() if name else None
