"""What singular values reach in noise of independent, equally strong entries: closed forms of random matrix theory.

Gradients are not such noise: their entries share tokens, inputs and scales, and coloured noise reaches further than
white noise of the same total. Read these beside the empirical floor of :func:`geomkit.svd.noise_floor.noise_floor`.
"""

from functools import lru_cache
from math import cos, pi, sin, sqrt

import numpy as np

from geomkit.errors import GeometryError


def marchenko_pastur_edge(shape: tuple[int, int], noise: float) -> float:
    """Return the largest singular value of a large matrix of independent entries, s(√m + √n).

    That of a finite matrix is near it, on either side (Geman 1980).

    Args:
        shape: Rows m and columns n.
        noise: s, the standard deviation of the entries.

    Example:
        >>> marchenko_pastur_edge((100, 400), noise=0.1)
        3.0
    """
    return noise * (sqrt(shape[0]) + sqrt(shape[1]))


def gavish_donoho_threshold(values: np.ndarray, shape: tuple[int, int], noise: float | None = None) -> float:
    """Return the optimal hard threshold for singular values of a low-rank matrix in white noise.

    Keeping the values above it and dropping those below has the smallest error in the limit of large matrices (Gavish
    and Donoho 2014). It is λ*(β)·√n·s for noise of standard deviation s, and λ*(β)/√μ(β) times the median singular
    value for unknown noise, with β = m/n ≤ 1 and μ(β) the median of the Marchenko–Pastur law. It lies above
    :func:`marchenko_pastur_edge`: a direction has to be stronger to be worth keeping than to be seen.

    Args:
        values: Singular values, at least min(shape) of them; not read if ``noise`` is given.
        shape: Rows and columns.
        noise: s, if it is known.

    Raises:
        GeometryError: If the noise is not given and cannot be told from the values: with fewer tokens than rows or
            columns the median singular value is zero, whatever the noise.

    Example:
        >>> round(gavish_donoho_threshold(np.ones(50), (50, 50)), 3)
        2.858
    """
    smaller, larger = sorted(shape)
    ratio = smaller / larger
    optimum = sqrt(2 * (ratio + 1) + 8 * ratio / (ratio + 1 + sqrt(ratio**2 + 14 * ratio + 1)))
    if noise is not None:
        return optimum * sqrt(larger) * noise
    if len(values) < smaller:
        raise GeometryError(
            f"expected all {smaller} singular values of a matrix of shape {shape}, found {len(values)}; with fewer "
            "tokens than rows and columns the median value is zero and says nothing of the noise: give noise="
        )
    return optimum * float(np.median(values)) / sqrt(_median_of_marchenko_pastur(ratio))


@lru_cache(maxsize=256)
def _median_of_marchenko_pastur(ratio: float) -> float:
    """Return the median of the law of the squared singular values of noise with variance 1/n, for m = ratio · n rows.

    With x = 1 + β + 2√β cos t the density √((b−x)(x−a)) / (2πβx) dx becomes 2 sin²t / (πx) dt, without the roots that
    quadrature is slow at.
    """
    from scipy.integrate import quad
    from scipy.optimize import brentq

    def position(angle: float) -> float:
        return 1 + ratio + 2 * sqrt(ratio) * cos(angle)

    def density(angle: float) -> float:
        # At β = 1 the law begins at zero, where sin² and x vanish together.
        place = position(angle)
        return 2 * sin(angle) ** 2 / (pi * place) if place > 0 else 2 / pi

    def above(angle: float) -> float:
        return float(quad(density, 0, angle)[0]) - 0.5

    return position(float(brentq(above, 0, pi, xtol=1e-12)))
