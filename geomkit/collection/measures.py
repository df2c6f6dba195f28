"""What to keep of an example's own gradient instead of the gradient: :func:`geomkit.measure_samples` takes these.

A measure is any callable that takes a parameter's name and B examples' gradients by it, and returns a tensor with B
rows. It is called while the gradients pass by, parameter after parameter, and must not hold on to them.
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
from geomkit.svd.singular_values import singular_values_of
from geomkit.utils.seeding import parameter_generator

Measure = Callable[[str, Sequence[LayerGradient]], Tensor]
"""(parameter's name, the gradients of B examples) → (B, …)."""

Entries = Literal["rademacher", "gaussian"]


def norms(parameter: str, gradients: Sequence[LayerGradient]) -> Tensor:  # noqa: ARG001 - a measure is told the name
    """Return the Frobenius norm of each gradient, (B,) fp64.

    Example:
        >>> from geomkit.gradients.arithmetic import zero_gradient
        >>> norms("lm_head.weight", [zero_gradient((3, 2))])
        tensor([0.], dtype=torch.float64)
    """
    return torch.tensor([gradient.norm for gradient in gradients], dtype=torch.float64)


@dataclass(frozen=True)
class SingularValues:
    """The measure that :func:`singular_values` makes.

    Attributes:
        leading: How many of the largest to keep; all when ``None``.
    """

    leading: int | None = None

    def __call__(self, parameter: str, gradients: Sequence[LayerGradient]) -> Tensor:  # noqa: ARG002
        """Return (B, K) singular values, fp64."""
        return singular_values_of(gradients)[:, : self.leading]


def singular_values(leading: int | None = None) -> SingularValues:
    """Make the measure of the exact singular values of each gradient, descending.

    Its result is (B, K) fp64, K the largest rank bound of the B gradients or ``leading`` if that is smaller; what is
    beyond a gradient's own rank is zero, so padding on the right is exact. A vector's only value is its norm.

    Args:
        leading: How many of the largest to keep; all when left out.

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
    """The measure that :func:`sketch` makes.

    Attributes:
        size: p and q, rows and columns of a sketch.
        seed: Seed of the test matrices.
        entries: What these are drawn from.
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
        return torch.stack([_projected(gradient, left, right) for gradient in gradients])

    def test_matrices(self, parameter: str, shape: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
        """Draw Ω_Lᵀ (p, rows) and Ω_R (columns, q), scaled; ``None`` for a side that is kept as it is.

        Args:
            parameter: Name of the parameter, which the draw depends on.
            shape: Rows and columns, see :attr:`LayerGradient.matrix_shape`.
        """
        generator = parameter_generator(self.seed, parameter)
        rows, columns = shape
        wide, tall = self.size
        if columns == 1:  # a vector has one side only, which gets all the numbers
            wide, tall = wide * tall, 1
        left = self._draw(wide, rows, generator) / wide**0.5 if wide < rows else None
        right = self._draw(columns, tall, generator) / tall**0.5 if tall < columns else None
        return left, right

    def _draw(self, rows: int, columns: int, generator: torch.Generator) -> Tensor:
        if self.entries == "gaussian":
            return torch.randn(rows, columns, generator=generator)
        return torch.randint(2, (rows, columns), generator=generator).mul_(2).sub_(1).float()

    def _on_device(
        self, parameter: str, shape: tuple[int, int], device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the test matrices, drawn once: that takes longer than to use them."""
        kept = self._drawn.get((parameter, shape)) or self.test_matrices(parameter, shape)
        left, right = (None if matrix is None else matrix.to(device) for matrix in kept)
        self._drawn[parameter, shape] = left, right
        return left, right


def _projected(gradient: LayerGradient, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Return Ω_Lᵀ G Ω_R, fp32; the gradient's rows are summed up first, as most of an embedding's are zero."""
    if left is not None:
        product = gradient.rmatmul(left)
        return product if right is None else product @ right
    if right is not None:
        return gradient.matmul(right)
    return gradient.dense().reshape(gradient.matrix_shape).float()


def sketch(size: int | tuple[int, int] = 16, seed: int = 0, *, entries: Entries = "rademacher") -> Sketch:
    """Make the measure of a two-sided random projection, whose inner products are those of the gradients on average.

    A gradient G (m, n) becomes S = Ω_Lᵀ G Ω_R of shape (p, q), with independent entries of mean 0 and variance 1/p in
    Ω_L (m, p) and 1/q in Ω_R (n, q). As E[Ω_L Ω_Lᵀ] = I and E[Ω_R Ω_Rᵀ] = I, E⟨S_A, S_B⟩ = ⟨A, B⟩. With Gaussian
    entries the variance is::

        (α + τ)/q + (β + τ)/p + (α + β + ‖A‖²‖B‖² + ⟨A, B⟩²)/(pq),
        α = ‖AᵀB‖²,  β = ‖ABᵀ‖²,  τ = tr((AᵀB)²)

    so the standard deviation is at most ‖A‖‖B‖ √(2/p + 2/q + 4/(pq)), reached by equal gradients of rank one, and
    about ‖A‖‖B‖/√(pq) for gradients of high rank. Rademacher entries (±1) never have a larger one.

    A side no longer than its size is kept as it is, which takes its part of the variance away: to keep the inputs,
    say ``size=(16, 10**9)``. A vector has one side and gets p·q numbers, experts (E, m, n) count as E·m rows. The
    test matrices depend on the seed, the parameter's name and its shape alone: sketches of other examples, other runs
    and other checkpoints of a model compare, and different parameters' are independent. They are kept, p·m + q·n
    numbers for each parameter.

    The projection of each side by itself is that of LoGra (Choe and others 2024), and the use of random projections
    of per-example gradients that of TRAK (Park and others 2023).

    Args:
        size: p and q, or one number for both.
        seed: Seed of the test matrices.
        entries: ``"rademacher"`` or ``"gaussian"``.

    Returns:
        A measure; its result is (B, min(p, m), min(q, n)), fp32.

    Raises:
        GeometryError: If a size is below 1, or there are no such entries.

    Example:
        >>> from geomkit.gradients.factored import FactoredGradient
        >>> gradient = FactoredGradient(torch.ones(2, 40), torch.ones(2, 30))
        >>> sketch(8)("w", [gradient]).shape, sketch((8, 30))("w", [gradient]).shape
        (torch.Size([1, 8, 8]), torch.Size([1, 8, 30]))
    """
    wide, tall = (size, size) if isinstance(size, int) else size
    if min(wide, tall) < 1:
        raise GeometryError(f"expected sketches with at least one row and column, found size {size}; give e.g. 16")
    if entries not in {"rademacher", "gaussian"}:
        raise GeometryError(f"expected entries 'rademacher' or 'gaussian', found {entries!r}; choose one of these")
    return Sketch((wide, tall), seed, entries)


@dataclass(frozen=True, eq=False)
class InnerProducts:
    """The measure that :func:`inner_products` makes.

    Attributes:
        reference: The gradients to take inner products with.
        per_sample: Whether with each of the reference's samples, or with the gradient of the whole set.
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
    """Make the measure of the inner products ⟨G, R⟩ of each gradient with those of a set.

    Args:
        reference: A set, collected from the same model with the same choice of parameters.
        per_sample: Take them with each of the set's M samples instead of with the gradient of the whole set.

    Returns:
        A measure; its result is (B,) fp64, or (B, M) with ``per_sample``.

    Raises:
        GeometryError: If ``per_sample`` is asked for and the set was collected without.

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
