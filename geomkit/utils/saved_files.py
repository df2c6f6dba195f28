"""The file format of a save: a JSON file and a safetensors file, both named after the kind of the result.

::

    gradients.json                            type and origin of the result, and the place of each value in a tensor
    gradients-1f0a8c2e94b7d653.safetensors    the tensors; the file name contains their hash

The JSON file is replaced last, in one step, and names the safetensors file that belongs to it. Therefore a reader
finds the old result or the new one, whatever interrupts a save.
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
from geomkit.utils.files import Draft, locked, parse_json, reading, write_atomically, writing
from geomkit.version import __version__

SavedKind = Literal["gradients", "subspace", "screening"]
"""The kinds of results that can be saved."""

FORMAT = 1
"""Version of the format; later versions are refused."""

_TYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.bool: "BOOL",
}
"""The types of tensors that can be saved, and their names in safetensors."""


_FILE = r"{kind}-[0-9a-f]{{16}}\.safetensors"
"""Pattern of the names of the files with the tensors."""


def write(kind: SavedKind, folder: Path, content: Any, tensors: Mapping[str, list[Tensor]]) -> None:
    """Write JSON content and tensors to a folder, replacing a result of the same kind there.

    Args:
        kind: The kind of the result.
        folder: The folder, which is made if it is missing.
        content: A value that :func:`json.dumps` accepts.
        tensors: For every name, the parts of one flat tensor, in order.

    Raises:
        DataError: If there is a file in place of the folder, it cannot be written to, or a tensor has a type that
            cannot be saved.
    """
    with writing(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise DataError(f"expected a folder to save to at {folder}, found a file; choose another name") from None
        with locked(folder):
            _replace(kind, folder, content, tensors)


def read(kind: SavedKind, folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """Return the JSON content and the flat tensors that :func:`write` wrote.

    Raises:
        DataError: If there are no such files, they are damaged or do not belong together, or a later version of geomkit
            wrote them.
    """
    with reading(folder):
        if not (folder / f"{kind}.json").is_file():
            present = ", ".join(sorted(path.name for path in folder.glob("*.json"))) or "none"
            raise DataError(
                f"expected {kind}.json in {folder}, found {present}; save there first, or load what is there"
            )
        with suppress(DataError):
            return _read_both(kind, folder)
        # A save may have replaced both files between the two reads: read again, with no save under way.
        with locked(folder):
            return _read_both(kind, folder)


def checksum(document: Mapping[str, Any]) -> str:
    """Return the SHA-256 hash of a JSON document."""
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def damaged(kind: SavedKind, folder: Path, finding: str) -> DataError:
    """Return the error for saved files that are not as geomkit wrote them, with what was found instead."""
    return DataError(
        f"expected {folder / f'{kind}.json'} and its numbers as geomkit wrote them, found {finding}; they are cut "
        "short, changed or from different saves: copy both files again, or save again"
    )


def tensor_bytes(tensor: Tensor) -> memoryview:
    r"""Return the bytes of a tensor of any type, in the order of its entries, without a copy if it is contiguous.

    Example:
        >>> bytes(tensor_bytes(torch.tensor([1, 2], dtype=torch.int16)))
        b'\x01\x00\x02\x00'
    """
    flat = tensor.detach().cpu().contiguous()
    # A tensor of no or one entry counts as contiguous whatever its stride is.
    values: memoryview = flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy().data
    return values


def _replace(kind: SavedKind, folder: Path, content: Any, tensors: Mapping[str, list[Tensor]]) -> None:
    """Write the files of a result, and remove those of the result that they replace."""
    try:
        # 1. The tensors, under a new name: the old JSON file still names the old tensors.
        numbers = _write_tensors(kind, folder, tensors)
        # 2. The JSON file: from here on a reader finds the new result.
        document = {"kind": kind, "format": FORMAT, "geomkit": __version__, "numbers": numbers, "content": content}
        write_atomically(folder / f"{kind}.json", json.dumps(document | {"checksum": checksum(document)}) + "\n")
    finally:
        # 3. Remove the tensors that the JSON file does not name: the old ones, or the new ones if writing failed.
        _remove_leftovers(kind, folder)


def _write_tensors(kind: SavedKind, folder: Path, tensors: Mapping[str, list[Tensor]]) -> dict[str, str]:
    """Write the safetensors file; return its name and hash as the JSON file states them."""
    digest = hashlib.sha256()
    with Draft(folder, f"{kind}.safetensors") as draft:
        for chunk in _safetensors_chunks(tensors):
            digest.update(chunk)
            draft.write(chunk)
        name = f"{kind}-{digest.hexdigest()[:16]}.safetensors"
        draft.move_to(folder / name)
    return {"file": name, "sha256": digest.hexdigest()}


def _safetensors_chunks(tensors: Mapping[str, list[Tensor]]) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file part by part; the library's writer refuses views and needs a copy of everything."""
    # Wide types first: then each tensor starts at a multiple of its type's width.
    names = sorted(tensors, key=lambda name: -tensors[name][0].element_size())
    ends = list(accumulate((sum(part.nbytes for part in tensors[name]) for name in names), initial=0))
    entries = {
        name: {
            "dtype": _type_name(name, tensors[name][0].dtype),
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


def _type_name(name: str, dtype: torch.dtype) -> str:
    if dtype not in _TYPES:
        raise DataError(f"{name}: expected one of {', '.join(map(str, _TYPES))}, found {dtype}; convert the numbers")
    return _TYPES[dtype]


def _remove_leftovers(kind: SavedKind, folder: Path) -> None:
    """Remove drafts of interrupted saves, and safetensors files that the JSON file does not name."""
    try:
        current = parse_json((folder / f"{kind}.json").read_text("utf-8"))["numbers"]["file"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # no JSON file, or a damaged one: the tensors may be all that is left of a result
    written_by_geomkit = re.compile(rf"\.{kind}\.(json|safetensors)\.(.+\.)?\d+|{_FILE.format(kind=kind)}")
    for path in folder.iterdir():
        if written_by_geomkit.fullmatch(path.name) and path.name != current:
            with suppress(OSError):  # the next save tries again
                path.unlink()


def _read_both(kind: SavedKind, folder: Path) -> tuple[Any, dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    document = _document(kind, folder)
    name, promised = _numbers_named(kind, folder, document)
    try:
        with (folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != promised:
            raise damaged(kind, folder, f"{name} with the hash {digest[:8]}…, not {promised[:8]}…")
        return document["content"], load_file(folder / name)
    except (FileNotFoundError, RuntimeError):  # safetensors raises the latter for a file that was just removed
        raise damaged(kind, folder, f"no file {name}") from None
    except (OSError, SafetensorError) as error:
        raise damaged(kind, folder, f"{name} that cannot be read ({error})") from None


def _numbers_named(kind: SavedKind, folder: Path, document: Mapping[str, Any]) -> tuple[str, str]:
    """Return the name of the file with the numbers, which is one that :func:`write` gives, and its hash.

    Raises:
        DataError: If the document has no such name and hash, or no content. A path would lead out of the folder.
    """
    match document:
        case {"numbers": {"file": str(name), "sha256": str(digest)}, "content": dict()}:
            if re.fullmatch(_FILE.format(kind=kind), name):
                return name, digest
            raise damaged(kind, folder, f"the name {name!r:.60} for the file of the numbers")
    raise damaged(kind, folder, "JSON without content or the name of its numbers")


def _document(kind: SavedKind, folder: Path) -> dict[str, Any]:
    """Return the JSON document without its checksum, after checking format, checksum and kind in this order."""
    path = folder / f"{kind}.json"
    try:
        document: dict[str, Any] = parse_json(path.read_text("utf-8"))
        written_kind, version, promised = document["kind"], document["format"], document.pop("checksum", None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(kind, folder, f"JSON that cannot be read ({error})") from None
    if version != FORMAT:
        raise DataError(f"expected format {FORMAT} in {path}, found {version}, of a later geomkit; update geomkit")
    if promised != checksum(document):
        raise damaged(kind, folder, "JSON that is not what its checksum promises")
    if written_kind != kind:
        raise DataError(f"expected {kind} in {path}, found {written_kind}; load it with geomkit.load_{written_kind}")
    return document
