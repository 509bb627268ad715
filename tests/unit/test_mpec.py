"""MPEC ends at known optima, and says no more than its referee has seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
import problems
from bilevel import BilevelProblem, Box, Full, InvalidInput, Minimize, SmoothCoupling


def test_a_linear_follower_with_ties_and_rows_of_the_leader():
    """textbook[case=bard_falk]: its optimum -13/4 is proved by `certify`; 20 steps or a few more come to it."""
    problem = problems.make("textbook", case="bard_falk").problem
    solution = bilevel.solve(problem, bilevel.MPEC(), key=jax.random.key(0), max_steps=100)
    assert solution.status == bilevel.Status.CONVERGED
    assert solution.record["value"][-1] == pytest.approx(-3.25, abs=1e-6)
    assert "each piece" in solution.stats["referee"]
    found = bilevel.diagnostics.classify(problem, solution.x, solution.y)
    assert (found.word, found.b_stationary) == ("S", True)


def toward(x, y, batch):
    return jnp.sum((y - batch) ** 2) + 0.1 * (jnp.sum(x**2) - 4) ** 2


def near_x(x, y, batch):
    return jnp.sum((y - x) ** 2)


def disc(x, y, data):
    return jnp.sum(y**2) - data


def start(key):
    return jax.random.uniform(key, (2,), minval=0.2), jnp.zeros(2)


def test_a_follower_on_a_disc_whose_row_bends():
    """y = x/|x| for |x| > 1, so F = 0 at x = 2 (0.6, 0.8) alone."""
    target = jnp.array([0.6, 0.8])
    problem = BilevelProblem(
        toward, Minimize(near_x), x_set=Box(-5.0, 5.0), coupling=SmoothCoupling(disc, data=jnp.ones(1)),
        upper_data=Full(target), init=start,
    )  # fmt: skip
    solution = bilevel.solve(problem, bilevel.MPEC(), key=jax.random.key(0), max_steps=100)
    assert solution.status == bilevel.Status.CONVERGED
    np.testing.assert_allclose(solution.x, 2 * target, atol=1e-4)
    np.testing.assert_allclose(solution.y, target, atol=1e-6)


def test_settings_are_checked():
    for wrong in ({"relaxation": 0.0}, {"shrink": -0.1}, {"memory": 0}, {"shrink": 1.5}):
        with pytest.raises(InvalidInput, match=rf"MPEC\.{next(iter(wrong))}"):
            bilevel.MPEC(**wrong)
