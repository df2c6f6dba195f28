"""Conversion of results to JSON with named tensors and back, and the two functions that save and load a result.

In the JSON every object states its type. All tensors of the same field and the same parameter (for instance the left
factors of all samples) lie one after the other in one flat tensor, in the order in which the JSON states their shapes.
"""

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy as np
import torch
from torch import Tensor

from geomkit.errors import DataError
from geomkit.utils.field_types import fits
from geomkit.utils.saved_files import SavedKind, damaged, read, write

_CLASSES: dict[str, type] = {}
"""The classes that can be saved, by name."""

_Class = TypeVar("_Class", bound=type)
_Result = TypeVar("_Result")


def saveable(cls: _Class) -> _Class:
    """Register a dataclass under its name, so that :func:`save` and :func:`load` accept it; return it unchanged.

    A saved file names the class, not its module, so that old files stay readable when a class moves.
    """
    _CLASSES[cls.__name__] = cls
    return cls


def save(kind: SavedKind, result: Any, folder: str | Path) -> Path:
    """Write a result to a folder, replacing an earlier result of its kind in one step; other files stay as they are.

    Args:
        kind: The kind of the result, after which its files are named.
        result: An object of a :func:`saveable` class.
        folder: The folder, which is made if it is missing.

    Returns:
        The folder.

    Raises:
        DataError: If there is a file in place of the folder, it cannot be written to, or the result has a field that
            cannot be saved.
    """
    tensors: dict[str, list[Tensor]] = {}
    content = _pack(result, tensors)
    write(kind, Path(folder), content, tensors)
    return Path(folder)


def load(kind: SavedKind, folder: str | Path, cls: type[_Result]) -> _Result:
    """Return the result of a kind that :func:`save` wrote to a folder, bit for bit, on the CPU.

    Every field has the type that its class states, every tensor the shape that the JSON states, and no number is left
    over; the caller checks what else the shapes of a result have to do with each other.

    Args:
        kind: The kind of the result.
        folder: The folder.
        cls: The class of results of this kind.

    Raises:
        DataError: If there is no such result, the files are damaged or do not belong together, or a later version of
            geomkit wrote them.
    """
    content, tensors = read(kind, Path(folder))
    try:
        result = _unpack(content, tensors)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:  # also RecursionError
        raise damaged(kind, Path(folder), f"{type(error).__name__}: {error}") from None
    if not isinstance(result, cls):
        raise damaged(kind, Path(folder), f"{type(result).__name__} in place of {cls.__name__}")
    if left_over := [place for place, tensor in tensors.items() if tensor.numel()]:
        raise damaged(kind, Path(folder), f"numbers that the JSON does not name ({left_over[0]!r:.60})")
    return result


def _pack(value: Any, tensors: dict[str, list[Tensor]], parameter: str = "", field: str = "") -> Any:
    """Return the JSON of a value, and append its tensors, uncopied, to the parts of the tensors to write.

    Args:
        value: The value.
        tensors: For every name, the parts so far of the tensor to write; changed in place.
        parameter: Key of the innermost dict around the value, usually the parameter that the value belongs to.
        field: The field of the innermost dataclass around the value.

    Raises:
        DataError: If the value is, or contains, an object of a class that is not :func:`saveable`.
    """
    if isinstance(value, Tensor):
        place = f"{parameter}/{field}/{str(value.dtype).removeprefix('torch.')}"
        tensors.setdefault(place, []).append(value)
        return {"type": "tensor", "in": place, "shape": list(value.shape)}
    if isinstance(value, np.ndarray):
        return _pack(torch.tensor(value), tensors, parameter, field) | {"type": "array"}
    if type(value) in _CLASSES.values():
        members = {f.name: _pack(getattr(value, f.name), tensors, parameter, f.name) for f in fields(value)}
        return {"type": type(value).__name__} | members
    if isinstance(value, Mapping):
        return {"type": "dict", "items": {key: _pack(item, tensors, key, field) for key, item in value.items()}}
    if isinstance(value, tuple):
        return [_pack(item, tensors, parameter, field) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise DataError(f"{parameter}: expected one of geomkit's own types, found {type(value).__name__}; use those")


def _unpack(packed: Any, rest: dict[str, Tensor]) -> Any:
    """Return the value whose JSON :func:`_pack` made; its tensors are views, cut off the front of ``rest``.

    Raises:
        LookupError, TypeError, ValueError, RuntimeError, AttributeError: If JSON and tensors are not as :func:`_pack`
            makes them.
    """
    match packed:
        case {"type": "tensor", "in": place, "shape": shape}:
            return _cut(place, shape, rest)
        case {"type": "array"}:
            return _unpack(packed | {"type": "tensor"}, rest).numpy()
        case {"type": "dict", "items": items}:
            return {key: _unpack(item, rest) for key, item in items.items()}
        case dict():
            members = {key: _unpack(value, rest) for key, value in packed.items() if key != "type"}
            cls = _CLASSES[packed["type"]]
            kinds = _field_types(cls)
            for name, value in members.items():
                if name in kinds and not fits(value, kinds[name]):
                    raise TypeError(f"{cls.__name__}.{name} of another type: {value!r:.60}")
            return cls(**members)
        case list():
            return tuple(_unpack(item, rest) for item in packed)
    return packed


def _cut(place: str, shape: list[int], rest: dict[str, Tensor]) -> Tensor:
    """Return a tensor of a shape from the front of a flat tensor of ``rest``, and take it off there."""
    flat = rest[place]
    if flat.ndim != 1 or place.rpartition("/")[2] != str(flat.dtype).removeprefix("torch."):
        raise ValueError(f"{place!r} is a tensor of shape {tuple(flat.shape)} and {flat.dtype}")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{shape!r:.60} is no shape")
    count = prod(shape)
    if count > len(flat):
        raise ValueError(f"shape {shape!r:.60} is invalid for the {len(flat)} numbers left of {place!r}")
    rest[place] = flat[count:]
    return flat[:count].reshape(shape)


@cache
def _field_types(cls: type) -> dict[str, Any]:
    """Return the types of a saveable class's fields; annotations may name any saveable class."""
    hints = get_type_hints(cls, localns=dict(_CLASSES))
    return {field.name: hints[field.name] for field in fields(cls)}
