"""What `hypergradient` refuses by name: derivatives of itself, constants that prove nothing, sets that are empty."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import Status

X = jnp.array([0.3, -0.4])


def upper(x, y, batch):
    return jnp.sum(jnp.sin(y))


def lower(x, y, batch):
    return jnp.sum(y**4 / 4 + 0.5 * (1 + x**2) * y**2 - jnp.exp(x) * y) + 0.1 * y[0] * y[1]


PROBLEM = bilevel.BilevelProblem(upper, bilevel.Minimize(lower), init=lambda key: (jnp.zeros(2), jnp.zeros(2)))


@pytest.mark.parametrize("mode", [jax.grad, jax.jacfwd])
def test_its_derivative_is_refused_and_the_objective_has_it(mode):
    with pytest.raises(TypeError, match="implicit_objective"):
        mode(lambda x: bilevel.hypergradient(PROBLEM, x).value)(X)
    right = mode(bilevel.implicit_objective(PROBLEM))(X)
    np.testing.assert_allclose(right, [0.204049, 0.518753], rtol=1e-5)


def test_a_point_without_a_derivative_passes():
    found = jax.grad(lambda x: jnp.sum(x) * bilevel.hypergradient(PROBLEM, jax.lax.stop_gradient(x)).value)(X)
    assert jnp.isfinite(found).all()


def constants(mu):
    return bilevel.Constants(mu=mu, L_fx=1.0, L_fy=1.0, L_gxy=1.0, L_gyy=1.0, C_gxy=1.0, L_g=1.0)


@pytest.mark.parametrize("mu", [-1.0, 0.0, float("nan")])
def test_constants_that_prove_nothing(mu):
    with pytest.raises(bilevel.InvalidInput, match="mu"):
        bilevel.hypergradient(PROBLEM, X, constants=constants(mu))
    bound = jax.jit(lambda mu: bilevel.hypergradient(PROBLEM, X, constants=constants(mu)).error_bound)(mu)
    assert bound == jnp.inf


@pytest.mark.parametrize("y_set", [bilevel.Ball(float("nan")), bilevel.Box(1.0, 0.0), bilevel.Simplex(-1.0)])
def test_empty_sets(y_set):
    problem = dataclasses.replace(PROBLEM, y_set=y_set)
    with pytest.raises(bilevel.InvalidInput, match="y_set"):
        bilevel.hypergradient(problem, X)
    with pytest.raises(bilevel.InvalidInput, match="y_set"):
        bilevel.implicit_objective(problem)


def test_no_steps_are_too_few():
    found = bilevel.hypergradient(PROBLEM, X, lower=bilevel.lower.Newton(max_steps=0))
    assert int(found.status) == Status.MAX_STEPS


@pytest.mark.parametrize(
    "kinds", [("float32", "float64"), ("float64", "float32"), ("float16", "float16"), ("bfloat16", "float32")]
)
def test_dtypes_that_differ_or_have_no_factors(kinds):
    start = tuple(jnp.zeros(2, kind) for kind in kinds)
    problem = dataclasses.replace(PROBLEM, init=lambda key: start)
    for call in (bilevel.hypergradient, lambda problem, x: jax.grad(bilevel.implicit_objective(problem))(x)):
        with pytest.raises(bilevel.InvalidInput, match=r"float16|float32 and float64"):
            call(problem, start[0])


@pytest.mark.parametrize("level", ["upper", "lower"])
def test_doubles_in_data_of_single_variables(level):
    """float64 data make f or g doubles, which loops cannot carry beside a y of float32."""
    data = {f"{level}_data": bilevel.Full(jnp.ones(2, "float64"))}
    problem = bilevel.BilevelProblem(
        upper=lambda x, y, batch: jnp.sum((y if batch is None else batch * y) ** 2),
        lower=bilevel.Minimize(lambda x, y, batch: jnp.sum((y - x if batch is None else batch * y - x) ** 2)),
        init=lambda key: (jnp.zeros(2, "float32"), jnp.zeros(2, "float32")),
        **data,
    )
    x = jnp.zeros(2, "float32")
    calls = problem.validate, lambda: bilevel.hypergradient(problem, x), lambda: bilevel.implicit_objective(problem)(x)
    for call in calls:
        with jax.numpy_dtype_promotion("standard"), pytest.raises(bilevel.InvalidInput, match=f"{level}.*float64"):
            call()


def test_a_start_of_two_dtypes_is_not_valid():
    problem = dataclasses.replace(PROBLEM, init=lambda key: (jnp.zeros(2, "float32"), jnp.zeros(2, "float64")))
    with pytest.raises(bilevel.InvalidInput, match="float32 and float64"):
        problem.validate()
