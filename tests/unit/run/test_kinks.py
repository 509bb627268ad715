"""Runs that end at kinks of F: converged where no direction leads down, and a weaker word near one."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import Status
from bilevel.struct import struct


def less_y(x, y, batch):
    return jnp.sum(x - y)


def twice(x, y, batch):
    return 0.5 * jnp.sum((y - 2 * x) ** 2)


@functools.cache
def folded(x):
    """F(x) = x - min(max(2 x, 0), 1): a concave kink at 0, the minimum at 1/2."""
    return bilevel.BilevelProblem(
        less_y, bilevel.Minimize(twice), y_set=bilevel.Box(0.0, 1.0), init=lambda key: (jnp.full(1, x), jnp.zeros(1))
    )


def test_a_run_on_a_minimum_at_a_kink_has_converged(key, tmp_path):
    arguments: Any = {"key": key, "max_steps": 500}
    solution = bilevel.solve(folded(0.1), bilevel.PIGD(), **arguments)
    assert solution.status == Status.CONVERGED
    np.testing.assert_array_equal(solution.x, 0.5)
    assert solution.stats["kink"] == solution.record["kink"][-1] == 0
    assert solution.record["hypergradient"][-1] == 1  # the gradient of one side
    assert "at a kink of F: F'(x; d) >= " in str(solution)
    assert "kink 0.0e+00" in str(solution)
    path = tmp_path / "run"
    bilevel.solve(folded(0.1), bilevel.PIGD(), checkpoint=path, **arguments | {"max_steps": 25})
    resumed = bilevel.solve(folded(0.1), bilevel.PIGD(), checkpoint=path, **arguments)
    assert resumed.status == Status.CONVERGED
    assert resumed.record["kink"][-1] == 0


@struct
class Still(bilevel.SOBA):
    """Never moves, or hops by `hop` about where it starts."""

    hop: float = 0.0

    def step(self, problem, state, key):
        x = jnp.where(state.x > 0.5, state.x - self.hop, state.x + self.hop)
        return state._replace(x=x, y=jnp.clip(2 * x, 0.0, 1.0)), jnp.zeros(())

    def unsupported(self, problem):
        return None


SIZES = {"lower_step_size": 0.1, "linear_step_size": 0.1, "upper_step_size": 0.1}


def test_a_concave_kink_is_not_converged(key):
    solution = bilevel.solve(folded(0.0), Still(**SIZES), key=key, max_steps=10, throw=True)
    assert solution.status == Status.WEAKLY_ACTIVE
    assert solution.stats["kink"] == pytest.approx(1)
    assert solution.stats["goldstein"] is None
    assert "x is not stationary" in str(solution)


def test_hops_across_a_kink_are_near_a_stationary_point_with_radius_and_distance(key):
    """x is 0.4995 and 0.5005 in turn, where the slopes are -1 and 1."""
    solution = bilevel.solve(folded(0.4995), Still(**SIZES, hop=1e-3), key=key, max_steps=10, throw=True)
    assert solution.status == Status.GOLDSTEIN
    near = solution.stats["goldstein"]
    assert near is not None
    assert near["radius"] == pytest.approx(2e-3)
    assert near["distance"] == pytest.approx(0, abs=1e-12)
    assert "zero is within " in str(solution)


def test_a_run_on_a_slope_is_called_neither(key):
    solution = bilevel.solve(folded(0.2), Still(**SIZES, hop=1e-3), key=key, max_steps=10)
    assert solution.status == Status.MAX_STEPS
    assert "kink" not in solution.record
    assert solution.stats["kink"] is None


def test_many_runs_at_once(key):
    keys = jnp.stack([key, key])
    solutions = bilevel.solve_many(folded(0.1), bilevel.PIGD(), keys=keys, max_steps=500)
    assert [solution.status for solution in solutions] == [Status.CONVERGED] * 2
