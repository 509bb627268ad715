"""How a run ends: the rules on synthetic rows, and runs whose last row is no result."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
import irl
from bilevel import Status
from bilevel.diagnostics import Measurement
from bilevel.parts.tuning import upper_curvature
from bilevel.run.verdicts import diverged, last_word, verdict

TOL = 1e-6


def rows(values, violations=None, residual=0.0, status=Status.ESTIMATED) -> Any:
    """A record with these F."""
    violations = np.zeros(len(values)) if violations is None else violations
    return [
        {"step": k, "value": float(value), "hypergradient": 1.0, "lower_residual": residual, "violation": float(far),
         "oracles": 0.0, "time": 0.0, "error_bound": 0.0, "status": int(status)}
        for k, (value, far) in enumerate(zip(values, violations, strict=True))
    ]  # fmt: skip


def noisy(mean, size, count=21, seed=0):
    return np.asarray(mean) + size * np.random.default_rng(seed).normal(size=count)


CLIMB = np.linspace(0.0, 1.0, 21)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (1 - 0.5 * CLIMB, False),
        (1 + 0.5 * CLIMB, True),
        (2.0 ** np.arange(21), True),
        (-1 - 0.5 * CLIMB, False),
        (-1 + 0.5 * CLIMB, True),
        (np.full(21, 3.0), False),
        (1 + 1e-4 * CLIMB, False),  # below a thousandth of |F_0|
        (noisy(1.0, 0.1), False),
        (np.append(noisy(1.0, 0.1, 20, seed=1), 1.4), False),  # the end alone
        (np.append(1.0, noisy(1.5, 0.1, 20)), True),
        (np.append(1.0, 12 + 1.5 * np.sin(5 * np.arange(20))), True),
        (np.append([1.0, *(12 + 1.5 * np.sin(5 * np.arange(19)))], 1.1), True),  # the end near the start by chance
        (np.concatenate([[1.0], np.geomspace(5, 0.5, 20)]), False),  # up first, then down below the start
        (np.append(1.0, 2.0 - CLIMB[1:] / 2), False),  # above, but on its way down
        (np.concatenate([np.geomspace(10, 1, 16), [1.5, 2.5, 3.5, 4.5, 5.5]]), True),  # climbs again
        (np.concatenate([np.geomspace(10, 1, 16), [1.01, 1.02, 1.03, 1.04, 1.05]]), False),
        ([1.0, 1.5], False),
        ([1.0, 2.5], True),
        ([1.0], False),
        ([], False),
        (np.append(1.0, np.full(20, np.nan)), False),
        (np.append(np.nan, np.full(20, 5.0)), False),
        (np.append(0.0, np.full(20, 1e-7)), False),  # within the tolerance
    ],
)
def test_diverged_from_a_feasible_start(values, expected):
    assert diverged(rows(values), TOL) is expected
    scaled = rows(1e6 * np.asarray(values))
    assert diverged(scaled, 1e6 * TOL) is expected


@pytest.mark.parametrize(
    ("violations", "expected"),
    [
        (1 - CLIMB, False),  # F rises for feasibility
        (np.full(21, 1.0), True),
        (1 + 4 * CLIMB, True),
    ],
)
def test_an_infeasible_start_is_judged_by_violation_first(violations, expected):
    assert diverged(rows(1 + CLIMB, violations), TOL) is expected


def test_a_lower_residual_counts_where_F_is_measured_at_y():
    record = rows(np.append(0.1, np.full(20, 1.0)))
    for k, row in enumerate(record):
        row["lower_residual"] = 0.5 / (k + 1)
    assert diverged(record, TOL)
    assert not diverged(record, TOL, at_y=True)


@pytest.mark.parametrize("status", [Status.UNCHECKED, Status.SATURATED, Status.SADDLE])
def test_what_was_not_solved_at_the_start_is_never_called_diverged(status):
    assert not diverged(rows(1 + CLIMB, status=status), TOL)


def test_the_last_row_has_the_last_word():
    solver = bilevel.SOBA()
    for status in Status:
        good = status in (Status.CONVERGED, Status.ESTIMATED, Status.UNCHECKED)
        record = rows(1 - CLIMB, status=status)
        word = Status.NO_FOLLOWER if status == Status.INFEASIBLE_LOWER else status
        for own in (Status.MAX_STEPS, Status.TIME_LIMIT):
            assert last_word(solver, own, {}, record, TOL) == (own if good else word)
        for own in (Status.CONVERGED, Status.STOPPED, Status.INTERRUPTED, Status.NONFINITE):
            assert last_word(solver, own, {}, record, TOL) == own
    assert last_word(solver, Status.MAX_STEPS, {}, rows(1 + CLIMB), TOL) == Status.DIVERGED
    assert last_word(solver, Status.CONVERGED, {}, rows(1 + CLIMB), TOL) == Status.CONVERGED


class Proves(bilevel.AID):
    """One that says of an F without end that it has none."""

    assumptions = {"bounded": "F is bounded from below"}  # noqa: RUF012
    warnings = {"bounded": Status.UNBOUNDED}  # noqa: RUF012


def test_a_proof_stands_above_a_rise():
    record = rows(1 + CLIMB)
    steps = record[-1]["step"]
    assert last_word(Proves(), Status.MAX_STEPS, {"bounded": steps}, record, TOL) == Status.UNBOUNDED
    assert last_word(Proves(), Status.MAX_STEPS, {"bounded": 0}, record, TOL) == Status.DIVERGED


def wells(x, y, batch):
    return jnp.sum(jnp.cos(3 * y)) + 0.5 * jnp.sum((y - x) ** 2)


def to_one(x, y, batch):
    return jnp.mean((y - 1) ** 2)


def test_a_run_at_a_maximum_of_g_ends_as_a_saddle_and_throws(key):
    """y = x = 0 is stationary for g = sum cos 3y + |y - x|^2/2, and a maximum of it."""
    problem = bilevel.BilevelProblem(to_one, bilevel.Minimize(wells), init=lambda key: (jnp.zeros(3), jnp.zeros(3)))
    with pytest.raises(bilevel.SolveError, match=r"SADDLE: .*Start y elsewhere") as caught:
        bilevel.solve(problem, bilevel.AID(), key=key, max_steps=40, throw=True)
    assert set(caught.value.solution.record["status"]) == {Status.SADDLE}
    assert "SADDLE" in str(caught.value.solution).splitlines()[3]


def steep(x, y, batch):
    return 1e3 * jnp.sum((y - 5) ** 2)


def vanishing(x, y, batch):
    return jnp.sum(jnp.exp(x) * y**2) - jnp.sum(y)


def test_a_run_away_has_diverged_and_shows_no_zero(key):
    """y(x) = exp(-x)/2; the first step throws x to minus some thousands, where exp(x) = 0 and g has no minimum."""
    start = jnp.ones(1, jnp.float32), jnp.ones(1, jnp.float32)
    problem = bilevel.BilevelProblem(steep, bilevel.Minimize(vanishing), init=lambda key: start)
    solution = bilevel.solve(problem, bilevel.AID(upper_step_size=1.0), key=key, max_steps=200)
    assert solution.status == Status.DIVERGED
    assert "upper step size" in solution.status.advice
    assert "0.000e+00 |  1.0" not in str(solution)
    assert "unknown" in str(solution)
    assert "UNSOLVED_LOWER" in str(solution)


def test_a_likelihood_that_hops_above_its_start_has_diverged(key):
    """The step 1/(curvature of F at x0) is too long on this random world: F hops from 10.8 to 13.5 about its start."""
    draws, S, A = np.random.default_rng(0), 5, 3
    P = np.zeros((S, A, S))
    for s in range(S):
        for a in range(A):
            P[s, a, draws.choice(S, 2, replace=False)] = draws.dirichlet([1, 1])
    mdp = irl.MDP.dense(P, np.full(S, 1 / S), 0.9)
    reward = irl.LinearReward.of(np.eye(S), A)
    found = irl.value_iteration(mdp, reward.table(jnp.asarray(draws.uniform(size=S))))
    expert = irl.occupancy(mdp, irl.policy(found.Q))
    problem = irl.to_bilevel(mdp, expert, reward)
    step = 1 / upper_curvature(problem, *problem.init(key))
    solution = bilevel.solve(problem, irl.MLIRL(upper_step_size=step), key=key, max_steps=3000)
    assert solution.status == Status.DIVERGED
    assert jax.tree.all(jax.tree.map(lambda leaf: bool(jnp.isfinite(leaf).all()), solution.x))


@pytest.mark.parametrize(
    ("status", "word"),
    [
        (Status.STALLED, None),
        (Status.UNDETERMINED, None),
        (Status.NONFINITE, Status.NONFINITE),
        (Status.ESTIMATED, Status.NONFINITE),
    ],
)
def test_a_run_goes_on_where_only_the_follower_was_not_found(status, word):
    """F is NaN at such an x, and may be a number at the next; the run is lost where f or g overflows."""
    nan = np.nan
    assert verdict(Measurement(nan, nan, np.inf, nan, 0.0, status), TOL, early=False) is word
