"""Singular value decomposition of a gradient of many examples, with the part of every token in every singular value.

To first order, a gradient G without the tokens of an example has the singular values σ_i − u_iᵀ G_n v_i, where G_n is
the example's gradient. One decomposition with vectors thus replaces one decomposition for every example left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.layer_gradient import LayerGradient, row_products
from geomkit.svd.eigenpairs import eigenpairs
from geomkit.svd.singular_values import gram_error_is_small, rank_tolerance
from geomkit.utils.arguments import check_finite


@dataclass(frozen=True, eq=False)
class TokenDecomposition:
    """Singular values of a gradient Σ_t l_t r_tᵀ of T tokens, and the token's parts in them.

    Attributes:
        values: (r,) singular values, descending, fp64.
        compute_products: Function that returns σ_i times the part of token t in singular value i, (T, r).
        left: Function from k to the (rows, k) leading left singular vectors.
        shape: Rows and columns of the gradient.
    """

    values: Tensor
    compute_products: Callable[[], Tensor]
    left: Callable[[int], Tensor]
    shape: tuple[int, int]

    @cached_property
    def parts(self) -> Tensor:
        """(T, r) part u_iᵀ l_t r_tᵀ v_i of token t in singular value i; the parts of all tokens add up to it.

        The parts are zero for singular values that are rounding.
        """
        return self._over_values(self._products)

    @cached_property
    def _products(self) -> Tensor:
        return self.compute_products().double()

    def parts_of_groups(self, lengths: Sequence[int], groups: Sequence[Sequence[int]]) -> Tensor:
        """Return the (J, r) parts of J groups of examples in the singular values.

        Args:
            lengths: Number of tokens of each example; the tokens are in the order of the examples.
            groups: Indices of the examples in every group; every example is in one group.
        """
        group_of_example = torch.empty(len(lengths), dtype=torch.long)
        for place, group in enumerate(groups):
            group_of_example[torch.as_tensor(group)] = place
        products = self._products
        owners = group_of_example.repeat_interleave(torch.tensor(lengths)).to(products.device)
        # Summed first, as the division of all tokens' products would take ten times as long as their sum.
        return self._over_values(products.new_zeros(len(groups), products.shape[1]).index_add_(0, owners, products))

    def _over_values(self, products: Tensor) -> Tensor:
        """Return products divided by the singular values, zero for singular values that are rounding."""
        significant = self.values > rank_tolerance(self.values.cpu().numpy(), self.shape)
        return torch.where(significant, products / torch.where(significant, self.values, 1.0), 0.0)


def input_gram(gradient: LayerGradient) -> Tensor | None:
    """Return the (T, T) fp64 inner products RRᵀ of a factored gradient LᵀR of T tokens, fewer than rows and columns.

    Returns:
        The inner products; ``None`` for a gradient of another form or of as many tokens or more.
    """
    if not isinstance(gradient, FactoredGradient) or gradient.tokens >= min(gradient.shape):
        return None
    return row_products(gradient.right, gradient.right)


def token_decomposition(gradient: FactoredGradient, inputs: Tensor | None = None) -> TokenDecomposition:
    """Return the singular value decomposition of a factored gradient, with every token's part in the singular values.

    Values are exact to 1e-6 of the largest value. They come from Gram matrices, or from two QRs and an SVD where
    squaring would lose too many digits.

    Args:
        gradient: A gradient of T tokens.
        inputs: Its :func:`input_gram`; computed when left out.

    Raises:
        GeometryError: If the gradient is not finite.
    """
    inputs = input_gram(gradient) if inputs is None else inputs
    if inputs is None:
        return _from_matrix(gradient.left, gradient.right)
    return _from_token_grams(gradient.left, gradient.right, inputs) or _from_triangles(gradient.left, gradient.right)


def _from_token_grams(left: Tensor, right: Tensor, b: Tensor) -> TokenDecomposition | None:
    """Decompose LᵀR of fewer tokens than rows and columns; ``None`` where the Gram matrices lose too many digits."""
    # 1. Gram matrices A = LLᵀ = CCᵀ and B = RRᵀ of the tokens.
    a = row_products(left, left)
    check_finite(a, "a gradient's left factor")
    check_finite(b, "a gradient's right factor")
    lower, failed = torch.linalg.cholesky_ex(a)
    if bool(failed):
        return None
    # 2. With Lᵀ = QCᵀ, LᵀR(LᵀR)ᵀ = Q (CᵀBC) Qᵀ: the eigenvectors E of CᵀBC are the left vectors U = QE.
    squared, vectors = eigenpairs(lower.T @ (b @ lower))
    values = squared.clamp(min=0).sqrt().flip(0)
    if not gram_error_is_small(a, b, values):
        return None

    # 3. UᵀLᵀ = EᵀCᵀ, and with v_i = Rᵀ L u_i / σ_i: token t has the part (CE)_ti (BCE)_ti / σ_i.
    def products() -> Tensor:
        images: Tensor = lower @ vectors.flip(1)
        return images * (b @ images)

    def leading(k: int) -> Tensor:
        # U = Q E = Lᵀ C⁻ᵀ E.
        combinations: Tensor = torch.linalg.solve_triangular(lower.T, vectors.flip(1)[:, :k], upper=True)
        return left.T.double() @ combinations

    return TokenDecomposition(values, products, leading, (left.shape[1], right.shape[1]))


def _from_triangles(left: Tensor, right: Tensor) -> TokenDecomposition:
    """Decompose LᵀR = Q_L (S_L S_Rᵀ) Q_Rᵀ from the SVD of its T × T middle."""
    (q_left, s_left), (_, s_right) = (torch.linalg.qr(factor.double().T) for factor in (left, right))
    u, values, v = torch.linalg.svd(s_left @ s_right.T)
    return TokenDecomposition(
        values,
        lambda: (s_left.T @ u) * (s_right.T @ v.T) * values,
        lambda k: q_left @ u[:, :k],
        (left.shape[1], right.shape[1]),
    )


def _from_matrix(left: Tensor, right: Tensor) -> TokenDecomposition:
    """Decompose LᵀR of many tokens from the Gram matrix of its smaller side."""
    tall = left.shape[1] >= right.shape[1]
    # 1. G with at least as many rows as columns, and GᵀG = V Σ² Vᵀ.
    rows, columns = (left, right) if tall else (right, left)
    matrix = rows.T @ columns
    transposed = matrix.T
    gram = row_products(transposed, transposed)
    check_finite(gram, f"a gradient of shape {tuple(matrix.shape)}")
    squared, vectors = eigenpairs(gram)
    values, vectors = squared.clamp(min=0).sqrt().flip(0), vectors.flip(1).to(matrix.dtype)

    # 2. u_i = G v_i / σ_i, so that token t has the part (l_tᵀ G v_i)(r_tᵀ v_i) / σ_i.
    def products() -> Tensor:
        return (rows @ (matrix @ vectors)) * (columns @ vectors)

    def leading(k: int) -> Tensor:
        basis: Tensor = (matrix @ vectors[:, :k]).double() / values[:k] if tall else vectors[:, :k].double()
        return basis

    return TokenDecomposition(values, products, leading, (left.shape[1], right.shape[1]))
