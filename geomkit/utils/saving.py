"""Turning results into JSON with named tensors, and back.

In the JSON every object says its type. The entries of one field of one parameter (the left factors of all samples,
say) lie one after the other in one flat tensor, in the order in which the JSON names their shapes.
"""

from collections.abc import Mapping
from dataclasses import fields
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from geomkit.errors import DataError
from geomkit.utils.saved_files import SavedKind, read, refusal, write

_CLASSES: dict[str, type] = {}
"""The result classes that can be saved, by name."""

_Class = TypeVar("_Class", bound=type)


def saveable(cls: _Class) -> _Class:
    """Register a dataclass under its name as one that :func:`pack` and :func:`unpack` know; return it unchanged.

    A saved file names the class, not its module, so a class may move without old files becoming unreadable.
    """
    _CLASSES[cls.__name__] = cls
    return cls


def pack(value: Any, tensors: dict[str, list[Tensor]], name: str = "", field: str = "") -> Any:
    """Return what the JSON says of a value, and append its tensors, uncopied, to the parts of those to write.

    Args:
        value: The value.
        tensors: For each tensor to write the parts it is made of.
        name: The parameter that the value belongs to.
        field: The field of its gradient that the value is.

    Raises:
        DataError: If there is something in it that is none of geomkit's results.
    """
    if isinstance(value, Tensor):
        place = f"{name}/{field}/{str(value.dtype).removeprefix('torch.')}"
        tensors.setdefault(place, []).append(value)
        return {"type": "tensor", "in": place, "shape": list(value.shape)}
    if isinstance(value, np.ndarray):
        return pack(torch.tensor(value), tensors, name, field) | {"type": "array"}
    if type(value) in _CLASSES.values():
        packed = {f.name: pack(getattr(value, f.name), tensors, name, f.name) for f in fields(value)}
        return {"type": type(value).__name__} | packed
    if isinstance(value, Mapping):
        return {"type": "dict", "items": {key: pack(item, tensors, key, field) for key, item in value.items()}}
    if isinstance(value, tuple):
        return [pack(item, tensors, name, field) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise DataError(f"{name}: expected one of geomkit's own types, found {type(value).__name__}; use those")


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the value that was packed, its tensors being parts of those that were written.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: If it is not as :func:`pack` makes it.
    """
    return _unpack(packed, dict(tensors))


def _unpack(packed: Any, rest: dict[str, Tensor]) -> Any:
    match packed:
        case {"type": "tensor", "in": place, "shape": shape}:
            part, rest[place] = rest[place][: prod(shape)], rest[place][prod(shape) :]
            return part.reshape(shape)
        case {"type": "array"}:
            return _unpack(packed | {"type": "tensor"}, rest).numpy()
        case {"type": "dict", "items": items}:
            return {key: _unpack(item, rest) for key, item in items.items()}
        case dict():
            values = {key: _unpack(value, rest) for key, value in packed.items() if key != "type"}
            return _CLASSES[packed["type"]](**values)
        case list():
            return tuple(_unpack(item, rest) for item in packed)
    return packed


def save(kind: SavedKind, result: Any, folder: str | Path) -> Path:
    """Write a result to a folder, replacing a result of its kind there in one step; other files are left alone.

    Args:
        kind: The kind of the result, which names its files.
        result: An object of a :func:`saveable` class.
        folder: Where to; the folder is made if it is missing.

    Returns:
        The folder.

    Raises:
        DataError: If there is a file where the folder should be, or the result holds something that cannot be saved.
    """
    tensors: dict[str, list[Tensor]] = {}
    content = pack(result, tensors)
    write(kind, Path(folder), content, tensors)
    return Path(folder)


def load(kind: SavedKind, folder: str | Path) -> Any:
    """Read the result of a kind that :func:`save` wrote to a folder, bit for bit, on the CPU.

    Raises:
        DataError: If there is none, the files are damaged or do not belong together, or a later version wrote them.
    """
    content, tensors = read(kind, Path(folder))
    try:
        return unpack(content, tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise refusal(kind, Path(folder), f"{type(error).__name__}: {error}") from None
