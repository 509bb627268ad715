"""Many starts of a non-convex F: its minima, each once, with the verdict of the runs that end there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel

TILT = 0.1
ROOTS = np.roots([4, 0, -4, TILT])  # of (y^2 - 1)^2 + TILT y: two minima, and a maximum between them


def wells(x, y, batch):
    return jnp.sum((y**2 - 1) ** 2 + TILT * y)


def same(x, y, batch):
    return jnp.sum((y - x) ** 2)


def start(key):
    return jnp.zeros(2), jnp.zeros(2)


PROBLEM = bilevel.BilevelProblem(wells, bilevel.Minimize(same), bilevel.Box(-2.0, 2.0), init=start)


def test_four_minima_each_once_and_ends_of_short_runs_last(key):
    found = bilevel.local_optima(PROBLEM, bilevel.LBFGS(), key=key, num_starts=24, max_steps=40)
    assert [one.status for one in found] == [bilevel.Status.CONVERGED] * 4
    assert sum(one.count for one in found) == 24
    low, high = np.sort(ROOTS)[[0, 2]]
    pairs = [(a, b) for a in (low, high) for b in (low, high)]
    np.testing.assert_allclose(sorted(one.x.round(5).tolist() for one in found), pairs, atol=1e-5)
    values = [one.value for one in found]
    np.testing.assert_allclose(values, sorted(wells(None, np.array(pair), None) for pair in pairs), atol=1e-9)
    assert found[0].solution.status == found[0].status

    short = bilevel.local_optima(PROBLEM, bilevel.LBFGS(), key=key, num_starts=24, max_steps=1)
    assert len(short) > 4
    assert short[-1].status == bilevel.Status.MAX_STEPS


def test_starts_where_nothing_bounds_x(key):
    """Around init's x0, in steps as long as 1 + |x0_i|."""
    around = jax.vmap(lambda key: bilevel.Reals().around(key, jnp.array([0.0, 99.0])))(jax.random.split(key, 2000))
    np.testing.assert_allclose(jnp.std(around, axis=0), [1.0, 100.0], rtol=0.05)
    np.testing.assert_allclose(jnp.mean(around, axis=0) / jnp.array([1.0, 100.0]), [0.0, 0.99], atol=0.1)


def test_bad_numbers_are_named(key):
    with pytest.raises(bilevel.InvalidInput, match="num_starts"):
        bilevel.local_optima(PROBLEM, key=key, num_starts=0)
    with pytest.raises(bilevel.InvalidInput, match="apart"):
        bilevel.local_optima(PROBLEM, key=key, apart=-1.0)
    with pytest.raises(bilevel.InvalidInput, match="problem"):
        bilevel.local_optima(jax, key=key)  # pyright: ignore[reportArgumentType]
