"""Ties of the follower decided for the leader, and against him."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

import bilevel
from bilevel import BilevelProblem, Box, Full, InvalidInput, LinearCoupling, Minimize
from bilevel.diagnostics import certify


def upper(x, y, batch):
    return batch["c"] @ x + batch["e"] @ y


def lower(x, y, batch):
    return batch["d"] @ y


def start(key):
    return jnp.full(1, 0.5), jnp.zeros(3)


def drawn(seed):
    """x in [0, 2], y in [0, 2]^3 with two rows that move with x; g sees the first y alone."""
    rng = np.random.default_rng(seed)
    A, B = rng.integers(-2, 3, (2, 3)).astype(float), rng.integers(-2, 3, (2, 1)).astype(float)
    c, e, d = rng.integers(-3, 4, 1).astype(float), rng.integers(-3, 4, 3).astype(float), np.array([1.0, 0, 0])
    data = Full({"c": jnp.asarray(c), "e": jnp.asarray(e), "d": jnp.asarray(d)})
    return BilevelProblem(
        upper, Minimize(lower), x_set=Box(0.0, 2.0), y_set=Box(0.0, 2.0),
        coupling=LinearCoupling(A, B, np.array([2.0, 3.0])), upper_data=data, lower_data=data, init=start,
    )  # fmt: skip


def by_grid(problem, sign):
    """min over x of min, or max, of f over the minimisers of g: two linear programs at each of 101 points."""
    rows, data, best = problem.coupling, problem.upper_data.full(), np.inf
    c, e, d = (np.asarray(data[name]) for name in "ced")
    for x in np.linspace(0, 2, 101):
        b = np.asarray(rows.b) - np.asarray(rows.B)[:, 0] * x
        least = linprog(d, rows.A, b, bounds=(0, 2))
        if least.status == 0:
            among = linprog(sign * e, np.vstack([rows.A, d]), np.append(b, least.fun + 1e-12), bounds=(0, 2))
            best = min(best, float(c[0] * x + sign * among.fun))
    return best


@pytest.mark.parametrize("seed", [0, 3, 6])
def test_both_values_are_those_of_a_grid(seed):
    problem = drawn(seed)
    for optimistic, sign in ((True, 1), (False, -1)):
        found = certify(problem, optimistic=optimistic)
        assert found.status == bilevel.Status.CONVERGED
        grid = by_grid(problem, sign)
        assert grid - 0.2 < found.value < grid + 1e-7  # x may lie between two points of the grid
        assert found.follower_gap < 1e-8
        assert found.x.shape == (1,)


def test_a_tie_changes_the_leaders_mind():
    """y in [0, x], g = 0, f = -x + 2 y: -1 at x = 1 where he chooses y = 0, else x, so 0 at x = 0."""
    data = Full({"c": jnp.array([-1.0]), "e": jnp.array([2.0]), "d": jnp.zeros(1)})
    problem = BilevelProblem(
        upper, Minimize(lower), x_set=Box(0.0, 1.0), y_set=Box(0.0, 1.0),
        coupling=LinearCoupling(jnp.eye(1), -jnp.eye(1), jnp.zeros(1)), upper_data=data, lower_data=data,
        init=lambda key: (jnp.full(1, 0.5), jnp.zeros(1)),
    )  # fmt: skip
    ends = {}
    for optimistic in (True, False):
        run = bilevel.solve(problem, bilevel.BranchAndBound(optimistic=optimistic), key=jax.random.key(0), max_steps=1)
        assert run.status == bilevel.Status.CONVERGED
        ends[optimistic] = (float(run.x[0]), float(run.y[0]), run.record["value"][-1])
    assert ends == {True: pytest.approx((1, 0, -1)), False: pytest.approx((0, 0, 0), abs=1e-9)}
    judge = dataclasses.replace(
        bilevel.diagnostics.GLOBAL, measure=bilevel.diagnostics.certificate.Globally(100, False)
    )
    kind = judge.measure(problem, jnp.ones(1), jnp.zeros(1))  # the best answer for the leader, not the worst
    assert float(kind.lower_residual) > 0.5
    assert float(kind.hypergradient) == np.inf


def test_what_cannot_be_restated_is_refused_by_name():
    problem = drawn(0)
    rows = bilevel.UpperConstraints(inequality=lambda x, y: y - 1)
    with pytest.raises(InvalidInput, match="upper_constraints"):
        bilevel.pessimistic(dataclasses.replace(problem, upper_constraints=rows))
    with pytest.raises(InvalidInput, match="without upper constraints"):
        certify(dataclasses.replace(problem, upper_constraints=rows), optimistic=False)
    costs = Minimize(lambda x, y, batch: x[0] * y[0])
    with pytest.raises(InvalidInput, match=r"SmoothCoupling\.h affine"):
        certify(dataclasses.replace(problem, lower=costs), optimistic=False)
    with pytest.raises(InvalidInput, match=r"BranchAndBound\.optimistic"):
        bilevel.BranchAndBound(optimistic="no")
