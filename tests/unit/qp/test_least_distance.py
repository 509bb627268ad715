"""The shortest vector of a polyhedron: its active rows and multipliers (its length: tests/unit/test_sets.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.qp.least_distance import least_distance
from bilevel.qp.least_distance import nearest as find

nearest = jax.jit(find)


@pytest.mark.parametrize(("rows", "n"), [(3, 6), (12, 5), (30, 4)])
def test_multipliers_and_active_rows(rows, n):
    """d = -A'u with u >= 0 on an independent set of rows that d holds with equality, and d feasible: the KKT system."""
    rng = np.random.default_rng(rows)
    active = set()
    for _ in range(30):
        A = rng.normal(size=(rows, n)) * 10.0 ** rng.integers(-2, 3, size=(rows, 1))
        slack = A @ rng.normal(size=n) + np.linalg.norm(A, axis=1) * rng.uniform(0, 1, rows)  # a point is inside
        found = nearest(jnp.asarray(A), jnp.asarray(slack))
        d, u, held = (np.asarray(part) for part in (found.d, found.multipliers, found.active))
        assert not found.empty
        scale = np.linalg.norm(A, axis=1) * (1 + np.linalg.norm(d))
        assert (A @ d <= slack + 1e-10 * scale).all()
        assert (u >= 0).all()
        assert (u[~held] == 0).all()
        np.testing.assert_allclose(-A.T @ u, d, atol=1e-10 * (1 + np.linalg.norm(d)))
        np.testing.assert_allclose(((A @ d - slack) / scale)[held], 0, atol=1e-10)
        assert np.linalg.matrix_rank(A[held]) == held.sum()
        active.add(int(held.sum()))
    assert len(active) >= 2


def test_zero_is_the_answer_where_nothing_is_violated():
    A = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))
    found = nearest(A, jnp.ones(5))
    np.testing.assert_array_equal(found.d, np.zeros(3))
    assert not found.active.any()
    assert not found.empty


def test_missing_rows_contradictions_skip_and_no_rows():
    A = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    found = nearest(A, jnp.array([-1.0, jnp.inf, -2.0]))
    np.testing.assert_allclose(found.d, [-1, -2], rtol=1e-14)
    np.testing.assert_array_equal(found.active, [True, False, True])
    contradictory = nearest(A, jnp.array([-1.0, -1.0, 0.0]))
    assert contradictory.empty
    assert np.isnan(contradictory.d).all()
    np.testing.assert_array_equal(nearest(A, jnp.array([-1.0, -1.0, 0.0]), skip=True).d, [0, 0])
    np.testing.assert_array_equal(least_distance(jnp.zeros((0, 2)), jnp.zeros(0)), [0, 0])


def test_noise_is_allowed_for():
    """Rows that contradict each other by less than the error of their bounds do not."""
    A, slack = jnp.array([[1.0], [-1.0]]), jnp.array([1.0, -1.0 - 1e-6])
    assert nearest(A, slack).empty
    np.testing.assert_allclose(nearest(A, slack, jnp.full(2, 1e-6)).d, 1, rtol=1e-5)
