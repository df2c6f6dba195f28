"""The format of a save: a JSON file beside a safetensors file, both named by the kind of what they hold.

::

    gradients.json                            what it is, where it comes from, and which part of a tensor is whose
    gradients-1f0a8c2e94b7d653.safetensors    the numbers; the name carries their hash

The JSON is replaced last and in one step, and names the numbers it belongs to. Whatever interrupts a save, a reader
finds the old result or the new one.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from geomkit.errors import DataError
from geomkit.utils.files import Draft, locked, write_atomically
from geomkit.version import __version__

SavedKind = Literal["gradients", "subspace"]

FORMAT = 1
"""Version of the format. A reader refuses later ones."""

_TYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
"""The types of numbers that can be saved, and their names in safetensors."""


def write(kind: SavedKind, folder: Path, content: Any, tensors: Mapping[str, list[Tensor]]) -> None:
    """Write JSON and tensors, each given as the parts it is made of, in place of what is there of their kind.

    Raises:
        DataError: If there is a file where the folder should be, or the numbers are of a type that cannot be saved.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise DataError(f"expected a folder to save to at {folder}, found a file; choose another name") from None
    with locked(folder):
        try:
            numbers = _write_numbers(kind, folder, tensors)
            document = {"kind": kind, "format": FORMAT, "geomkit": __version__, "numbers": numbers, "content": content}
            write_atomically(folder / f"{kind}.json", json.dumps(document | {"checksum": checksum(document)}) + "\n")
        finally:
            _remove_leftovers(kind, folder)


def read(kind: SavedKind, folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """Return the JSON and the tensors that were written, each of them flat.

    Raises:
        DataError: If there are none, they are damaged or do not belong together, or a later version wrote them.
    """
    if not (folder / f"{kind}.json").is_file():
        found = ", ".join(sorted(path.name for path in folder.glob("*.json"))) or "none"
        raise DataError(f"expected {kind}.json in {folder}, found {found}; save there first, or load what is there")
    with suppress(DataError):
        return _read(kind, folder)
    # A save may have replaced both files between the two reads: read them once more, with no save under way.
    with locked(folder):
        return _read(kind, folder)


def checksum(document: Mapping[str, Any]) -> str:
    """Return the hash of all that the JSON says."""
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def refusal(kind: SavedKind, folder: Path, found: str) -> DataError:
    """Return the error for files that geomkit did not write like this."""
    return DataError(
        f"expected {folder / f'{kind}.json'} and its numbers as geomkit wrote them, found {found}; they are cut short, "
        "changed or from different saves: copy both files again, or save again"
    )


def _write_numbers(kind: SavedKind, folder: Path, tensors: Mapping[str, list[Tensor]]) -> dict[str, str]:
    # Part by part: the library's own writer would refuse views, and need a copy of everything.
    digest = hashlib.sha256()
    with Draft(folder, f"{kind}.safetensors") as draft:
        for chunk in _chunks(tensors):
            digest.update(chunk)
            draft.write(chunk)
        name = f"{kind}-{digest.hexdigest()[:16]}.safetensors"
        draft.move_to(folder / name)
    return {"file": name, "sha256": digest.hexdigest()}


def _chunks(tensors: Mapping[str, list[Tensor]]) -> Iterator[bytes | memoryview]:
    # Wide types first: then each tensor starts at a multiple of its type's width.
    names = sorted(tensors, key=lambda name: -tensors[name][0].element_size())
    ends = list(accumulate((sum(part.nbytes for part in tensors[name]) for name in names), initial=0))
    entries = {
        name: {
            "dtype": _type(name, tensors[name][0].dtype),
            "shape": [sum(part.numel() for part in tensors[name])],
            "data_offsets": ends[index : index + 2],
        }
        for index, name in enumerate(names)
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    for name in names:
        yield from map(tensor_bytes, tensors[name])


def _type(name: str, dtype: torch.dtype) -> str:
    if dtype not in _TYPES:
        raise DataError(f"{name}: expected one of {', '.join(map(str, _TYPES))}, found {dtype}; convert the numbers")
    return _TYPES[dtype]


def _remove_leftovers(kind: SavedKind, folder: Path) -> None:
    """Remove what earlier or interrupted saves left: drafts, and numbers that the JSON does not name."""
    try:
        current = json.loads((folder / f"{kind}.json").read_text("utf-8"))["numbers"]["file"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # missing or damaged: the numbers may be all there is
    ours = re.compile(rf"\.{kind}\.(json|safetensors)\.\d+|{kind}-[0-9a-f]{{16}}\.safetensors")
    for path in folder.iterdir():
        if ours.fullmatch(path.name) and path.name != current:
            with suppress(OSError):  # in use, on a system where that matters: the next save removes it
                path.unlink()


def _read(kind: SavedKind, folder: Path) -> tuple[Any, dict[str, Tensor]]:
    from safetensors.torch import load_file

    document = _document(kind, folder)
    name, promised = document["numbers"]["file"], document["numbers"]["sha256"]
    try:
        with (folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != promised:
            raise refusal(kind, folder, f"{name} with the hash {digest[:8]}…, not {promised[:8]}…")
        return document["content"], load_file(folder / name)
    except (FileNotFoundError, RuntimeError):  # the latter is what safetensors says of a file that is gone
        raise refusal(kind, folder, f"no file {name}") from None


def _document(kind: SavedKind, folder: Path) -> dict[str, Any]:
    path = folder / f"{kind}.json"
    try:
        document: dict[str, Any] = json.loads(path.read_text("utf-8"))
        found, version, promised = document["kind"], document["format"], document.pop("checksum", None)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise refusal(kind, folder, f"JSON that cannot be read ({error})") from None
    if version != FORMAT:
        raise DataError(f"expected format {FORMAT} in {path}, found {version}, of a later geomkit; update geomkit")
    if promised != checksum(document):
        raise refusal(kind, folder, "JSON that is not what its checksum promises")
    if found != kind:
        raise DataError(f"expected {kind} in {path}, found {found}; load it with geomkit.load_{found}")
    return document


def tensor_bytes(tensor: Tensor) -> memoryview:
    r"""Return the bytes of a tensor of any type, in the order of its entries, copied only where they lie elsewhere.

    Example:
        >>> bytes(tensor_bytes(torch.tensor([1, 2], dtype=torch.int16)))
        b'\x01\x00\x02\x00'
    """
    flat = tensor.detach().cpu().contiguous()
    # With no or one entry, "contiguous" says nothing of the stride.
    values: memoryview = flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy().data
    return values
