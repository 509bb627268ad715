"""Checkers of assumptions against dense NumPy references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import problems
from bilevel.theory import assumptions


@pytest.fixture(scope="module")
def matrix():
    raw = np.random.default_rng(0).normal(size=(4, 4))
    return raw @ raw.T + np.eye(4)


def test_strong_convexity_and_smoothness(matrix):
    values = np.linalg.eigvalsh(matrix)
    M = jnp.asarray(matrix)
    assert assumptions.strongly_convex(M, values[0]) >= 0
    assert assumptions.strongly_convex(M, 1.01 * values[0]) < 0
    assert assumptions.strongly_convex(M, -1.0) < 0
    assert assumptions.smooth(M, values[-1]) >= 0
    assert assumptions.smooth(M, 0.99 * values[-1]) < 0
    skew = jnp.array([[1.0, 5.0], [-5.0, 1.0]])  # the symmetric part counts
    assert assumptions.strongly_convex(skew, 1.0) >= 0


def test_lower_jacobian_is_the_hessian():
    instance = problems.make("quadratic", seed=1, dim_x=2, dim_y=3)
    H = np.asarray(instance.problem.lower_data.arrays.H).mean(axis=0)
    found = assumptions.lower_jacobian(instance.problem, jnp.zeros(2), jnp.zeros(3))
    np.testing.assert_allclose(found, H, atol=1e-14)


def test_licq_is_the_rank_of_the_active_rows():
    rows = np.random.default_rng(1).normal(size=(4, 3))
    rows[3] = 2 * rows[0] - rows[1]
    for active in ([0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]):
        chosen = np.array(active, bool)
        independent = np.linalg.matrix_rank(rows[chosen]) == chosen.sum()
        assert (assumptions.licq(jnp.asarray(rows), jnp.asarray(chosen)) >= 0) == independent
    assert assumptions.licq(jnp.zeros((1, 3)), jnp.array([True])) < 0
    assert assumptions.licq(jnp.zeros((0, 3)), jnp.zeros(0, bool)) >= 0
    for seed in range(20):  # in float32 a row that depends on others does so up to rounding
        A = np.random.default_rng(seed).normal(size=(3, 5))
        A = jnp.asarray(np.vstack([A, A[:1] - 2 * A[1:2]]), jnp.float32)
        assert assumptions.licq(A, jnp.ones(4, bool)) < 0
        assert assumptions.licq(A, jnp.array([True, True, True, False])) >= 0


def test_strict_complementarity():
    check = lambda lam, slack: assumptions.strict_complementarity(jnp.array(lam), jnp.array(slack))  # noqa: E731
    assert check([1.0, 0.0], [0.0, 0.5]) >= 0
    assert check([1.0, 0.0], [0.0, 0.0]) < 0  # weakly active
    assert check([1.0, 1.0], [0.0, 0.5]) < 0  # not complementary
    assert check([], []) >= 0


def test_contraction_is_the_largest_row_sum():
    A = np.random.default_rng(2).normal(size=(3, 3))
    A *= 0.8 / np.abs(A).sum(axis=1).max()
    T = lambda y: jnp.asarray(A) @ y + 1  # noqa: E731
    assert assumptions.contraction(T, jnp.zeros(3), 0.8) >= 0
    assert assumptions.contraction(T, jnp.zeros(3), 0.79) < 0
    assert assumptions.contraction(T, jnp.zeros(3), 1.1) < 0


def test_bounded_variance():
    samples = {"a": np.random.default_rng(3).normal(size=(5, 2)), "b": np.random.default_rng(4).normal(size=(5, 2, 2))}
    flat = np.hstack([leaf.reshape(5, -1) for leaf in samples.values()])
    sigma = np.sqrt(np.mean(np.sum((flat - flat.mean(axis=0)) ** 2, axis=1)))
    samples = jax.tree.map(jnp.asarray, samples)
    assert assumptions.bounded_variance(samples, sigma) >= 0
    assert assumptions.bounded_variance(samples, 0.99 * sigma) < 0
