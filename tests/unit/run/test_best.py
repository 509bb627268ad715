"""The best point that was measured: kept, saved, exact after a resume, and named where the end is worse."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import Status
from bilevel.run.verdicts import rank, worse
from bilevel.struct import struct

TOL = 1e-6


def row(value, violation=0.0, status=Status.ESTIMATED, residual=0.0) -> Any:
    return {"value": value, "violation": violation, "status": int(status), "lower_residual": residual}


def test_feasible_and_well_judged_rows_come_before_F():
    ordered = [
        row(1.0), row(2.0, 0.5 * TOL), row(-1.0, 0.1), row(-2.0, 0.2), row(-3.0, np.nan),
        row(-9.0, status=Status.SADDLE),
    ]  # fmt: skip
    ranks = [rank(one, TOL) for one in ordered]
    assert ranks == sorted(ranks)
    assert len(set(ranks)) == len(ranks)
    assert rank(row(np.nan), TOL) > ranks[-1]
    assert rank(row(-1.0, residual=0.1), TOL, at_y=True) > rank(row(1.0), TOL, at_y=True)
    assert worse(row(1.1), row(1.0), TOL)
    assert not worse(row(1.0005), row(1.0), TOL)
    assert not worse(row(1e-7), row(0.0), TOL)
    assert worse(row(0.0, 0.1), row(1.0), TOL)
    assert worse(row(0.0, status=Status.SADDLE), row(1.0), TOL)


def squares(x, y, batch):
    return jnp.sum((x - 1) ** 2 + (y - 1) ** 2)


def distance(x, y, batch):
    return jnp.sum((y - x) ** 2)


def start(key):
    return jax.random.uniform(key, (2,)), jnp.zeros(2)


PROBLEM = bilevel.BilevelProblem(squares, bilevel.Minimize(distance), init=start)


@struct
class Hops(bilevel.SOBA):
    """x turns around a circle through 1, whatever F is; y follows it."""

    def step(self, problem, state, key):
        c, s = jnp.cos(0.3), jnp.sin(0.3)
        x = jnp.array([[c, -s], [s, c]]) @ state.x
        return state._replace(x=x, y=x), jnp.zeros(())


SOLVER = Hops(lower_step_size=0.1, linear_step_size=0.1, upper_step_size=0.1)


def same(one, other):
    assert (one.step, one.row["value"]) == (other.step, other.row["value"])
    for a, b in zip(jax.tree.leaves((one.x, one.y)), jax.tree.leaves((other.x, other.y)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_best_point_is_that_of_the_least_row_to_the_bit_after_a_resume_too(key, tmp_path):
    arguments = {"key": key, "every": 1, "tol": 0.0}
    whole = bilevel.solve(PROBLEM, SOLVER, max_steps=40, **arguments)
    best = whole.best
    assert best is not None
    least = int(np.argmin(whole.record["value"]))
    assert best.step == whole.stats["best_step"] == whole.record.rows[least]["step"]
    np.testing.assert_allclose(2 * np.sum((best.x - 1) ** 2), best.row["value"], rtol=1e-12)
    np.testing.assert_allclose(best.y, best.x)
    assert whole.stats["end_is_worse"]
    assert f"the end is worse than step {best.step}, where F = " in str(whole)
    for stop in (best.step - 1, best.step, best.step + 2):
        path = tmp_path / f"run{stop}"
        bilevel.solve(PROBLEM, SOLVER, max_steps=stop, checkpoint=path, **arguments)
        same(bilevel.solve(PROBLEM, SOLVER, max_steps=40, checkpoint=path, **arguments).best, best)


def test_no_warning_where_the_end_is_the_best(key):
    solution = bilevel.solve(PROBLEM, bilevel.SOBA(), key=key, max_steps=200)
    assert not solution.stats["end_is_worse"]
    assert "the end is worse" not in str(solution)
    assert solution.best is not None
    assert solution.best.step == solution.stats["steps"]


def test_each_lane_keeps_its_own():
    keys = jax.random.split(jax.random.key(1), 3)
    together = bilevel.solve_many(PROBLEM, SOLVER, keys=keys, max_steps=20, every=1, tol=0.0)
    for key, solution in zip(keys, together, strict=True):
        alone = bilevel.solve(PROBLEM, SOLVER, key=key, max_steps=20, every=1, tol=0.0)
        assert solution.best is not None
        assert alone.best is not None
        assert solution.best.step == alone.best.step
        np.testing.assert_allclose(solution.best.x, alone.best.x, rtol=1e-12)
    assert len({solution.best.step for solution in together if solution.best}) > 1


def test_a_feasible_point_is_better_than_a_lower_one_outside(key):
    """The turning x leaves the box, where F may be less."""
    inside = dataclasses.replace(PROBLEM, x_set=bilevel.Box(-2.0, 0.1))
    solution = bilevel.solve(inside, SOLVER, key=key, max_steps=40, every=1, tol=0.0)
    assert solution.best is not None
    assert solution.best.row["violation"] == 0
    feasible = solution.record["violation"] == 0
    assert 0 < feasible.sum() < len(feasible)
    assert solution.best.row["value"] == pytest.approx(solution.record["value"][feasible].min())
