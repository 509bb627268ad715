"""Sets of convex functions and intersections: projections against cvxpy, and what a problem with them comes to."""

import cvxpy as cp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel

RADII = jnp.array([1.0, 4.0])


def ellipse(z, radii):
    return jnp.sum(z**2 / radii) - 1


def two(z):
    return jnp.stack([jnp.exp(z[0]) + z[1] - 2, jnp.sum((z - 0.5) ** 2) - 4])


CASES = {
    "ellipse": (bilevel.SmoothSet(ellipse, RADII), lambda z: [z[0] ** 2 + z[1] ** 2 / 4 <= 1]),
    "two": (bilevel.SmoothSet(two), lambda z: [cp.exp(z[0]) + z[1] <= 2, cp.sum_squares(z - 0.5) <= 4]),
    "box": (
        bilevel.Intersection((bilevel.Box(-1.0, 0.4), bilevel.SmoothSet(ellipse, RADII))),
        lambda z: [z[0] ** 2 + z[1] ** 2 / 4 <= 1, z >= -1, z <= 0.4],
    ),
    "ball": (
        bilevel.Intersection((bilevel.Ball(1.0), bilevel.Polyhedron(jnp.array([[1.0, 1.0]]), jnp.array([0.5])))),
        lambda z: [cp.sum_squares(z) <= 1, cp.sum(z) <= 0.5],
    ),
    "rows": (
        bilevel.Intersection((bilevel.Simplex(), bilevel.Box(0.2, 0.7))),
        lambda z: [cp.sum(z) == 1, z >= 0.2, z <= 0.7],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_projection_is_the_nearest_point(name):
    """Points up to 30 away; twice is once."""
    a_set, rows = CASES[name]
    project = jax.jit(a_set.project)
    a_set.validate("x_set", jnp.zeros(2))
    for u in np.random.default_rng(0).normal(size=(6, 2)) * np.array([[0.1], [1], [2], [3], [10], [30]]):
        z = cp.Variable(2)
        cp.Problem(cp.Minimize(cp.sum_squares(z - u)), rows(z)).solve(solver=cp.CLARABEL)
        found = project(u)
        assert np.linalg.norm(found - u) <= np.linalg.norm(z.value - u) + 1e-7
        np.testing.assert_allclose(found, z.value, atol=1e-3)  # all that the solver's tolerance of its value leaves
        np.testing.assert_allclose(project(found), found, atol=1e-11)
        z.value = np.asarray(found)
        assert max(np.max(row.violation()) for row in rows(z)) <= 1e-11


def test_what_is_no_set_is_refused():
    with pytest.raises(bilevel.InvalidInput, match="a set with points"):
        bilevel.SmoothSet(lambda z: 1 + jnp.sum(z**2)).validate("x_set", jnp.ones(2))
    with pytest.raises(bilevel.InvalidInput, match="a tuple of sets"):
        bilevel.Intersection(bilevel.Box(0.0, 1.0)).validate("x_set", jnp.ones(2))


def upper(x, y, batch):
    return x[0] + x[1] + jnp.sum((y - x[0]) ** 2)


def lower(x, y, batch):
    return jnp.sum((y - x[0]) ** 2) / 2


def test_a_leader_in_an_ellipse():
    """The least x1 + x2 on x1^2 + x2^2/4 <= 1 is -sqrt(5); the follower takes y = x1."""
    problem = bilevel.BilevelProblem(
        upper, bilevel.Minimize(lower), x_set=bilevel.SmoothSet(ellipse, RADII), y_set=bilevel.Box(-3.0, 3.0),
        init=lambda key: (jnp.array([0.1, 0.2]), jnp.zeros(1)),
    )  # fmt: skip
    solution = bilevel.solve(problem, bilevel.PIGD(), key=jax.random.key(0), max_steps=400)
    assert solution.status.name == "CONVERGED"
    np.testing.assert_allclose(float(solution.record["value"][-1]), -(5**0.5), atol=1e-6)
