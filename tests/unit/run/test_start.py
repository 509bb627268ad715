"""`solve` from a given point, and where it is called under a transformation of JAX."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import BilevelProblem, Full, InvalidInput, Minimize

KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 2)
SOLVER = bilevel.SOBA(lower_step_size=0.5, linear_step_size=0.5, upper_step_size=0.1)


def f(x, y, batch):
    return 0.5 * jnp.sum((y - 1.0) ** 2) + 0.05 * jnp.sum(x["a"] ** 2) + 0.05 * x["b"] ** 2 * batch


def g(x, y, batch):
    return 0.5 * jnp.sum((y - jnp.sin(x["a"]) * x["b"]) ** 2)


def start(key):
    return {"a": jnp.full(2, 0.3), "b": jnp.array(1.0)}, jax.random.normal(key, 2)


PROBLEM = BilevelProblem(f, Minimize(g), upper_data=Full(jnp.array(1.0)), init=start)
X0 = {"a": np.array([0.7, -0.2]), "b": 2.0}
Y0 = np.array([0.1, 0.9])


def begins(key):
    return jax.tree.map(jnp.asarray, X0), jnp.asarray(Y0)


run = partial(bilevel.solve, solver=SOLVER, key=KEY, max_steps=5, every=5, tol=0.0)


def same(one, two):
    jax.tree.map(np.testing.assert_array_equal, (one.x, one.y, one.state), (two.x, two.y, two.state))


def test_a_given_start_is_that_of_a_problem_whose_init_gives_it():
    same(run(PROBLEM, x0=X0, y0=Y0), run(dataclasses.replace(PROBLEM, init=begins)))


def test_what_is_not_given_comes_from_init():
    given = run(PROBLEM, x0=X0, max_steps=0)
    np.testing.assert_array_equal(given.x["a"], X0["a"])
    np.testing.assert_array_equal(given.y, run(PROBLEM, max_steps=0).y)
    given = run(PROBLEM, y0=Y0, max_steps=0)
    np.testing.assert_array_equal(given.y, Y0)
    np.testing.assert_array_equal(given.x["a"], 0.3 * np.ones(2))


def test_all_keys_start_at_a_given_point():
    for solution in bilevel.solve_many(PROBLEM, SOLVER, keys=KEYS, x0=X0, y0=Y0, max_steps=0):
        np.testing.assert_array_equal(solution.x["a"], X0["a"])
        np.testing.assert_array_equal(solution.y, Y0)


def test_another_start_is_another_run_to_a_checkpoint(tmp_path):
    file = tmp_path / "run.safetensors"
    first = run(PROBLEM, x0=X0, checkpoint=file)
    same(run(PROBLEM, x0=X0, checkpoint=file), first)
    with pytest.raises(bilevel.CheckpointError, match="another problem, solver, key or setting"):
        run(PROBLEM, checkpoint=file)


BAD = {
    "shape": ({"y0": np.zeros(3)}, "y0", "float64[3]", "float64[2], as init's y0"),
    "dtype": ({"y0": np.zeros(2, np.float32)}, "y0", "float32[2]", "float64[2]"),
    "structure": ({"x0": np.zeros(2)}, "x0", "float64[2]", "'b': 'float64[]'"),
    "text": ({"y0": "a"}, "y0", "str", "float64[2]"),
    "NaN": ({"x0": X0 | {"a": np.array([0.0, np.nan])}}, "x0['a']", "a non-finite entry", "finite numbers"),
}


@pytest.mark.parametrize("name", BAD)
def test_named_errors(name):
    settings, argument, got, expected = BAD[name]
    for call in (partial(run, PROBLEM), partial(bilevel.solve_many, PROBLEM, SOLVER, keys=KEYS)):
        with pytest.raises(InvalidInput) as caught:
            call(**settings)
        before, after = str(caught.value).split("; expected ", 1)
        assert before.startswith(f"{argument}: got ")
        assert got in before
        assert expected in after


def value(scale):
    """F at the end of a run whose data depend on what is differentiated."""
    return run(dataclasses.replace(PROBLEM, upper_data=Full(scale))).record["value"][-1]


def by_closure(scale):
    """Likewise, where the objective closes over it."""
    return run(dataclasses.replace(PROBLEM, upper=lambda x, y, batch: f(x, y, scale))).x["b"]


@pytest.mark.parametrize("function", [value, by_closure])
@pytest.mark.parametrize("transform", [jax.jit, jax.grad, jax.vmap, jax.jacfwd])
def test_a_transformation_around_solve_is_refused_with_the_way_out(function, transform):
    with pytest.raises(InvalidInput, match=r"^solve: got .*Use implicit_objective or advance"):
        transform(function)(jnp.ones(2) if transform is jax.vmap else jnp.array(1.0))


def test_keys_and_constants_under_jit_are_refused_too():
    for call in (lambda key: run(PROBLEM, key=key).x, lambda key: run(PROBLEM).x, lambda key: run(PROBLEM, x0=X0).x):
        with pytest.raises(InvalidInput, match="Use implicit_objective or advance"):
            jax.jit(call)(KEY)
    with pytest.raises(InvalidInput, match=r"^solve_many: got .*Use implicit_objective or advance"):
        jax.jit(lambda keys: bilevel.solve_many(PROBLEM, SOLVER, keys=keys)[0].x)(KEYS)


def test_what_does_not_depend_on_a_derivative_is_solved_inside_of_it():
    def loss(z):
        return z * run(PROBLEM, max_steps=0).x["b"]

    assert jax.grad(loss)(3.0) == 1.0
