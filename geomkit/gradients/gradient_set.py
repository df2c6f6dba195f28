"""The gradients of all parameters of a model, and the record of the parameters with and without a gradient."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from geomkit.errors import GeometryError
from geomkit.gradients.arithmetic import gram, inner
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.inputs.parameters import kind_of, layer_index
from geomkit.utils.arguments import check_finite
from geomkit.utils.display import Result
from geomkit.utils.saving import save, saveable

if TYPE_CHECKING:
    import pandas as pd

    from geomkit.gradients.provenance import Provenance


@saveable
@dataclass(frozen=True)
class Coverage:
    """The chosen parameters whose gradients were collected, and the chosen parameters without a gradient.

    Attributes:
        seen: Number of entries of each parameter with a gradient.
        missing: Number of entries of each chosen parameter without a gradient.
        reasons: The reason for each missing parameter.
        notes: Remarks on parameters, e.g. that the module is called twice.
    """

    seen: Mapping[str, int]
    missing: Mapping[str, int]
    reasons: Mapping[str, str]
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Share of the chosen entries that have a gradient, between 0 and 1."""
        total = sum(self.seen.values()) + sum(self.missing.values())
        return sum(self.seen.values()) / total if total else 0.0

    def __str__(self) -> str:
        """Return the share, the missing parameters and the notes as text."""
        share = min(self.share, 0.999) if self.missing else self.share  # not "100.0%" if a parameter is missing
        head = f"{share:.1%} of the chosen parameters"
        remarks = {"missing": self.reasons, "notes": self.notes}
        return "; ".join([head, *(f"{title}: {_first_three(texts)}" for title, texts in remarks.items() if texts)])


def _first_three(texts: Mapping[str, str]) -> str:
    listed = ", ".join(f"{name} ({text})" for name, text in list(texts.items())[:3])
    return f"{listed} and {len(texts) - 3} more" if len(texts) > 3 else listed


@saveable
@dataclass(frozen=True, eq=False)
class GradientSet(Mapping[str, LayerGradient], Result):
    """The gradient of a loss, as a mapping from parameter names to :class:`LayerGradient`.

    Attributes:
        layers: Gradient of each parameter, in the order of the model.
        loss: Value of the loss, in nats per token.
        examples: Number of examples in the loss.
        loss_tokens: Number of scored tokens.
        coverage: The parameters with and without a gradient.
        samples: Gradient of the loss of each example, one set per example; empty unless collected per sample.
        provenance: Model, data and settings of the collection.
    """

    layers: Mapping[str, LayerGradient] = field(repr=False)
    loss: float
    examples: int
    loss_tokens: int
    coverage: Coverage = field(repr=False)
    samples: "tuple[GradientSet, ...]" = field(default=(), repr=False)
    provenance: "Provenance | None" = field(default=None, repr=False)

    def __getitem__(self, name: str) -> LayerGradient:
        """Return the gradient of a parameter."""
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the parameter names, in the order of the model."""
        return iter(self.layers)

    def __len__(self) -> int:
        """Return the number of parameters."""
        return len(self.layers)

    def __str__(self) -> str:
        """Return the sizes, the loss, the norm and the coverage as text."""
        return (
            f"gradient of {len(self)} parameters over {self.examples} examples ({self.loss_tokens} loss tokens), "
            f"loss {self.loss:.3g}, norm {self.norm:.3g}, {self.coverage}"
        )

    @property
    def norm(self) -> float:
        """Euclidean norm over all parameters."""
        return set_norm(self)

    @property
    def weights(self) -> np.ndarray:
        """(N,) weight of each sample in the mean: equal, or proportional to scored tokens for ``reduction="token"``."""
        by_token = self.provenance is not None and self.provenance.reduction == "token"
        shares = np.array([sample.loss_tokens if by_token else 1 for sample in self.samples], dtype=np.float64)
        return np.asarray(shares / shares.sum())

    def matrices(self) -> dict[str, LayerGradient]:
        """Return the gradients with more than one row and column: only these have a spectrum of more than one value."""
        return {name: gradient for name, gradient in self.items() if min(gradient.matrix_shape) > 1}

    def to_frame(self) -> "pd.DataFrame":
        """Return a data frame with one row per parameter.

        The columns are ``parameter``, ``kind``, ``layer``, ``shape``, ``form``, ``tokens``, ``norm`` and ``note``.
        """
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "parameter": name,
                    "kind": kind_of(name),
                    "layer": layer_index(name),
                    "shape": "×".join(map(str, gradient.shape)),
                    "form": type(gradient).__name__.removesuffix("Gradient").lower(),
                    "tokens": gradient.tokens,
                    "norm": gradient.norm,
                    "note": self.coverage.notes.get(name, ""),
                }
                for name, gradient in self.items()
            ]
        )

    def save(self, folder: str | Path) -> Path:
        """Save the gradients in a folder; :func:`geomkit.load_gradients` loads them, without the model.

        Args:
            folder: Folder to write to. Saved gradients in it are replaced in one step; other files stay.

        Returns:
            The folder.
        """
        return save("gradients", self, folder)


def shared_layers(*sets: Mapping[str, LayerGradient]) -> list[str]:
    """Check that all sets have the same parameters with the same shapes, and return the names in order.

    Raises:
        GeometryError: If parameters or shapes differ; the message names the difference.
    """
    names = list(sets[0])
    for other in sets[1:]:
        if difference := set(names).symmetric_difference(other):
            few = ", ".join(sorted(difference)[:4])
            raise GeometryError(
                f"expected gradients of the same parameters, found {len(difference)} on one side only ({few}); "
                "collect both from the same model with the same layers="
            )
    for name in names:
        check_one_shape(name, *(gradients[name] for gradients in sets))
    return names


def check_one_shape(name: str, *gradients: LayerGradient) -> None:
    """Check that gradients of a parameter have the same shape.

    Raises:
        GeometryError: If shapes differ; the message names the parameter and two shapes.
    """
    first, *others = (tuple(gradient.shape) for gradient in gradients)
    for other in others:
        if other != first:
            raise GeometryError(
                f"expected gradients of one shape for {name}, found {first} and {other}; collect both from the same "
                "model"
            )


def set_norm(gradients: Mapping[str, LayerGradient]) -> float:
    """Return the Euclidean norm of a gradient over all parameters."""
    return float(sum(gradient.norm**2 for gradient in gradients.values()) ** 0.5)


def set_inner(a: Mapping[str, LayerGradient], b: Mapping[str, LayerGradient]) -> float:
    """Return the inner product of the gradients of two losses over all parameters, accumulated in fp64.

    Raises:
        GeometryError: If parameters or shapes differ.
    """
    return sum(inner(a[name], b[name]) for name in shared_layers(a, b))


def layer_grams(a: GradientSet, b: GradientSet) -> dict[str, Tensor]:
    """Return the inner products between the samples of two sets, for each parameter.

    Args:
        a: Gradients of N examples, collected per sample.
        b: Gradients of M examples, collected per sample.

    Returns:
        (N, M) Gram matrices in fp64, by parameter. Their sum is the Gram matrix of the whole gradients.

    Raises:
        GeometryError: If a set was not collected per sample, parameters or shapes differ, or a gradient is not finite.
    """
    for name, gradients in (("first", a), ("second", b)):
        if not gradients.samples:
            raise GeometryError(
                f"expected per-sample gradients in the {name} set, found only their mean; collect with per_sample=True"
            )
    names = shared_layers(*a.samples, *b.samples)
    grams = {
        name: gram([sample[name] for sample in a.samples], [sample[name] for sample in b.samples]) for name in names
    }
    for name, products in grams.items():
        check_finite(products, name)
    return grams
