"""Comparison of values that were read from a file with the types that they should have."""

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin


def fits(value: object, kind: Any) -> bool:
    """Return whether a value has the type of an annotation, down to the elements of lists, tuples and mappings.

    Whole numbers in geomkit's files are counts and seeds: they are no booleans and not negative. A float may be written
    as a whole number.

    Args:
        value: The value.
        kind: A class, a union, ``Literal``, or ``list``, ``tuple`` or ``Mapping`` with the type of the elements.

    Example:
        >>> fits({"a": (1, 2)}, Mapping[str, tuple[int, ...]]), fits({"a": (1, -2)}, Mapping[str, tuple[int, ...]])
        (True, False)
        >>> fits(1, float), fits(True, float), fits(None, str | None), fits("up", Literal["left", "right"])
        (True, False, True, False)
    """
    parts = get_args(kind)
    match get_origin(kind) or kind:
        case origin if origin in {Union, UnionType}:
            return any(fits(value, part) for part in parts)
        case origin if origin is Literal:
            return isinstance(value, str) and value in parts
        case origin if origin in {list, tuple}:
            return isinstance(value, origin) and all(fits(item, parts[0]) for item in value if parts)
        case origin if origin is Mapping:
            return isinstance(value, dict) and all(
                fits(key, parts[0]) and fits(item, parts[1]) for key, item in value.items()
            )
        case origin if origin is int:
            return type(value) is int and value >= 0
        case origin if origin is float:
            return type(value) in {int, float}
        case origin:
            return value is None if origin in {None, NoneType} else isinstance(value, origin)
