"""The run loop: statuses, limits, interruption, checkpoints, records, many seeds."""

import math
import os
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
import problems
from bilevel import SOBA, Status, run
from bilevel.run.checkpoint import CheckpointError
from bilevel.struct import struct

STEPS = {"lower_step_size": 0.5, "linear_step_size": 0.5, "upper_step_size": 0.2}


def soba(lower, upper):
    return SOBA(lower_step_size=lower, linear_step_size=lower, upper_step_size=upper)


@pytest.fixture(scope="module")
def instance():
    return problems.make("quadratic", seed=0, dim_x=3, dim_y=4)


def test_converged_means_the_referee_agrees(instance, key):
    solution = bilevel.solve(instance.problem, SOBA(**STEPS), key=key, max_steps=5000, every=100, tol=1e-9)
    assert solution.status == Status.CONVERGED
    np.testing.assert_allclose(solution.x, instance.truth.x, atol=1e-7)
    last = solution.record.rows[-1]
    assert last["hypergradient"] + last["error_bound"] <= 1e-9
    assert last["lower_residual"] <= 1e-9
    assert last["step"] == solution.stats["steps"] < 5000
    assert last["value"] == pytest.approx(instance.truth.value, abs=1e-12)


def test_a_good_x_with_a_bad_y_is_not_converged(instance, key):
    """A solver that claims the optimum of x but never moves y: the referee's F and gradient are perfect, y is not."""

    @struct
    class Liar(SOBA):
        def output(self, problem, state):
            return jnp.asarray(instance.truth.x), jnp.zeros(4)

    solution = bilevel.solve(instance.problem, Liar(**STEPS), key=key, max_steps=10, every=5, tol=1e-6)
    assert solution.status == Status.MAX_STEPS
    assert solution.record["hypergradient"][-1] < 1e-10
    assert solution.record["lower_residual"][-1] > 1e-2


def test_tol_zero_runs_all_steps_and_records_them(instance, key):
    solution = bilevel.solve(instance.problem, SOBA(**STEPS), key=key, max_steps=250, every=100, tol=0.0)
    assert solution.status == Status.MAX_STEPS
    assert list(solution.record["step"]) == [0, 100, 200, 250]
    assert list(solution.record["oracles"]) == [0, 400, 800, 1000]  # 4 calls a step on all of the data
    assert (np.diff(solution.record["time"]) > 0).all()


def test_oracles_count_passes_over_the_data(key):
    problem = problems.make("quadratic", seed=0, dim_x=2, dim_y=3, num_samples=8, batch_size=2).problem
    solution = bilevel.solve(problem, SOBA(**STEPS), key=key, max_steps=10, every=10, tol=0.0)
    assert solution.record["oracles"][-1] == 10 * 4 * (2 / 8)
    aid = bilevel.AID(lower_step_size=0.1, upper_step_size=0.1)
    full = bilevel.solve(problem, aid, key=key, max_steps=10, every=10, tol=0.0)
    assert full.record["oracles"][-1] == 10 * (1 + 10 + 11 + 1)


def test_no_steps_measures_the_start(instance, key):
    solution = bilevel.solve(instance.problem, SOBA(**STEPS), key=key, max_steps=0)
    assert solution.status == Status.MAX_STEPS
    assert len(solution.record) == 1
    np.testing.assert_array_equal(solution.x, instance.problem.init(_init_key(key))[0])


def _init_key(key):
    return jax.random.split(jax.random.fold_in(key, 0x7FFFFFFF), 3)[0]


def test_non_finite_stops_at_the_last_finite_step(instance, key):
    """The state returned is the one just before the first NaN, wherever the chunks end."""
    solver = SOBA(lower_step_size=1e3, linear_step_size=0.1, upper_step_size=0.1)
    for every in (1000, 7):
        solution = bilevel.solve(instance.problem, solver, key=key, max_steps=1000, every=every)
        assert solution.status == Status.NONFINITE
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((solution.x, solution.y)))
        k = solution.stats["steps"]
        if every == 1000:  # no measurement before: the state itself turned non-finite, at exactly this step
            state, _ = run.advance(instance.problem, solver, solution.state, key, k, 1)
            assert not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
            last = k
        else:  # the referee saw F overflow first
            assert not np.isfinite(solution.record["value"][-1])
            assert last - 70 < k == solution.record["step"][-1] < last


def test_an_infeasible_lower_level_does_not_stop_a_run_but_is_its_end(key):
    """0 <= y <= x + 1 is empty at the start, x = -3, and feasible at the optimum, x = 1 and y = 1."""
    row = bilevel.LinearCoupling(jnp.ones((1, 1)), -jnp.ones((1, 1)), jnp.ones(1))
    problem = bilevel.BilevelProblem(
        squares, bilevel.Minimize(distance), y_set=bilevel.Box(0.0, 10.0), coupling=row,
        init=lambda key: (jnp.full(1, -3.0), jnp.zeros(1)),
    )  # fmt: skip

    @struct
    class Ahead(SOBA):  # x moves towards 1 whatever y is
        def step(self, problem, state, key):
            x = state.x + 0.1 * (1 - state.x)
            return state._replace(x=x, y=jnp.maximum(x, 0)), jnp.zeros(())

        def unsupported(self, problem):
            return None

    short, long = (bilevel.solve(problem, Ahead(**STEPS), key=key, max_steps=n, every=5, tol=1e-6) for n in (5, 300))
    assert short.status == Status.NO_FOLLOWER
    assert short.record.rows[-1]["status"] == Status.INFEASIBLE_LOWER
    assert np.isnan(short.record["value"][-1])
    assert "Y(x) is empty here; no x had a follower" in str(short)
    assert long.status == Status.CONVERGED
    np.testing.assert_allclose(long.x, 1, atol=1e-5)


def squares(x, y, batch):
    return jnp.sum((x - 1) ** 2 + (y - 1) ** 2)


def distance(x, y, batch):
    return jnp.sum((y - x) ** 2)


def test_time_limit(instance, key):
    begin = time.monotonic()
    solution = bilevel.solve(
        instance.problem, SOBA(**STEPS), key=key, max_steps=2**31 - 2, every=2**30, tol=0.0, time_limit=0.3
    )
    assert solution.status == Status.TIME_LIMIT
    assert 0 < solution.stats["steps"] < 2**31 - 2
    assert solution.record["step"][-1] == solution.stats["steps"]
    assert time.monotonic() - begin < 300  # it came back at all: the steps asked for would take hours


def test_callback_sees_every_row_and_can_stop(instance, key):
    seen = []

    def stop_at_30(step, state, row):
        seen.append((step, row["step"], float(state.x[0])))
        return step >= 30

    solution = bilevel.solve(
        instance.problem, SOBA(**STEPS), key=key, max_steps=100, every=10, tol=0.0, callback=stop_at_30
    )
    assert solution.status == Status.STOPPED
    assert [step for step, _, _ in seen] == [0, 10, 20, 30]
    assert solution.stats["steps"] == 30


def test_keyboard_interrupt_keeps_everything_and_resumes(instance, key, tmp_path):
    path = tmp_path / "run"

    def interrupt(step, state, row):
        if step == 20:
            raise KeyboardInterrupt

    arguments = {"key": key, "max_steps": 50, "every": 10, "tol": 0.0}
    solution = bilevel.solve(instance.problem, SOBA(**STEPS), callback=interrupt, checkpoint=path, **arguments)
    assert solution.status == Status.INTERRUPTED
    assert list(solution.record["step"]) == [0, 10, 20]
    resumed = bilevel.solve(instance.problem, SOBA(**STEPS), checkpoint=path, **arguments)
    whole = bilevel.solve(instance.problem, SOBA(**STEPS), **arguments)
    for a, b in zip(jax.tree.leaves(resumed.state), jax.tree.leaves(whole.state), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(resumed.record["value"], whole.record["value"])


@pytest.mark.process
def test_a_real_sigint_in_another_process(program, tmp_path):
    """Ctrl-C while compiled code runs: the process ends by itself with status INTERRUPTED and a usable checkpoint."""
    child = subprocess.Popen([*program("endless_run"), str(tmp_path / "c")], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("step") and int(line.split()[1]) >= 2000:
            break
    os.kill(child.pid, signal.SIGINT)
    rest, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    status, steps = rest.strip().splitlines()[-1].split()
    assert status == "INTERRUPTED"
    assert int(steps) >= 2000
    assert (tmp_path / "c").exists()


def test_checkpoint_of_another_run_is_refused(instance, key, tmp_path):
    path = tmp_path / "run"
    bilevel.solve(instance.problem, SOBA(**STEPS), key=key, max_steps=5, checkpoint=path)
    other = problems.make("quadratic", seed=1, dim_x=3, dim_y=4).problem
    for problem, solver, another in (
        (other, SOBA(**STEPS), key),
        (instance.problem, SOBA(**{**STEPS, "upper_step_size": 0.1}), key),
        (instance.problem, SOBA(**STEPS), jax.random.key(5)),
    ):
        with pytest.raises(CheckpointError, match="another problem, solver, key or setting"):
            bilevel.solve(problem, solver, key=another, max_steps=5, checkpoint=path)


def test_resume_of_a_finished_run_adds_nothing(instance, key, tmp_path):
    arguments = {"key": key, "max_steps": 20, "every": 10, "tol": 0.0, "checkpoint": tmp_path / "run"}
    first = bilevel.solve(instance.problem, SOBA(**STEPS), **arguments)
    again = bilevel.solve(instance.problem, SOBA(**STEPS), **arguments)
    assert again.status == first.status == Status.MAX_STEPS
    assert again.record.rows == first.record.rows
    converged = {**arguments, "tol": 1e-3, "max_steps": 5000, "every": 100, "checkpoint": tmp_path / "other"}
    first = bilevel.solve(instance.problem, SOBA(**STEPS), **converged)
    again = bilevel.solve(instance.problem, SOBA(**STEPS), **converged)
    assert again.status == first.status == Status.CONVERGED
    assert again.record.rows == first.record.rows
    assert again.stats["steps"] == first.stats["steps"]


def test_throw(instance, key):
    bad = SOBA(lower_step_size=1e3, linear_step_size=0.1, upper_step_size=0.1)
    with pytest.raises(bilevel.SolveError, match="NONFINITE: A value became infinite") as caught:
        bilevel.solve(instance.problem, bad, key=key, max_steps=500, throw=True)
    assert caught.value.solution.status == Status.NONFINITE
    bilevel.solve(instance.problem, SOBA(**STEPS), key=key, max_steps=5, throw=True)


def test_solve_many_sets_each_key_aside_when_it_is_done(instance):
    keys = jax.random.split(jax.random.key(3), 4)
    solutions = bilevel.solve_many(instance.problem, SOBA(**STEPS), keys=keys, max_steps=5000, every=20, tol=1e-8)
    assert [s.status for s in solutions] == [Status.CONVERGED] * 4
    for key, solution in zip(keys, solutions, strict=True):
        alone = bilevel.solve(instance.problem, SOBA(**STEPS), key=key, max_steps=5000, every=20, tol=1e-8)
        assert solution.stats["steps"] == alone.stats["steps"] == solution.record["step"][-1]
        np.testing.assert_allclose(solution.x, alone.x, rtol=1e-9)


def nan_trap(x, y, batch):
    """y'y/2 - x'y with a NaN for y beyond 3: some starts fall in, others do not."""
    return 0.5 * jnp.sum(y**2) * jnp.where(jnp.max(jnp.abs(y)) > 3, jnp.nan, 1.0) - x @ y


def to_zero(x, y, batch):
    return 0.5 * jnp.sum(y**2)


def test_solve_many_with_a_lane_that_turns_non_finite():
    problem = bilevel.BilevelProblem(
        to_zero, bilevel.Minimize(nan_trap), init=lambda key: (4 * jax.random.uniform(key, (1,)), jnp.zeros(1))
    )
    keys = jax.random.split(jax.random.key(0), 8)
    solver = soba(0.5, 1e-3)
    solutions = bilevel.solve_many(problem, solver, keys=keys, max_steps=100, every=50, tol=0.0)
    starts = np.array([float(problem.init(_init_key(key))[0][0]) for key in keys])
    assert {s.status for s in solutions} == {Status.NONFINITE, Status.MAX_STEPS}
    for start, solution in zip(starts, solutions, strict=True):
        assert (solution.status == Status.NONFINITE) == (start > 3.2) or 3.0 < start < 3.2
        assert np.isfinite(solution.y).all()


def test_schedules_and_transformations(instance, key):
    import optax

    schedule = optax.polynomial_schedule(0.5, 0.01, 1.0, 300)
    for upper in (schedule, optax.adam(0.05), optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.2))):
        solver = soba(0.5, upper)
        solution = bilevel.solve(instance.problem, solver, key=key, max_steps=2000, every=500, tol=0.0)
        assert np.linalg.norm(solution.x - instance.truth.x) < 1e-2


def test_arguments_are_checked(instance, key):
    solver = SOBA(**STEPS)
    for bad, name in (
        ({"max_steps": -1}, "max_steps"), ({"max_steps": 2.5}, "max_steps"), ({"every": 0}, "every"),
        ({"tol": -1.0}, "tol"), ({"tol": math.nan}, "tol"), ({"time_limit": -1.0}, "time_limit"),
        ({"max_steps": True}, "max_steps"), ({"tol": "small"}, "tol"), ({"time_limit": "1h"}, "time_limit"),
        ({"callback": 1}, "callback"), ({"measure": 1}, "measure"), ({"problem": instance}, "problem"),
        ({"solver": SOBA}, "solver"), ({"solver": "SOBA"}, "solver"),
        ({"solver": bilevel.AID(num_lower_steps=1.5)}, "AID.num_lower_steps"),  # pyright: ignore[reportArgumentType]
        ({"solver": bilevel.AID(num_lower_steps=-1)}, "AID.num_lower_steps"),
    ):  # fmt: skip
        with pytest.raises(bilevel.InvalidInput, match=f"{name}: got"):
            bilevel.solve(**{"problem": instance.problem, "solver": solver, "key": key} | bad)
    with pytest.raises(bilevel.InvalidInput, match="key: got shape"):
        bilevel.solve(instance.problem, solver, key=jax.random.split(key))
    with pytest.raises(bilevel.InvalidInput, match="keys: got shape"):
        bilevel.solve_many(instance.problem, solver, keys=key)
    with pytest.raises(bilevel.InvalidInput, match="key: got"):
        bilevel.solve(instance.problem, solver, key=0)  # pyright: ignore[reportArgumentType]


def test_calls_that_no_count_declares_are_a_dash(instance, key):
    solution = bilevel.solve(instance.problem, bilevel.LBFGS(), key=key, max_steps=2)
    assert {line.split("|")[5].strip() for line in str(solution).splitlines() if line.count("|") == 7} == {
        "oracles",
        "-",
    }
    assert "- where a step takes as many as it needs" in str(solution)


def test_the_report_reads_as_designed(instance, key):
    solution = bilevel.solve(instance.problem, SOBA(**STEPS), key=key, max_steps=40, every=10, tol=0.0)
    lines = str(solution).splitlines()
    assert lines[1].split(" | ") != []
    assert [cell.strip() for cell in lines[1].split("|")] == [
        "step", "F(x)", "hypergrad", "lower res", "feas", "oracles", "time (s)", "verdict",
    ]  # fmt: skip
    assert len({len(line) for line in lines[1:8]}) == 1  # aligned
    assert "MAX_STEPS after 40 steps" in lines[-2]
    assert repr(solution).startswith("Solution(status=MAX_STEPS, steps=40, F=")


def far(x, y, batch):
    return jnp.sum(batch * (x - 1e5) ** 2 / 2 + 0 * y)


def slack(x, y, batch):
    return batch * jnp.sum((y - x) ** 2) / 2


def scaled_problem(upper_scale, lower_scale, x0, x_set=None):
    return bilevel.BilevelProblem(
        far, bilevel.Minimize(slack), x_set=x_set or bilevel.Reals(), upper_data=bilevel.Full(jnp.asarray(upper_scale)),
        lower_data=bilevel.Full(jnp.asarray(lower_scale)), init=lambda key: (jnp.full(1, x0), jnp.zeros(1)),
    )  # fmt: skip


def test_rounding_of_a_large_x_does_not_hide_the_gradient():
    """(x - (x - g))/1 is 0 for |g| below the last digit of x."""
    problem = scaled_problem(1e-18, 1.0, 0.0)
    x, gradient = jnp.full(1, 1e12), jnp.full(1, 1e-6)
    np.testing.assert_allclose(bilevel.diagnostics.gradient_mapping(problem, x, gradient), 1e-6)


def test_a_small_set_does_not_hide_a_large_gradient():
    problem = scaled_problem(1.0, 1.0, 0.0, x_set=bilevel.Box(0.0, 1e-8))
    wrong_end, right_end, gradient = jnp.full(1, 1e-8), jnp.zeros(1), jnp.full(1, 1e3)
    assert float(bilevel.diagnostics.gradient_mapping(problem, wrong_end, gradient)[0]) > 1
    assert float(bilevel.diagnostics.gradient_mapping(problem, right_end, gradient)[0]) == 0


def test_a_flat_lower_objective_does_not_hide_a_wrong_y(key):
    """|R| <= tol everywhere for g ~ 1e-9, so the distance to the referee's y(x) has to be looked at."""
    problem = scaled_problem(1e-9, 1e-9, 1e5)
    solution = bilevel.solve(problem, soba(0.1, 0.1), key=key, max_steps=10, every=5, tol=1e-6)
    assert solution.record["lower_residual"][-1] > 1e-6 or solution.status == Status.MAX_STEPS
    assert solution.status == Status.MAX_STEPS


def test_an_unsolvable_lower_level_is_never_converged(key):
    def unbounded(x, y, batch):
        return 1e-9 * jnp.sum(jnp.sqrt(1 + y**2) - 2 * y) + 0 * jnp.sum(x)

    problem = bilevel.BilevelProblem(
        lambda x, y, batch: jnp.sum((x - 1) ** 2 + jnp.tanh(y)),
        bilevel.Minimize(unbounded),
        init=lambda key: (jnp.ones(1), jnp.zeros(1)),
    )
    solution = bilevel.solve(problem, soba(0.1, 0.1), key=key, max_steps=10, every=5, tol=1e-6)
    assert solution.status != Status.CONVERGED


@pytest.mark.parametrize("name", ["AID", "AmIGO", "SOBA"])
def test_defaults_work_for_a_contraction_that_rotates(name, key):
    """|T_y| = 0.94 with the symmetric part I/2: a step of 1/lambda_max(sym R_y) = 2 would diverge."""

    def rotate(x, y, batch):
        return jnp.array([[0.5, 0.8], [-0.8, 0.5]]) @ y + x

    problem = bilevel.BilevelProblem(
        lambda x, y, batch: jnp.sum((y - 1) ** 2),
        bilevel.FixedPoint(rotate),
        init=lambda key: (jnp.zeros(2), jnp.zeros(2)),
    )
    solution = bilevel.solve(problem, getattr(bilevel, name)(), key=key, max_steps=3000)
    assert solution.status == Status.CONVERGED


def test_saba_takes_every_batch_size_that_divides(key):
    problem = problems.make("quadratic", seed=0, dim_x=2, dim_y=2, num_samples=49, batch_size=1).problem
    solver = bilevel.SABA(lower_step_size=0.1, linear_step_size=0.1, upper_step_size=0.1)
    assert solver.unsupported(problem) is None
    problem = problems.make("quadratic", seed=0, dim_x=2, dim_y=2, num_samples=49, batch_size=2).problem
    assert "must divide" in solver.unsupported(problem)


def test_a_solvers_own_numbers_never_replace_the_measured_ones():
    problem = problems.make("quadratic", dim_x=2, dim_y=3).problem  # ITD's Info has a field `value` of its own
    solution = bilevel.solve(problem, bilevel.ITD(num_lower_steps=2), key=jax.random.key(0), max_steps=3, tol=0.0)
    measured = bilevel.diagnostics.measure(problem, solution.x, solution.y).value
    np.testing.assert_allclose(solution.record["value"][-1], measured, rtol=1e-12)
