"""Saving gradients and subspaces, and loading them again without the model."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geomkit._folder import Kind, read, refusal, write
from geomkit._packing import pack, unpack
from geomkit.collection.selection import unwrapped_model
from geomkit.errors import DataError
from geomkit.gradients import GradientSet
from geomkit.provenance import Provenance, differences, model_fields
from geomkit.subspaces import Subspace

_Size = tuple[int, ...]


def save_gradients(gradients: GradientSet, folder: str | Path) -> Path:
    """Write gradients, their samples, coverage and provenance to a folder; see :func:`load_gradients`.

    Args:
        gradients: What to save. Samples that are parts of shared tensors are written one by one: no copy of all of
            them is made.
        folder: Where to. It is made if missing; gradients saved there before are replaced in one step, other files
            are left alone.

    Returns:
        The folder.

    Raises:
        DataError: If there is a file where the folder should be, or something in them that cannot be saved.
    """
    return _save("gradients", gradients, folder)


def load_gradients(folder: str | Path, model: nn.Module | None = None) -> GradientSet:
    """Load gradients that :meth:`~geomkit.gradients.GradientSet.save` wrote, bit for bit, on the CPU.

    Args:
        folder: Where they were saved.
        model: Refuse them unless they were collected from this model with these weights.

    Returns:
        The gradients. Their numbers are read from the file when first used.

    Raises:
        DataError: If there are none, the files are damaged or do not belong together, a later version wrote them, or
            they were collected from another model; the message says how it differs.
    """
    gradients: GradientSet = _load("gradients", folder)
    if model is not None:
        shapes = {name: tuple(gradient.shape) for name, gradient in gradients.items()}
        _check_model(model, gradients.provenance, f"the gradients in {folder}", shapes, tuple)
    return gradients


def save_subspace(subspace: Subspace, folder: str | Path) -> Path:
    """Write a subspace and its provenance to a folder; see :func:`load_subspace`.

    Args:
        subspace: What to save.
        folder: Where to, as in :func:`save_gradients`.

    Returns:
        The folder.

    Raises:
        DataError: As in :func:`save_gradients`.
    """
    return _save("subspace", subspace, folder)


def load_subspace(folder: str | Path, model: nn.Module | None = None) -> Subspace:
    """Load a subspace that :meth:`~geomkit.subspaces.Subspace.save` wrote, bit for bit, on the CPU.

    Args:
        folder: Where it was saved.
        model: Refuse it unless its gradients were collected from this model with these weights.

    Returns:
        The subspace.

    Raises:
        DataError: As in :func:`load_gradients`.
    """
    subspace: Subspace = _load("subspace", folder)
    if model is not None:
        bases = {name: (layer.basis, layer.partner) for name, layer in subspace.layers.items()}
        dimensions = {name: tuple(len(own) for own in pair if own is not None) for name, pair in bases.items()}
        own = {"left": _rows, "right": _columns, "both": _rows_and_columns}[subspace.side]
        _check_model(model, subspace.provenance, f"the {subspace.side} subspaces in {folder}", dimensions, own)
    return subspace


def _save(kind: Kind, result: GradientSet | Subspace, folder: str | Path) -> Path:
    tensors: dict[str, list[Tensor]] = {}
    content = pack(result, tensors)
    write(kind, Path(folder), content, tensors)
    return Path(folder)


def _load(kind: Kind, folder: str | Path) -> Any:
    content, tensors = read(kind, Path(folder))
    try:
        return unpack(content, tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise refusal(kind, Path(folder), f"{type(error).__name__}: {error}") from None


def _rows(shape: torch.Size) -> _Size:
    return (shape[:-1].numel(),)


def _columns(shape: torch.Size) -> _Size:
    return tuple(shape[-1:])


def _rows_and_columns(shape: torch.Size) -> _Size:
    return _rows(shape) + _columns(shape)


def _check_model(
    model: nn.Module,
    provenance: Provenance | None,
    what: str,
    saved: Mapping[str, _Size],
    size: Callable[[torch.Size], _Size],
) -> None:
    """Refuse a model whose names, shapes or weights are not those of the model that a result was computed from."""
    model = unwrapped_model(model)
    own = {name: size(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    if unlike := [name for name in saved if own.get(name) != saved[name]]:
        some = (f"{name}: {saved[name]} saved, {own.get(name, 'none')} in the model" for name in unlike[:3])
        found = f"{len(unlike)} parameters that are not alike ({'; '.join(some)}{'; …' * (len(unlike) > 3)})"
    elif provenance is None:
        found = "that they do not say what weights they were collected with"
    elif lines := _other_weights(model, provenance):
        found = f"other weights ({'; '.join(lines)})"
    else:
        return
    origin = f", collected from {provenance.model} in {provenance.dtype}" if provenance else ""
    raise DataError(
        f"expected the model of {what}{origin}, found {found}; give that model, or leave model= out to look at the "
        "numbers alone"
    )


def _other_weights(model: nn.Module, provenance: Provenance) -> list[str]:
    here = replace(provenance, **model_fields(model))
    return differences(provenance, here) if here.weights != provenance.weights else []
