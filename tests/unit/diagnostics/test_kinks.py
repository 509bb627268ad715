"""The steepest descent at a kink: known ones, and random ones against one-sided derivatives along many directions."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel.diagnostics.kinks import steepest_descent


def less_y(x, y, batch):
    return jnp.sum(x - y)


def twice(x, y, batch):
    return 0.5 * jnp.sum((y - 2 * x) ** 2)


def ends(key):
    return jnp.full(1, 0.1), jnp.zeros(1)


FOLDED = bilevel.BilevelProblem(less_y, bilevel.Minimize(twice), y_set=bilevel.Box(0.0, 1.0), init=ends)


@pytest.mark.parametrize(
    ("x", "rate", "branches"),
    [(0.5, 0.0, 2), (0.0, 1.0, 2), (0.25, 1.0, 1), (-0.5, 1.0, 1), (1.0, 1.0, 1)],
)
def test_a_minimum_and_a_concave_kink(x, rate, branches):
    """F(x) = x - min(max(2 x, 0), 1): slopes 1, -1, 1, with a local maximum at 0 and the minimum at 1/2."""
    found = steepest_descent(FOLDED, jnp.full(1, x), jnp.zeros(1))
    assert found.branches == branches
    assert found.descent == pytest.approx(rate, abs=1e-14)


def test_X_may_make_a_minimum():
    """At the concave kink 0 the only way down is to the right where X = [0, 1], and there is none where X = {0}."""
    for hi, rate in ((1.0, 1.0), (0.0, 0.0)):
        problem = dataclasses.replace(FOLDED, x_set=bilevel.Box(0.0, hi))
        assert steepest_descent(problem, jnp.zeros(1), jnp.zeros(1)).descent == pytest.approx(rate, abs=1e-14)


def test_near_a_kink():
    x = jnp.full(1, 0.5 + 1e-9)
    assert steepest_descent(FOLDED, x, jnp.zeros(1)).branches == 1
    found = steepest_descent(FOLDED, x, jnp.zeros(1), near=1e-8)
    assert (found.descent, found.branches) == (0.0, 2)


def upper(x, y, batch):
    return jnp.sum(batch["c"] * y) + 0.5 * jnp.sum(y**2) + batch["r"] @ x


def lower(x, y, batch):
    return 0.5 * y @ batch["H"] @ y - y @ (batch["G"] @ x + batch["b"])


def origin(key):
    return jnp.zeros(3), jnp.zeros(4)


def drawn(seed, rows, again):
    """y(0) = 0 on all rows; the first two have multipliers. With `again` one of them comes twice, moving otherwise."""
    draws = np.random.default_rng(seed)
    A, B = draws.normal(size=(rows, 4)), draws.normal(size=(rows, 3))
    lam = np.where(np.arange(rows) < 2, draws.uniform(0.5, 1.5, rows), 0.0)
    L = draws.normal(size=(4, 4))
    data = {"H": L @ L.T + np.eye(4), "G": draws.normal(size=(4, 3)), "b": A.T @ lam, "c": draws.normal(size=4)}
    data = jax.tree.map(jnp.asarray, data | {"r": draws.normal(size=3)})
    if again:
        A, B = np.concatenate([A, A[:1]]), np.concatenate([B, draws.normal(size=(1, 3))])
    return bilevel.BilevelProblem(
        upper, bilevel.Minimize(lower), coupling=bilevel.LinearCoupling(*map(jnp.asarray, (A, B, np.zeros(len(A))))),
        upper_data=bilevel.Full(data), lower_data=bilevel.Full(data), init=origin,
    )  # fmt: skip


@jax.jit
def slopes(problem, directions):
    """F'(0; d) for each of the directions."""
    return jax.vmap(lambda d: bilevel.directional_derivative(problem, jnp.zeros(3), d).value)(directions)


@pytest.mark.parametrize("again", [False, True], ids=["independent", "dependent"])
def test_it_is_the_steepest_of_all_directions(again):
    """The rate bounds -F'(x; d) for all of 4000 unit directions, and the best of them comes close to it."""
    draws = np.random.default_rng(7)
    directions = draws.normal(size=(4000, 3))
    directions = jnp.asarray(directions / np.linalg.norm(directions, axis=1, keepdims=True))
    for seed in range(5):
        problem = drawn(seed, 4 - again, again)
        found = steepest_descent(problem, jnp.zeros(3), jnp.zeros(4))
        steepest = max(0.0, float(jnp.nanmax(-slopes(problem, directions))))
        assert steepest - 1e-9 <= found.descent <= 1.02 * steepest + 1e-9
        assert found.branches >= 2


def many(x, y, batch):
    return 0.5 * jnp.sum((y - x[0]) ** 2)


def test_what_is_not_tested_says_why():
    free = dataclasses.replace(FOLDED, y_set=bilevel.Reals())
    ball = dataclasses.replace(FOLDED, x_set=bilevel.Ball(1.0))
    wide = bilevel.BilevelProblem(less_y, bilevel.Minimize(many), y_set=bilevel.Box(0.0, 1.0),
                                  init=lambda key: (jnp.zeros(1), jnp.zeros(11)))  # fmt: skip
    for problem, y, reason in ((free, 1, "active-set"), (ball, 1, "X is not polyhedral"), (wide, 11, "more than 10")):
        found = steepest_descent(problem, jnp.zeros(1), jnp.zeros(y))
        assert math.isnan(found.descent)
        assert found.branches == 0
        assert reason in found.reason
