"""Problems without x: x of size 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import BilevelProblem, Box, LinearCoupling, Minimize
from bilevel.diagnostics import goldstein

NONE, KEY = jnp.zeros(0), jax.random.key(0)
TARGET = np.array([0.3, 2.0])


def upper(x, y, batch):
    return jnp.sum((y - 1) ** 2) + jnp.sum(x)


def lower(x, y, batch):
    return jnp.sum((y - TARGET) ** 2) + jnp.sum(x)


def waves(x, y, batch):
    return jnp.sum(jnp.cos(2 * jnp.pi * y))  # minimisers at -1/2 and 1/2 in both


def init(key):
    return NONE, jnp.zeros(2)


ROWS = LinearCoupling(np.array([[1.0, 1.0]]), np.zeros((1, 0)), np.array([0.5]))
FREE = BilevelProblem(upper, Minimize(lower), init=init)
BOXED = BilevelProblem(upper, Minimize(waves), y_set=Box(-1.0, 1.0), init=init)
COUPLED = BilevelProblem(upper, Minimize(lower), y_set=Box(-1.0, 1.0), coupling=ROWS, init=init)
FEW = bilevel.SampledPenalty(num_samples=16, num_slots=2, num_starts=1, num_ladders=1)


@pytest.mark.parametrize(
    ("problem", "solver", "y"),
    [
        (FREE, bilevel.AID(), TARGET),
        (FREE, bilevel.LBFGS(), TARGET),
        (COUPLED, bilevel.BLOCC(), [-0.5, 1.0]),
        (BOXED, FEW, [0.5, 0.5]),
    ],
    ids=["AID", "LBFGS", "BLOCC", "SampledPenalty"],
)
def test_the_lower_level_alone_is_solved(problem, solver, y):
    solution = bilevel.solve(problem, solver, key=KEY, max_steps=400)
    assert solution.status == bilevel.Status.CONVERGED
    assert solution.x.shape == (0,)
    np.testing.assert_allclose(solution.y, y, atol=1e-4)
    assert "CONVERGED" in str(solution)


def test_derivatives_have_no_entries():
    h = bilevel.hypergradient(FREE, NONE)
    assert (h.gradient.shape, float(h.error_bound)) == ((0,), 0)
    assert np.isfinite(h.value)
    assert jax.grad(bilevel.implicit_objective(FREE))(NONE).shape == (0,)
    assert goldstein(FREE, NONE, 0.1, 4, KEY).distance == 0
