"""Saving gradients and subspaces, and loading them again without the model.

A save is a JSON file beside a safetensors file, both named by what they hold::

    gradients.json                            what it is, where it comes from, and which part of a tensor is whose
    gradients-1f0a8c2e94b7d653.safetensors    the numbers; the name carries their hash

The JSON is replaced last and in one step, and names the tensors it belongs to. Whatever interrupts a save, a reader
finds the old result or the new one. Parts of one kind (the left factors of all samples of a parameter, say) lie one
after the other in one tensor.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from geomkit._files import Draft, locked, sync_folder, write_atomically
from geomkit.errors import DataError
from geomkit.gradients import Coverage, GradientSet
from geomkit.layer_gradient import DenseGradient, FactoredGradient, IndexedGradient, LayerGradient, SumGradient
from geomkit.provenance import Provenance, differences, model_fields, tensor_bytes
from geomkit.selection import unwrapped_model
from geomkit.subspaces import LayerSubspace, Subspace

Kind = Literal["gradients", "subspace"]

FORMAT = 1
"""Version of the format. A reader refuses later ones."""

_LOADERS: dict[Kind, str] = {"gradients": "load_gradients", "subspace": "load_subspace"}
_TYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
"""The types of numbers that can be saved, and their names in safetensors."""
_USUAL = {"indices": torch.int64, "singular_values": torch.float64}
"""Types of the fields that are not fp32."""


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
        DataError: If there is a file where the folder should be, or the numbers are of a type that cannot be saved.
    """
    packer = _Packer()
    coverages: dict[str, int] = {}
    content = {
        "set": _packed_set(gradients, packer, coverages),
        "coverages": [json.loads(text) for text in coverages],
        "shapes": packer.shapes,
    }
    return _save("gradients", folder, gradients.provenance, content, packer)


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
    document, tensors = _load("gradients", folder)
    try:
        content, provenance = document["content"], _provenance(document)
        shapes = {name: tuple(shape) for name, shape in content["shapes"].items()}
        coverages = [Coverage(**fields) for fields in content["coverages"]]
        parts = _Parts(tensors, shapes)
        gradients = replace(_unpacked_set(content["set"], parts, coverages), provenance=provenance)
        parts.check_all_taken()
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise _malformed("gradients", folder, error) from None
    if model is not None:
        _check_model(model, provenance, shapes, tuple, f"the gradients in {folder}")
    return gradients


def save_subspace(subspace: Subspace, folder: str | Path) -> Path:
    """Write a subspace and its provenance to a folder; see :func:`load_subspace`.

    Args:
        subspace: What to save.
        folder: Where to, as in :func:`save_gradients`.

    Returns:
        The folder.

    Raises:
        DataError: If there is a file where the folder should be, or the numbers are of a type that cannot be saved.
    """
    packer = _Packer()
    content = {
        "side": subspace.side,
        "layers": {name: _packed_subspace(layer, name, packer) for name, layer in subspace.layers.items()},
    }
    return _save("subspace", folder, subspace.provenance, content, packer)


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
    document, tensors = _load("subspace", folder)
    try:
        content, parts = document["content"], _Parts(tensors)
        layers = {name: _unpacked_subspace(entry, name, parts) for name, entry in content["layers"].items()}
        parts.check_all_taken()
        provenance, side = _provenance(document), content["side"]
        if side not in {"left", "right"}:
            raise ValueError(f"side {side!r}")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise _malformed("subspace", folder, error) from None
    if model is not None:
        sizes = {name: (len(layer.basis),) for name, layer in layers.items()}
        own_side = _rows if side == "left" else _columns
        _check_model(model, provenance, sizes, own_side, f"the {side} subspaces in {folder}")
    return Subspace(side, layers, provenance)


# ------------------------------------------------------------------------------------------ values to parts, and back


class _Packer:
    """The tensors to write: for each name the parts it is made of, none of them copied."""

    def __init__(self) -> None:
        self.tensors: dict[str, list[Tensor]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def check_shape(self, name: str, gradient: LayerGradient) -> None:
        if self.shapes.setdefault(name, gradient.shape) != gradient.shape:
            raise DataError(
                f"{name}: expected gradients of one shape in the sum and in every sample, found {self.shapes[name]} "
                f"and {gradient.shape}; collect them again"
            )

    def put(self, name: str, field: str, part: Tensor) -> list[Any]:
        """Take in a part; return how many rows of which tensor it is."""
        if part.dtype not in _TYPES:
            known = ", ".join(str(dtype) for dtype in _TYPES)
            raise DataError(f"{name}: expected numbers of a type that can be saved ({known}), found {part.dtype}")
        usual = part.dtype == _USUAL.get(field, torch.float32)
        place = [len(part)] if usual else [len(part), str(part.dtype).removeprefix("torch.")]
        self.tensors.setdefault(_tensor_name(name, field, place), []).append(part)
        return place


class _Parts:
    """The tensors that were read, handed out part by part in the order they were packed."""

    def __init__(self, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self._tensors = tensors
        self._shapes = shapes or {}
        self._taken = dict.fromkeys(tensors, 0)

    def take(self, name: str, field: str, place: Sequence[Any]) -> Tensor:
        tensor_name = _tensor_name(name, field, place)
        if tensor_name not in self._tensors:
            raise ValueError(f"tensor {tensor_name} is missing")
        start = self._taken[tensor_name]
        part = self._tensors[tensor_name][start : start + place[0]]
        if len(part) != place[0]:
            raise ValueError(f"tensor {tensor_name} has {len(self._tensors[tensor_name])} rows, which is too few")
        self._taken[tensor_name] += len(part)
        return part

    def check_shape(self, name: str, gradient: LayerGradient) -> None:
        if gradient.shape != self._shapes[name]:
            raise ValueError(f"a gradient of {name} has shape {gradient.shape}, not {self._shapes[name]}")

    def check_all_taken(self) -> None:
        left = [name for name, tensor in self._tensors.items() if self._taken[name] != len(tensor)]
        if left:
            raise ValueError(f"tensor {left[0]} has rows that belong to nothing")


def _tensor_name(name: str, field: str, place: Sequence[Any]) -> str:
    return "/".join([name, field, *place[1:]])


def _packed_set(gradients: GradientSet, packer: _Packer, coverages: dict[str, int]) -> dict[str, Any]:
    # The samples of a set mostly cover the same: what they cover is written once.
    coverage = json.dumps(asdict(gradients.coverage))
    return {
        "loss": float(gradients.loss),
        "examples": gradients.examples,
        "loss_tokens": gradients.loss_tokens,
        "coverage": coverages.setdefault(coverage, len(coverages)),
        "layers": {name: _packed(gradient, name, packer) for name, gradient in gradients.items()},
        "samples": [_packed_set(sample, packer, coverages) for sample in gradients.samples],
    }


def _unpacked_set(entry: Mapping[str, Any], parts: _Parts, coverages: Sequence[Coverage]) -> GradientSet:
    return GradientSet(
        {name: _unpacked(layer, name, parts) for name, layer in entry["layers"].items()},
        entry["loss"],
        entry["examples"],
        entry["loss_tokens"],
        coverages[entry["coverage"]],
        tuple(_unpacked_set(sample, parts, coverages) for sample in entry["samples"]),
    )


def _packed(gradient: LayerGradient, name: str, packer: _Packer) -> dict[str, Any]:
    packer.check_shape(name, gradient)
    match gradient:
        case FactoredGradient(left, right):
            return {
                "form": "factored",
                "left": packer.put(name, "left", left),
                "right": packer.put(name, "right", right),
            }
        case IndexedGradient(indices, rows, size, tokens):
            places = {"indices": packer.put(name, "indices", indices), "rows": packer.put(name, "rows", rows)}
            return {"form": "indexed", **places, "size": size, "tokens": tokens}
        case DenseGradient(tensor, tokens):
            return {"form": "dense", "tensor": packer.put(name, "tensor", tensor[None]), "tokens": tokens}
        case SumGradient(parts):
            return {"form": "sum", "parts": [_packed(part, name, packer) for part in parts]}
    raise DataError(f"{name}: expected one of geomkit's forms of a gradient, found {type(gradient).__name__}")


def _unpacked(entry: Mapping[str, Any], name: str, parts: _Parts) -> LayerGradient:
    gradient = _form(entry, name, parts)
    parts.check_shape(name, gradient)
    return gradient


def _form(entry: Mapping[str, Any], name: str, parts: _Parts) -> LayerGradient:
    def pair(one: str, other: str) -> tuple[Tensor, Tensor]:
        if entry[one][0] != entry[other][0]:
            raise ValueError(f"{name}: {entry[one][0]} rows of {one} and {entry[other][0]} of {other}")
        return parts.take(name, one, entry[one]), parts.take(name, other, entry[other])

    match entry["form"]:
        case "factored":
            return FactoredGradient(*pair("left", "right"))
        case "indexed":
            return IndexedGradient(*pair("indices", "rows"), entry["size"], entry["tokens"])
        case "dense":
            return DenseGradient(parts.take(name, "tensor", entry["tensor"])[0], entry["tokens"])
        case "sum":
            return SumGradient(tuple(_unpacked(part, name, parts) for part in entry["parts"]))
    raise ValueError(f"{name}: form {entry['form']!r}")


def _packed_subspace(layer: LayerSubspace, name: str, packer: _Packer) -> dict[str, Any]:
    return {
        "basis": packer.put(name, "basis", layer.basis),
        "singular_values": packer.put(name, "singular_values", torch.tensor(np.asarray(layer.singular_values))),
        "energy": float(layer.energy),
        "numeric_rank": int(layer.numeric_rank),
        "parameter": layer.parameter,
    }


def _unpacked_subspace(entry: Mapping[str, Any], name: str, parts: _Parts) -> LayerSubspace:
    values = parts.take(name, "singular_values", entry["singular_values"]).numpy()
    basis = parts.take(name, "basis", entry["basis"])
    if basis.ndim != 2 or values.shape != (basis.shape[1],):
        raise ValueError(f"{name}: {len(values)} singular values for a basis of shape {tuple(basis.shape)}")
    return LayerSubspace(basis, values, entry["energy"], entry["numeric_rank"], entry["parameter"])


def _provenance(document: Mapping[str, Any]) -> Provenance | None:
    return None if document["provenance"] is None else Provenance(**document["provenance"])


# ------------------------------------------------------------------------------------------------------------ writing


def _save(
    kind: Kind, folder: str | Path, provenance: Provenance | None, content: dict[str, Any], packer: _Packer
) -> Path:
    from geomkit import __version__

    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise DataError(f"expected a folder to save to at {folder}, found a file; choose another name") from None
    sync_folder(path.resolve().parent)
    with locked(path):
        try:
            document = {
                "kind": kind,
                "format": FORMAT,
                "geomkit": __version__,
                "provenance": provenance and asdict(provenance),
                "tensors": _write_tensors(path, kind, packer.tensors),
                "content": content,
            }
            document["checksum"] = _checksum(document)
            lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in document.items()]
            write_atomically(path / f"{kind}.json", "{\n" + ",\n".join(lines) + "\n}\n")
        finally:
            _remove_leftovers(path, kind)
    return path


def _checksum(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def _write_tensors(folder: Path, kind: Kind, tensors: Mapping[str, list[Tensor]]) -> dict[str, str]:
    """Write a safetensors file part by part, so that no more than one part is ever copied."""
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
            "dtype": _TYPES[tensors[name][0].dtype],
            "shape": [sum(map(len, tensors[name])), *tensors[name][0].shape[1:]],
            "data_offsets": ends[index : index + 2],
        }
        for index, name in enumerate(names)
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    for name in names:
        for part in tensors[name]:
            yield tensor_bytes(part)


def _remove_leftovers(folder: Path, kind: Kind) -> None:
    """Remove what earlier or interrupted saves left: drafts, and tensors that the JSON does not name."""
    try:
        current = json.loads((folder / f"{kind}.json").read_text("utf-8"))["tensors"]["file"]
    except FileNotFoundError:
        current = None
    except (ValueError, KeyError, TypeError):
        return  # damaged: its tensors may be all that is left of it
    ours = re.compile(rf"\.{kind}\.(json|safetensors)\.\d+|{kind}-[0-9a-f]{{16}}\.safetensors")
    for path in folder.iterdir():
        if ours.fullmatch(path.name) and path.name != current:
            with suppress(OSError):  # in use, on a system where that matters: the next save removes it
                path.unlink()


# ------------------------------------------------------------------------------------------------------------ reading


def _load(kind: Kind, folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = Path(folder)
    try:
        return _read(kind, path)
    except FileNotFoundError:
        # A save may have replaced both files between the two reads: read once more, with no save under way.
        with locked(path):
            try:
                return _read(kind, path)
            except FileNotFoundError:
                raise DataError(
                    f"expected the numbers that {path / f'{kind}.json'} names in a file beside it, found no such file; "
                    "copy both files, or save again"
                ) from None


def _read(kind: Kind, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    document = _document(kind, folder, _json_text(kind, folder))
    return document, _tensors(kind, folder, document["tensors"])


def _json_text(kind: Kind, folder: Path) -> str:
    try:
        return (folder / f"{kind}.json").read_text("utf-8")
    except UnicodeDecodeError:
        raise _damaged(kind, folder, "is not text") from None
    except (FileNotFoundError, NotADirectoryError):
        others = [other for other in _LOADERS if (folder / f"{other}.json").is_file()]
        if others:
            hint = f"found {others[0]}.json: load it with geomkit.{_LOADERS[others[0]]}"
        else:
            hint = "found none; save first" if folder.is_dir() else "found no such folder"
        raise DataError(f"expected {kind}.json in {folder}, {hint}") from None


def _document(kind: Kind, folder: Path, text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
        found, version = document["kind"], document["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(kind, folder, f"cannot be read ({error})") from None
    if type(version) is not int or version > FORMAT:
        raise DataError(
            f"expected format {FORMAT} or earlier in {folder / f'{kind}.json'}, found {version}, written by geomkit "
            f"{document.get('geomkit')}; update geomkit"
        )
    checksum = document.pop("checksum", None)
    if checksum != _checksum(document):
        raise _damaged(kind, folder, "does not have the content that its checksum promises")
    if found != kind:
        loader = f": load it with geomkit.{_LOADERS[found]}" if found in _LOADERS else ""
        raise DataError(f"expected {kind} in {folder / f'{kind}.json'}, found {found}{loader}")
    try:
        if not re.fullmatch(rf"{kind}-[0-9a-f]{{16}}\.safetensors", document["tensors"]["file"]):
            raise ValueError(document["tensors"]["file"])
        return {name: document[name] for name in ("provenance", "tensors", "content")}
    except (KeyError, TypeError, ValueError) as error:
        raise _malformed(kind, folder, error) from None


def _tensors(kind: Kind, folder: Path, named: Mapping[str, str]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / named["file"]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != named.get("sha256"):
        raise DataError(
            f"expected the numbers that {kind}.json names (sha256 {str(named.get('sha256'))[:8]}…), found others in "
            f"{path} ({digest[:8]}…): it is damaged or from another save; copy both files again, or save again"
        )
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise _malformed(kind, folder, error) from None
    return tensors


def _damaged(kind: Kind, folder: Path, what: str) -> DataError:
    return DataError(
        f"expected {folder / f'{kind}.json'} as geomkit wrote it, found that it {what}: it is cut short, damaged or "
        "edited; copy it again, or save again"
    )


def _malformed(kind: Kind, folder: str | Path, error: Exception) -> DataError:
    return DataError(
        f"expected the {kind} in {folder} as geomkit writes them, found {type(error).__name__}: {error}; "
        "they were not written by geomkit: save again"
    )


# ---------------------------------------------------------------------------------------------------- the right model


def _rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (int(torch.Size(shape[:-1]).numel()),)


def _columns(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[-1:])


def _check_model(
    model: nn.Module,
    provenance: Provenance | None,
    saved: Mapping[str, tuple[int, ...]],
    part: Callable[[tuple[int, ...]], tuple[int, ...]],
    what: str,
) -> None:
    """Refuse a model whose names, shapes or weights are not those of the model that a result was computed from.

    Args:
        model: The model.
        provenance: What the result says of its own model.
        saved: The size of what was saved for each parameter.
        part: From a parameter's shape to the size that ``saved`` must have.
        what: What was saved, for messages.
    """
    model = unwrapped_model(model)
    own = {name: part(tuple(value.shape)) for name, value in model.named_parameters(remove_duplicate=False)}
    origin = f", collected from {provenance.model} in {provenance.dtype}" if provenance else ""
    expected = f"expected the model of {what}{origin}"
    advice = "; give that model, or leave model= out to look at the numbers alone"
    if unlike := _unlike(saved, own):
        raise DataError(f"{expected}, found {type(model).__name__} with {unlike}{advice}")
    if provenance is None:
        raise DataError(f"{expected}, found that they do not say what weights they were collected with{advice}")
    here = replace(provenance, **model_fields(model))
    if here.weights != provenance.weights:
        raise DataError(f"{expected}, found other weights ({'; '.join(differences(provenance, here))}){advice}")


def _unlike(saved: Mapping[str, tuple[int, ...]], own: Mapping[str, tuple[int, ...]]) -> str:
    """Say how the parameters of a save and of a model differ, or nothing where they do not."""
    missing = [name for name in saved if name not in own]
    others = [name for name in own if name not in saved] if missing else []
    reshaped = [
        f"{name}: {_size(saved[name])} saved, {_size(own[name])} in the model"
        for name in saved
        if name in own and saved[name] != own[name]
    ]
    named = ((missing, "saved parameters missing"), (others, "not among the saved"), (reshaped, "of another shape"))
    return ", ".join(f"{len(names)} {title} ({_some(names)})" for names, title in named if names)


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a number"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
