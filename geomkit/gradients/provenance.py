"""Provenance of a result: the model, the data, the settings and the versions that it was computed with.

Fingerprints are SHA-256 digests in hexadecimal. :func:`differences` lists the fields in which two results differ.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from geomkit.errors import DataError
from geomkit.inputs.offloading import named_values
from geomkit.inputs.parameters import unwrapped_model
from geomkit.inputs.tokens import EncodedExamples
from geomkit.utils.saved_files import tensor_bytes
from geomkit.utils.saving import saveable
from geomkit.version import __version__

_SAMPLED = 64
"""About how many values of each parameter enter the fingerprint; an optimizer step usually changes all of them."""

_FINGERPRINTS = ("weights", "data")


@saveable
@dataclass(frozen=True)
class Provenance:
    """Model, data, settings and versions that a result was computed with.

    Attributes:
        model: Name or path of the model, as transformers loaded it.
        revision: Commit of the model on the hub; ``None`` if the model does not name it.
        dtype: Dtypes of the parameters, such as ``"bfloat16"``.
        weights: Fingerprint of the parameters, see :func:`weights_fingerprint`.
        data: Fingerprint of the token ids and loss masks, see :class:`~geomkit.inputs.tokens.EncodedExamples`.
        examples: Number of examples.
        assistant_mask: How assistant tokens were recognised; ``None`` if the loss mask was given with the tokens.
        max_length: Number of tokens that longer examples were cut to; ``None`` for no cut.
        reduction: Weighting of the examples in the mean loss, ``"example"`` or ``"token"``.
        layers: The choice of parameters, as text.
        seed: Seed of the random draws; ``None`` if there were none.
        geomkit: Version of geomkit.
        torch: Version of torch.
        transformers: Version of transformers.
    """

    model: str
    revision: str | None
    dtype: str
    weights: str
    data: str
    examples: int
    assistant_mask: str | None
    max_length: int | None
    reduction: str
    layers: str
    seed: int | None
    geomkit: str
    torch: str
    transformers: str


def weights_fingerprint(model: nn.Module) -> str:
    """Return a fingerprint of a model's parameters: of names, shapes, dtypes and about 64 values of each parameter.

    The fingerprint is cheap for a model of any size, independent of the device, and different for a fine-tuned copy. It
    may be equal if only a few entries were changed by hand. Parameters on the meta device, which have no values,
    contribute their name, shape and dtype.
    """
    digest = hashlib.sha256()
    for name, parameter, values in named_values(model):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        if not values.is_meta:
            digest.update(_sampled(values))
    return digest.hexdigest()


def _sampled(values: Tensor) -> memoryview:
    """Return the bytes of about :data:`_SAMPLED` evenly spaced values."""
    # An odd step: with an even step, the values of most matrices would be from the same few columns.
    step = max(1, values.numel() // _SAMPLED) | 1
    return tensor_bytes(values.detach().reshape(-1)[::step])


def model_fields(model: nn.Module) -> dict[str, Any]:
    """Return the fields of a :class:`Provenance` that depend on the model only; wrappers such as DDP are removed."""
    model = unwrapped_model(model)
    config = getattr(model, "config", None)
    return {
        "model": getattr(config, "_name_or_path", "") or type(model).__name__,
        "revision": getattr(config, "_commit_hash", None),
        "dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})),
        "weights": weights_fingerprint(model),
    }


def provenance_of(
    model: nn.Module, examples: EncodedExamples, *, reduction: str, layers: str = "*", seed: int | None = None
) -> Provenance:
    """Return the provenance of a result that is computed from a model and examples.

    Args:
        model: The model, with the weights that the result is computed with.
        examples: The examples.
        reduction: Weighting of the examples in the mean loss.
        layers: The choice of parameters, as text.
        seed: Seed of the random draws, if there are any.
    """
    import transformers

    return Provenance(
        **model_fields(model),
        data=examples.fingerprint,
        examples=len(examples),
        assistant_mask=examples.assistant_mask,
        max_length=examples.max_length,
        reduction=reduction,
        layers=layers,
        seed=seed,
        geomkit=__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
    )


def differences(a: Provenance, b: Provenance) -> list[str]:
    """Return a line of text for each field in which two provenances differ, in the order of the fields.

    Example:
        >>> from dataclasses import replace
        >>> weights = "3fa1" * 16
        >>> a = Provenance("m", None, "float32", weights, "", 2, "template", None, "example", "*", None, "", "", "")
        >>> differences(a, replace(a, weights="9bc0" * 16, examples=3))
        ['weights: 3fa13fa1… ≠ 9bc09bc0…', 'examples: 2 ≠ 3']
    """
    pairs = [(field.name, getattr(a, field.name), getattr(b, field.name)) for field in fields(Provenance)]
    return [f"{name}: {_as_text(name, left)} ≠ {_as_text(name, right)}" for name, left, right in pairs if left != right]


def _as_text(name: str, value: object) -> str:
    return f"{str(value)[:8]}…" if name in _FINGERPRINTS else str(value)


Size = tuple[int, ...]
"""The dimensions of a saved value that must agree with the shape of its parameter."""


def check_model(
    model: nn.Module,
    provenance: Provenance | None,
    result_name: str,
    saved: Mapping[str, Size],
    size: Callable[[torch.Size], Size],
) -> None:
    """Raise an error if a saved result was not computed from this model.

    Args:
        model: The model to compare with.
        provenance: Provenance of the result, if it was saved with one.
        result_name: Name of the result in the error message.
        saved: Size of each parameter in the result.
        size: Function from the shape of a parameter to its size in the result.

    Raises:
        DataError: If names, shapes or weights differ, or the result has no provenance; the message lists differences.
    """
    model = unwrapped_model(model)
    sizes = {name: size(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    if unlike := [name for name in saved if sizes.get(name) != saved[name]]:
        lines = (f"{name}: {saved[name]} saved, {sizes.get(name, 'none')} in the model" for name in unlike[:3])
        finding = f"{len(unlike)} parameters that are not alike ({'; '.join(lines)}{'; …' * (len(unlike) > 3)})"
    elif provenance is None:
        finding = "no record of the weights that they were collected with"
    elif differing := _differing_weights(model, provenance):
        finding = f"other weights ({'; '.join(differing)})"
    else:
        return
    origin = f", collected from {provenance.model} in {provenance.dtype}" if provenance else ""
    raise DataError(
        f"expected the model of {result_name}{origin}, found {finding}; give that model, or leave model= out to "
        "look at the numbers alone"
    )


def _differing_weights(model: nn.Module, provenance: Provenance) -> list[str]:
    model_provenance = replace(provenance, **model_fields(model))
    return differences(provenance, model_provenance) if model_provenance.weights != provenance.weights else []
