"""The gradients of a whole model on a set of examples, and how much of the model they cover."""

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
from geomkit.utils.display import html_table
from geomkit.utils.saving import save, saveable

if TYPE_CHECKING:
    import pandas as pd

    from geomkit.gradients.provenance import Provenance


@saveable
@dataclass(frozen=True)
class Coverage:
    """Which trainable parameters were seen.

    Attributes:
        seen: Number of entries of each parameter whose gradient was collected.
        missing: Number of entries of each trainable parameter whose gradient was not.
        reasons: Why each missing parameter is missing.
        notes: What a reader should know of a parameter, such as that its module is called twice.
    """

    seen: Mapping[str, int]
    missing: Mapping[str, int]
    reasons: Mapping[str, str]
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Share of the selected trainable entries that was seen, between 0 and 1."""
        total = sum(self.seen.values()) + sum(self.missing.values())
        return sum(self.seen.values()) / total if total else 0.0

    def __str__(self) -> str:
        """Say the share, and name what is missing and what there is to know."""
        # Never "100.0%" where something is missing.
        share = min(self.share, 0.999) if self.missing else self.share
        head = f"{share:.1%} of the chosen parameters"
        named = ((title, said) for title, said in (("missing", self.reasons), ("notes", self.notes)) if said)
        return "; ".join([head, *(f"{title}: {_first_few(said)}" for title, said in named)])


def _first_few(said: Mapping[str, str]) -> str:
    named = ", ".join(f"{name} ({words})" for name, words in list(said.items())[:3])
    return f"{named} and {len(said) - 3} more" if len(said) > 3 else named


@saveable
@dataclass(frozen=True, eq=False)
class GradientSet(Mapping[str, LayerGradient]):
    """The gradient of one loss: a mapping from parameter name to :class:`LayerGradient`.

    Attributes:
        layers: The gradients, in the model's order.
        loss: The loss they are the gradient of, in nats per token.
        examples: Number of examples in the loss.
        loss_tokens: Number of tokens scored.
        coverage: What share of the model was seen.
        samples: One set per example, each the gradient of its own loss, when collected per sample.
        provenance: What they were collected from.
    """

    layers: Mapping[str, LayerGradient] = field(repr=False)
    loss: float
    examples: int
    loss_tokens: int
    coverage: Coverage = field(repr=False)
    samples: "tuple[GradientSet, ...]" = field(default=(), repr=False)
    provenance: "Provenance | None" = field(default=None, repr=False)

    def __getitem__(self, name: str) -> LayerGradient:
        """Return the gradient of one parameter."""
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over parameter names in the model's order."""
        return iter(self.layers)

    def __len__(self) -> int:
        """Return the number of parameters."""
        return len(self.layers)

    def __str__(self) -> str:
        """Say what it is the gradient of."""
        return (
            f"gradient of {len(self)} parameters over {self.examples} examples ({self.loss_tokens} loss tokens), "
            f"loss {self.loss:.3g}, norm {self.norm:.3g}, {self.coverage}"
        )

    @property
    def norm(self) -> float:
        """The norm over all parameters."""
        return float(sum(gradient.norm**2 for gradient in self.values()) ** 0.5)

    @property
    def weights(self) -> np.ndarray:
        """(N,) the share of each sample in the mean: alike, or by scored tokens where ``reduction="token"`` said so."""
        by_token = self.provenance is not None and self.provenance.reduction == "token"
        shares = np.array([sample.loss_tokens if by_token else 1 for sample in self.samples], dtype=np.float64)
        return np.asarray(shares / shares.sum())

    def matrices(self) -> dict[str, LayerGradient]:
        """Return the gradients that are matrices: those a spectrum or a subspace says something about."""
        return {name: gradient for name, gradient in self.items() if min(gradient.matrix_shape) > 1}

    def to_frame(self) -> "pd.DataFrame":
        """Return a row per parameter.

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
        """Write everything to a folder, from which :func:`geomkit.load_gradients` reads it without the model.

        Args:
            folder: Where to. Gradients saved there before are replaced in one step; other files are left alone.

        Returns:
            The folder.
        """
        return save("gradients", self, folder)

    def _repr_html_(self) -> str:
        return html_table(str(self), self.to_frame())


def shared_layers(*sets: Mapping[str, LayerGradient]) -> list[str]:
    """Return the parameter names that all sets have, in order, after checking that they have the same.

    Raises:
        GeometryError: If the sets cover different parameters, or of other shapes; the message names the difference.
    """
    names = list(sets[0])
    for other in sets[1:]:
        if difference := set(names).symmetric_difference(other):
            some = ", ".join(sorted(difference)[:4])
            raise GeometryError(
                f"expected gradients of the same parameters, found {len(difference)} on one side only ({some}); "
                "collect both from the same model with the same layers="
            )
    for name in names:
        check_one_shape(name, *(each[name] for each in sets))
    return names


def check_one_shape(name: str, *gradients: LayerGradient) -> None:
    """Check that gradients belong to parameters of one shape.

    Raises:
        GeometryError: If they do not; the message names the parameter and two shapes.
    """
    first, *others = (tuple(gradient.shape) for gradient in gradients)
    for other in others:
        if other != first:
            raise GeometryError(
                f"expected gradients of one shape for {name}, found {first} and {other}; collect both from the same "
                "model"
            )


def set_inner(a: Mapping[str, LayerGradient], b: Mapping[str, LayerGradient]) -> float:
    """Return the inner product of two gradients over all parameters, in fp64.

    Raises:
        GeometryError: If they cover different parameters.
    """
    return sum(inner(a[name], b[name]) for name in shared_layers(a, b))


def layer_grams(a: GradientSet, b: GradientSet) -> dict[str, Tensor]:
    """Return, for each parameter, every inner product between the samples of two sets.

    Args:
        a: Collected per sample, N examples.
        b: Collected per sample, M examples.

    Returns:
        (N, M) Gram matrices in fp64, by parameter. Their sum is the Gram matrix of the whole gradients.

    Raises:
        GeometryError: If a set was not collected per sample, they cover different parameters, or a gradient is not
            finite.
    """
    for name, gradients in (("first", a), ("second", b)):
        if not gradients.samples:
            raise GeometryError(
                f"expected per-sample gradients in the {name} set, found only their mean; collect with per_sample=True"
            )
    names = shared_layers(*a.samples, *b.samples)
    grams = {name: gram([s[name] for s in a.samples], [s[name] for s in b.samples]) for name in names}
    for name, found in grams.items():
        check_finite(found, name)
    return grams
