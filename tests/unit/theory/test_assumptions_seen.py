"""Assumptions that a solver's steps see fail: counted over the whole run, and said in the printed report."""

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from bilevel import LinearCoupling


def upper(x, y, batch):
    return jnp.sum((y - 2) ** 2) + 0.5 * jnp.sum(x**2)


def lower(x, y, batch):
    return 0.5 * jnp.sum((y - x) ** 2)


def hollow(x, y, batch):
    return -0.5 * jnp.sum(y**2) + jnp.sum(x * y)


def wells(x, y, batch):
    return jnp.sum(y**4 / 4 - y**2 / 2) + 0 * jnp.sum(x)


def level(x, y, batch):
    return jnp.sum(y - x)


def init(key):
    return jnp.array([1.5]), jnp.zeros(1)


def problem(A, b, f=upper, g=lower, B=0.0):
    A = jnp.array(A)
    coupling = LinearCoupling(A, jnp.full((len(b), 1), B), jnp.array(b))
    return bilevel.BilevelProblem(f, bilevel.Minimize(g), coupling=coupling, init=init)


def run(problem, solver=bilevel.PIGD(), **more):  # noqa: B008
    return bilevel.solve(problem, solver, key=jax.random.key(0), max_steps=6, every=2, tol=0.0, **more)


def test_dependent_active_rows_are_counted_and_reported(tmp_path):
    """The row y <= 1 twice, active while x > 1. There F = x^2/2 + 1 and x <- 0.9 x from 1.5, which is 0.98 at step 4;
    there F' = 2 (x - 2) + x = -1.05 brings it back to 1.09: five of the six steps.
    """
    twice = problem([[1.0], [1.0]], [1.0, 1.0])
    solution = run(twice)
    licq = "active rows are linearly independent (LICQ)"
    assert solution.stats["failed"][licq] == 5
    assert f"assumption failed at 5 of 6 steps: {licq}" in str(solution)
    path = tmp_path / "half.ckpt"
    bilevel.solve(twice, bilevel.PIGD(), key=jax.random.key(0), max_steps=4, every=2, tol=0.0, checkpoint=path)
    assert run(twice, checkpoint=path).stats["failed"] == solution.stats["failed"]
    keys = jax.random.split(jax.random.key(0))
    many = bilevel.solve_many(twice, bilevel.PIGD(), keys=keys, max_steps=6, every=2, tol=0.0)
    assert [one.stats["failed"] for one in many] == [solution.stats["failed"]] * 2


def test_nothing_is_said_where_all_holds():
    solution = run(problem([[1.0], [-1.0]], [1.0, 5.0]))
    assert solution.stats["failed"] == {}
    assert "assumption" not in str(solution)


def test_rows_without_multipliers_are_reported():
    """The row y <= x, weakly active at y = x, where f = y - x does not move x: every step."""
    solution, strict = run(problem([[1.0]], [0.0], f=level, B=-1.0)), bilevel.PIGD.assumptions["strict"]
    assert solution.stats["failed"][strict] == 6
    assert f"assumption failed at 6 of 6 steps: {strict}" in str(solution)


def test_a_concave_lower_level_is_named():
    """With g = -y^2/2 + x y from the start on: in the info, in the status and in the report, and F has no value."""
    concave, convex = problem([[1.0], [-1.0]], [1.0, 5.0], g=hollow), bilevel.PIGD.assumptions["definite"]
    solution = run(concave, solver=bilevel.PIGD(upper_step_size=0.1))
    assert not solution.info.definite
    assert solution.status == bilevel.Status.SADDLE
    assert solution.stats["failed"][convex] == 6
    assert f"assumption failed at 6 of 6 steps: {convex}" in str(solution)
    assert np.isnan(solution.record["value"]).all()


def test_first_order_methods_see_what_they_can():
    """F2CBA the row y <= 1 twice, active as at x = 1.5; AiPOD where g = y^4/4 - y^2/2 is concave along its adjoint."""
    key, sizes = jax.random.key(0), {"lower_step_size": 0.3, "upper_step_size": 0.1}
    solver = bilevel.F2CBA(**sizes, dual_step_size=0.3, num_lower_steps=30, num_penalty_steps=1)
    for rows, fine in (([[1.0], [1.0]], False), ([[1.0], [-1.0]], True)):
        given = problem(rows, [1.0, 1.0])
        assert solver.assumptions.keys() == {"independent"}
        assert bool(jax.jit(solver.step)(given, solver.init(given, key), key)[1].independent) == fine
    solver = bilevel.AiPOD(**sizes, linear_step_size=0.1, num_lower_steps=1, num_linear_steps=1)
    free = bilevel.BilevelProblem(upper, bilevel.Minimize(wells), init=init)
    for y, fine in ((0.1, False), (1.5, True)):
        state = solver.init(free, key)._replace(y=jnp.array([y]))
        assert bool(jax.jit(solver.step)(free, state, key)[1].convex) == fine


def test_an_empty_lower_level_is_reported_beside_the_last_finite_iterate():
    solution = run(problem([[1.0], [-1.0]], [1.0, -2.0]))
    assert "the lower level has a feasible point" in solution.stats["failed"]
    assert "the lower level has a feasible point" in str(solution)
    assert np.isfinite(solution.x).all()
