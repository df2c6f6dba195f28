"""The quadratic programme against a general solver, and against what its solution must satisfy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from geomkit.spf.projection.nearest import multipliers


def drawn(seed, constraints, dimension, bound_scale=1.0):
    generator = np.random.default_rng(seed)
    gradients = generator.normal(size=(constraints, dimension)) * 10.0 ** generator.uniform(-2, 2, (constraints, 1))
    step = generator.normal(size=dimension)
    bounds = -bound_scale * np.linalg.norm(gradients, axis=1) * generator.uniform(0, 0.2, constraints)
    return gradients, step, bounds


def solved(gradients, step, bounds):
    found = multipliers(gradients @ gradients.T, gradients @ step - bounds)
    return found, step - gradients.T @ found


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), constraints=st.integers(1, 6))
def test_the_solution_satisfies_the_conditions_of_optimality(seed, constraints):
    """Feasible, multipliers not negative, and none but those of constraints that are met exactly."""
    gradients, step, bounds = drawn(seed, constraints, 12)
    found, nearest = solved(gradients, step, bounds)
    norms = np.linalg.norm(gradients, axis=1)
    slack = (bounds - gradients @ nearest) / norms
    assert (slack >= -1e-9).all()
    assert (found >= 0).all()
    assert np.abs(found * norms * slack).max() < 1e-8


@pytest.mark.parametrize("seed", range(5))
def test_the_step_is_the_nearest_one(seed):
    """Against scipy's sequential least squares, to 1e-5."""
    gradients, step, bounds = drawn(seed, 4, 8)
    gradients /= np.linalg.norm(gradients, axis=1)[:, None]
    bounds = -np.abs(bounds) / np.abs(bounds).max() * 0.3
    _, nearest = solved(gradients, step, bounds)
    reference = minimize(
        lambda d: ((d - step) ** 2).sum(),
        np.zeros(8),
        jac=lambda d: 2 * (d - step),
        constraints={"type": "ineq", "fun": lambda d: bounds - gradients @ d, "jac": lambda _: -gradients},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert reference.success
    np.testing.assert_allclose(nearest, reference.x, atol=1e-5)


def test_a_gradient_may_be_the_sum_of_others():
    """As a model's gradient is that of its blocks: a singular system, which has a nearest step all the same."""
    blocks = np.eye(2)
    gradients = np.vstack([blocks, blocks.sum(0)])
    step = np.array([1.0, -0.2])
    found, nearest = solved(gradients, step, np.array([0.0, 0.0, -1.0]))
    # The nearest point of the line x + y = −1 alone is (0.1, −1.1), where the first block conflicts.
    np.testing.assert_allclose(nearest, [0.0, -1.0], atol=1e-12)
    assert (found >= 0).all()


def test_contradictions_have_no_solution_and_zero_gradients_no_say():
    gradients = np.array([[1.0, 0.0], [-1.0, 0.0]])
    assert multipliers(gradients @ gradients.T, np.array([1.0, 1.0])) is None
    assert multipliers(np.zeros((2, 2)), np.ones(2)).tolist() == [0.0, 0.0]
    assert multipliers(np.diag([1.0, 0.0]), np.array([2.0, 1.0])) == pytest.approx([2.0, 0.0])


def test_what_is_satisfied_is_left_alone():
    assert multipliers(np.eye(3), np.array([-1.0, 0.0, -2.0])).tolist() == [0.0, 0.0, 0.0]
