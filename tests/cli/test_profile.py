"""Compile time and memory of a step, from the compiled program."""

import functools
import json

import jax
import numpy as np
import pytest

import bilevel
import problems
from benchmarks.experiments import accelerator, profile, scale, stochastic_step
from benchmarks.study.registry import Cell
from bilevel.run import lanes


def test_a_row_for_each_problem_and_solver(tmp_path):
    cells = [Cell("quadratic[dim_x=20,dim_y=30]", "SOBA", seed) for seed in (0, 1)] + [Cell("constrained", "SOBA", 0)]
    text = profile.write(tmp_path, cells)  # what `bilevax run --profile` prints and keeps
    rows = json.loads((tmp_path / "profile.json").read_text())
    assert [(row["solver"], "reason" in row) for row in rows] == [("SOBA", False), ("SOBA", True)]
    row = rows[0]
    matrices = 8 * (2 * 30**2 + 2 * 20 * 30 + 20**2)
    assert row["peak"] >= row["data"] >= matrices
    assert (row["x"], row["y"]) == (20, 30)
    assert row["compile"] > 0
    assert "unconstrained lower level" in rows[1]["reason"]
    assert "quadratic[dim_x=20,dim_y=30]" in text
    assert f"{row['peak'] / 1e6:.3g}" in text


def test_what_a_run_has_compiled_before_is_compiled_again():
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    problem, solver = (
        problems.make("quadratic", dim_x=2, dim_y=2).problem,
        bilevel.SOBA(lower_step_size=0.1, linear_step_size=0.1, upper_step_size=0.1),
    )
    key = jax.random.key(0)
    bilevel.solve(problem, solver, key=key, max_steps=2, progress=False)
    lanes.init(problem, solver, key, False)
    compiled.clear()
    profile.of(problem, solver, key)
    assert "/jax/core/compile/backend_compile_duration" in compiled


def test_exponents_are_slopes():
    assert scale.exponent(2.0, 200.0, 10.0) == pytest.approx(2.0)
    assert scale.exponent(5.0, 5.0, 10.0) == 0


def test_a_device_is_measured_on_the_steps_of_a_solve(key):
    problem, solver = (
        problems.make("quadratic", dim_x=2, dim_y=3).problem,
        bilevel.SOBA(lower_step_size=0.1, linear_step_size=0.1, upper_step_size=0.1),
    )
    make = functools.partial(accelerator.of_solver, lambda: (problem, solver))
    step, first, reached = accelerator.on(jax.devices("cpu")[0], make, 7, 1)
    assert 0 <= step < first
    run = bilevel.solve(problem, solver, key=key, max_steps=7, tol=0.0, progress=False)
    np.testing.assert_array_equal(reached, np.concatenate([run.x, run.y]))
    with jax.default_device(jax.devices("cpu")[0]):
        x, _ = accelerator.of_solver(lambda: (problem, solver), seeds=3)(7)
    assert x.shape == (3, 2)


@pytest.mark.skipif(jax.devices()[0].platform != "cpu", reason="there is an accelerator")
def test_without_an_accelerator_there_is_nothing_to_compare(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["accelerator", "agent"])
    with pytest.raises(SystemExit) as ended:
        accelerator.main()
    assert ended.value.code == 2
    assert "no accelerator" in capsys.readouterr().err


def test_the_scans_that_stochastic_steps_are_compared_with_are_the_same_methods():
    stochastic_step.check("SABA")  # the others are checked where the command runs
