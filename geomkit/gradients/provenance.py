"""Where a result comes from: which model, which data, and which choices.

Fingerprints are SHA-256 digests in hexadecimal. Equal fingerprints mean equal content for all that matters here;
different ones say that something differs, and :func:`differences` says what.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from geomkit.errors import DataError
from geomkit.inputs.parameters import unwrapped_model
from geomkit.inputs.tokens import EncodedExamples
from geomkit.utils.saved_files import tensor_bytes
from geomkit.utils.saving import saveable
from geomkit.version import __version__

_SAMPLED = 64
"""About how many values of each parameter enter the fingerprint: fine-tuning moves every one of them."""

_FINGERPRINTS = ("weights", "data")


@saveable
@dataclass(frozen=True)
class Provenance:
    """What a result was computed from.

    Attributes:
        model: The model's name or path, as transformers loaded it.
        revision: The commit it was loaded at; None where the model does not say.
        dtype: The types of its parameters, such as ``"bfloat16"``.
        weights: Fingerprint of its parameters, see :func:`weights_fingerprint`.
        data: Fingerprint of the token ids and loss masks, see :class:`~geomkit.inputs.tokens.EncodedExamples`.
        examples: Number of examples.
        assistant_mask: How the loss mask was made; None where the tokens were given with one.
        max_length: The length that longer examples were cut to; None where none was cut.
        reduction: How the losses of tokens and examples were averaged.
        layers: Which parameters were asked for.
        seed: The seed of what was drawn; None when nothing was.
        geomkit: Version that computed it.
        torch: Version that computed it.
        transformers: Version that computed it.
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
    """Return a fingerprint of a model's parameters: names, shapes, types and evenly spaced values of each.

    It reads some 64 values of each parameter, so it is cheap for a model of any size and on any device, and differs
    for a fine-tuned copy. A change of a few entries by hand can escape it. Parameters without values (on the meta
    device) count with their name, shape and type.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        if not parameter.is_meta:
            digest.update(_some_values(parameter))
    return digest.hexdigest()


def _some_values(parameter: nn.Parameter) -> memoryview:
    # An odd step: an even one would stay in the same few columns of most matrices.
    step = max(1, parameter.numel() // _SAMPLED) | 1
    return tensor_bytes(parameter.detach().reshape(-1)[::step])


def model_fields(model: nn.Module) -> dict[str, Any]:
    """Return the fields of a :class:`Provenance` that the model alone decides; wrappers such as DDP do not count."""
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
    """Return what a result is about to be computed from.

    Args:
        model: The model, with the weights that the result belongs to.
        examples: The examples.
        reduction: How the losses of tokens and examples are averaged.
        layers: Which parameters were asked for, as text.
        seed: The seed of the random draws, where there are any.
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
    """Return a line for each field in which two results differ, in the fields' order.

    Example:
        >>> from dataclasses import replace
        >>> weights = "3fa1" * 16
        >>> a = Provenance("m", None, "float32", weights, "", 2, "template", None, "example", "*", None, "", "", "")
        >>> differences(a, replace(a, weights="9bc0" * 16, examples=3))
        ['weights: 3fa13fa1… ≠ 9bc09bc0…', 'examples: 2 ≠ 3']
    """
    pairs = [(field.name, getattr(a, field.name), getattr(b, field.name)) for field in fields(Provenance)]
    return [f"{name}: {_shown(name, one)} ≠ {_shown(name, other)}" for name, one, other in pairs if one != other]


def _shown(name: str, value: object) -> str:
    return f"{str(value)[:8]}…" if name in _FINGERPRINTS else str(value)


Size = tuple[int, ...]


def check_model(
    model: nn.Module,
    provenance: Provenance | None,
    what: str,
    saved: Mapping[str, Size],
    size: Callable[[torch.Size], Size],
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
