"""Measures of an example's gradient, for :func:`geomkit.measure_samples`: norm, spectrum, sketch, inner products.

A measure is a function of the name of a parameter and the gradients of B examples' losses with respect to it. It
returns a tensor with B rows. It is called parameter by parameter during the passes, and must not store the gradients.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from geomkit.errors import GeometryError
from geomkit.gradients.arithmetic import gram
from geomkit.gradients.gradient_set import GradientSet
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.gradients.projections import projections
from geomkit.svd.singular_values import singular_values_of
from geomkit.utils.arguments import check_seed
from geomkit.utils.seeding import parameter_generator

Measure = Callable[[str, Sequence[LayerGradient]], Tensor]
"""Function from the name of a parameter and the gradients of B examples to a tensor (B, …)."""

Entries = Literal["rademacher", "gaussian"]


def norms(parameter: str, gradients: Sequence[LayerGradient]) -> Tensor:  # noqa: ARG001 - every measure takes the name
    """Return the Frobenius norm of each gradient, (B,) fp64.

    Example:
        >>> from geomkit.gradients.arithmetic import zero_gradient
        >>> norms("lm_head.weight", [zero_gradient((3, 2))])
        tensor([0.], dtype=torch.float64)
    """
    return torch.tensor([gradient.norm for gradient in gradients], dtype=torch.float64)


@dataclass(frozen=True)
class SingularValues:
    """Measure of the singular values of each gradient, see :func:`singular_values`.

    Attributes:
        leading: Number of the largest values; all when ``None``.
    """

    leading: int | None = None

    def __call__(self, parameter: str, gradients: Sequence[LayerGradient]) -> Tensor:  # noqa: ARG002
        """Return (B, K) singular values, descending, fp64."""
        return singular_values_of(gradients)[:, : self.leading]


def singular_values(leading: int | None = None) -> SingularValues:
    """Return the measure of the exact singular values of each gradient.

    The result of the measure is (B, K), descending, fp64, where K is the largest rank bound of the B gradients, or
    ``leading`` if that is smaller. Values beyond the rank of a gradient are zero, so that zeros on the right are exact.
    A vector has one singular value, its norm.

    Args:
        leading: Number of the largest values; all when left out.

    Raises:
        GeometryError: If ``leading`` is below 1.

    Example:
        >>> from geomkit.gradients.factored import FactoredGradient
        >>> singular_values()("w", [FactoredGradient(torch.eye(2, 5), 3 * torch.eye(2, 4))])
        tensor([[3., 3.]], dtype=torch.float64)
    """
    if leading is not None and leading < 1:
        raise GeometryError(f"expected at least one singular value to keep, found {leading}; give e.g. 10")
    return SingularValues(leading)


@dataclass(frozen=True)
class Sketch:
    """Measure of a random projection of each gradient, see :func:`sketch`.

    Attributes:
        size: p and q, numbers of rows and columns of a sketch.
        seed: Seed of the test matrices.
        entries: Distribution of the entries of the test matrices.
    """

    size: tuple[int, int]
    seed: int
    entries: Entries
    _drawn: dict[tuple[str, tuple[int, int]], tuple[Tensor | None, Tensor | None]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __call__(self, parameter: str, gradients: Sequence[LayerGradient]) -> Tensor:
        """Return (B, p, q) sketches, fp32."""
        first = gradients[0]
        left, right = self._on_device(parameter, first.matrix_shape, first.device)
        return projections(gradients, left, right)

    def test_matrices(self, parameter: str, shape: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
        """Return the test matrices Ω_Lᵀ (p, rows) and Ω_R (columns, q); ``None`` for a side that is not projected.

        Args:
            parameter: Name of the parameter; the draws depend on it.
            shape: Rows and columns, see :attr:`LayerGradient.matrix_shape`.
        """
        generator = parameter_generator(self.seed, parameter)
        rows, columns = shape
        p, q = self.size
        if columns == 1:  # a vector has one side, which gets all p · q numbers
            p, q = p * q, 1
        left = self._draw(p, rows, generator) / p**0.5 if p < rows else None
        right = self._draw(columns, q, generator) / q**0.5 if q < columns else None
        return left, right

    def _draw(self, rows: int, columns: int, generator: torch.Generator) -> Tensor:
        if self.entries == "gaussian":
            return torch.randn(rows, columns, generator=generator)
        return torch.randint(2, (rows, columns), generator=generator).mul_(2).sub_(1).float()

    def _on_device(
        self, parameter: str, shape: tuple[int, int], device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the test matrices on a device; they are stored, because drawing takes longer than projecting."""
        matrices = self._drawn.get((parameter, shape)) or self.test_matrices(parameter, shape)
        left, right = (None if matrix is None else matrix.to(device) for matrix in matrices)
        self._drawn[parameter, shape] = left, right
        return left, right


def sketch(size: int | tuple[int, int] = 16, seed: int = 0, *, entries: Entries = "rademacher") -> Sketch:
    """Return the measure of a two-sided random projection, which preserves inner products of gradients in expectation.

    The sketch of a gradient G (m, n) is S = Ω_Lᵀ G Ω_R (p, q). The entries of Ω_L (m, p) and Ω_R (n, q) are independent
    with mean 0 and variance 1/p and 1/q. As E[Ω_L Ω_Lᵀ] = I and E[Ω_R Ω_Rᵀ] = I, E⟨S_A, S_B⟩ = ⟨A, B⟩. With Gaussian
    entries the variance is::

        (α + τ)/q + (β + τ)/p + (α + β + ‖A‖²‖B‖² + ⟨A, B⟩²)/(pq),
        α = ‖AᵀB‖²,  β = ‖ABᵀ‖²,  τ = tr((AᵀB)²)

    The standard deviation is at most ‖A‖‖B‖ √(2/p + 2/q + 4/(pq)), its value for A = B of rank one, and about
    ‖A‖‖B‖/√(pq) for gradients of high rank. With Rademacher entries (±1, scaled) it is never larger.

    A side that is not longer than its size is not projected, and does not contribute to the variance; for example,
    ``size=(16, 10**9)`` projects only the output side. A vector has one side and gets p·q numbers; experts (E, m, n)
    have E·m rows. The test matrices depend only on the seed and on name and shape of the parameter. Therefore sketches
    of different examples, runs and checkpoints of a model can be compared, and sketches of different parameters are
    independent. The test matrices are stored, p·m + q·n numbers for each parameter.

    Projecting both sides is the method of LoGra (Choe et al. 2024); random projections of per-example gradients are
    used in TRAK (Park et al. 2023).

    Args:
        size: p and q, or one number for both.
        seed: Seed of the test matrices.
        entries: ``"rademacher"`` or ``"gaussian"``.

    Returns:
        The measure; its result is (B, min(p, m), min(q, n)), fp32.

    Raises:
        GeometryError: If a size is below 1, the seed is out of range, or the distribution is unknown.

    Example:
        >>> from geomkit.gradients.factored import FactoredGradient
        >>> gradient = FactoredGradient(torch.ones(2, 40), torch.ones(2, 30))
        >>> sketch(8)("w", [gradient]).shape, sketch((8, 30))("w", [gradient]).shape
        (torch.Size([1, 8, 8]), torch.Size([1, 8, 30]))
    """
    check_seed(seed)
    p, q = (size, size) if isinstance(size, int) else size
    if min(p, q) < 1:
        raise GeometryError(f"expected sketches with at least one row and column, found size {size}; give e.g. 16")
    if entries not in {"rademacher", "gaussian"}:
        raise GeometryError(f"expected entries 'rademacher' or 'gaussian', found {entries!r}; choose one of these")
    return Sketch((p, q), seed, entries)


@dataclass(frozen=True, eq=False)
class InnerProducts:
    """Measure of the inner products of each gradient with a reference, see :func:`inner_products`.

    Attributes:
        reference: The reference gradients.
        per_sample: Whether inner products are with each sample of the reference, or with its mean gradient.
    """

    reference: GradientSet
    per_sample: bool

    def __call__(self, parameter: str, gradients: Sequence[LayerGradient]) -> Tensor:
        """Return (B,) or (B, M) inner products, fp64."""
        if parameter not in self.reference:
            raise GeometryError(
                f"expected a reference with every parameter that is measured, found none for {parameter}; collect "
                "both with the same layers="
            )
        if self.per_sample:
            return gram(gradients, [sample[parameter] for sample in self.reference.samples])
        return gram(gradients, [self.reference[parameter]])[:, 0]


def inner_products(reference: GradientSet, *, per_sample: bool = False) -> InnerProducts:
    """Return the measure of the inner products ⟨G, R⟩ of each gradient with reference gradients.

    Args:
        reference: Gradients that were collected from the same model with the same ``layers``.
        per_sample: Take inner products with each of the M samples of the reference, not with its mean gradient.

    Returns:
        The measure; its result is (B,) fp64, or (B, M) with ``per_sample``.

    Raises:
        GeometryError: If ``per_sample`` is set and the reference was collected without samples.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> safety = gk.collect_gradients(model, tokenizer, gk.load_examples("safety").select([0]), progress=False)
        >>> name = "lm_head.weight"
        >>> round(float(inner_products(safety)(name, [safety[name]])[0] / safety[name].norm ** 2), 9)
        1.0
    """
    if per_sample and not reference.samples:
        raise GeometryError(
            "expected per-sample gradients in the reference, found only their mean; collect with per_sample=True"
        )
    return InnerProducts(reference, per_sample)
