"""Optima where Y(x) is about to become empty, and starts where it is: runs stay in the leader's domain."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import Status
from bilevel.parts.domain import project_upper

A, B, b = (
    np.array([[1.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]),
    np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]),
    [4.0, 0.0, 0.0],
)


def to_target(x, y, target):
    return jnp.sum((x - target) ** 2)


def bowl(x, y, target):
    return jnp.sum((y - 0.2) ** 2) / 2


def start(key):
    return jnp.zeros(2), jnp.zeros(2)


def cornered(target):
    """The rows y_1 + y_2 <= 4 - x_1 - x_2, y >= x: they contradict each other where x_1 + x_2 > 2."""
    box, rows = bilevel.Box(-5.0, 5.0), bilevel.LinearCoupling(*map(jnp.asarray, (A, B, b)))
    data = bilevel.Full(jnp.asarray(target))
    return bilevel.BilevelProblem(to_target, bilevel.Minimize(bowl), box, box, rows, data, data, start)


@pytest.mark.parametrize("solver", [bilevel.PIGD(), bilevel.BLOCC()])
def test_runs_end_at_the_edge_of_the_domain(solver):
    """Of F = |x - target|^2: at the point of {x in X : x_1 + x_2 <= 2} nearest to the target, also from outside."""
    for target, optimum, x0 in (
        ([3.0, 1.0], [2.0, 0.0], [0.0, 0.0]),
        ([1.5, 1.5], [1.0, 1.0], [2.0, 2.0]),
        ([6.0, 0.0], [4.0, -2.0], [4.0, 3.0]),
    ):
        more = {"x0": jnp.array(x0), "max_steps": 500, "every": 100, "progress": False}
        found = bilevel.solve(cornered(target), solver, key=jax.random.key(0), **more)
        assert found.status == Status.CONVERGED
        np.testing.assert_allclose(found.x, optimum, atol=1e-6)


@functools.cache
def moved():
    return jax.jit(project_upper)


def test_the_nearest_point_of_the_domain():
    """It is that of x_1 + x_2 <= 2 and the box, up to a little inside; points of the domain stay to the bit."""
    problem, rng = cornered([0.0, 0.0]), np.random.default_rng(0)
    exact = bilevel.Polyhedron(np.vstack([np.ones((1, 2)), np.eye(2), -np.eye(2)]), np.array([2.0, 5, 5, 5, 5]))
    for _ in range(20):
        x, y = rng.uniform(-7, 7, 2), rng.uniform(-9, 9, 2)
        found = moved()(problem, jnp.asarray(x), jnp.asarray(y))
        np.testing.assert_allclose(found, exact.project(jnp.asarray(x)), atol=1e-7)
        assert found.sum() <= 2
        clipped = np.clip(x, -5, 5)
        if clipped.sum() <= 2:
            np.testing.assert_array_equal(found, clipped)
