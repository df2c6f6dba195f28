"""The one small quadratic programme behind every rule: the nearest step that satisfies all constraints."""

import numpy as np
from scipy.optimize import nnls

_INFEASIBLE = 1e-10
"""Where constraints contradict one another the residual of the least squares is zero but for rounding."""

_RANK = 1e-12
"""Eigenvalues below this share of the largest are rounding: gradients that depend on one another linearly."""


def multipliers(gram: np.ndarray, excess: np.ndarray) -> np.ndarray | None:
    """Return the multipliers of the nearest step that satisfies every constraint.

    Of all steps d with ⟨d, g_i⟩ ≤ b_i the one nearest to Δ is Δ − Σ λ_i g_i with λ ≥ 0. With K_ij = ⟨g_i, g_j⟩ and
    r_i = ⟨Δ, g_i⟩ − b_i this is least distance programming (Lawson and Hanson 1974, chapter 23): for FᵀF = K and u the
    non-negative least squares solution of [−F; rᵀ] u = [0; 1], λ = u / (1 − rᵀu). It asks for no inverse of K:
    gradients may depend on one another, as that of a whole model does on those of its blocks. A gradient that is zero
    constrains nothing.

    Args:
        gram: K, (n, n), positive semi-definite.
        excess: r, (n,), what each constraint is exceeded by.

    Returns:
        λ, (n,); ``None`` where no step satisfies all.

    Example:
        >>> multipliers(np.diag([4.0, 1.0]), np.array([2.0, -1.0]))
        array([0.5, 0. ])
    """
    # Gradients of very different norms are brought to one, or the small ones would count as rounding.
    norms = np.sqrt(np.clip(np.diag(gram), 0, None))
    used = norms > 0
    found = np.zeros(len(excess))
    if not (used & (excess > 0)).any():
        return found
    asked = excess[used] / norms[used]
    scale = np.abs(asked).max()
    root = _root(gram[np.ix_(used, used)] / np.outer(norms[used], norms[used]))
    solution, _ = nnls(np.vstack([-root, asked / scale]), np.append(np.zeros(len(root)), 1.0))
    slack = 1 - float(asked @ solution) / scale
    if slack < _INFEASIBLE:
        return None
    found[used] = solution * scale / slack / norms[used]
    return found


def _root(gram: np.ndarray) -> np.ndarray:
    """Return F with FᵀF = K, without rows that are rounding."""
    values, vectors = np.linalg.eigh(gram)
    kept = values > _RANK * values[-1]
    return np.asarray(np.sqrt(values[kept])[:, None] * vectors[:, kept].T)
