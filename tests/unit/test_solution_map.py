"""y(x) with derivatives: closed forms, both modes, vmap, sets and rows, and NaN where nothing is solved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel

H = np.array([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.5]])
P = np.array([[1.0, 0.0], [0.5, -1.0], [0.0, 2.0]])
X = jnp.array([0.3, -0.4])


def quadratic(x, y, batch):
    return y @ jnp.asarray(H) @ y / 2 - (jnp.asarray(P) @ x) @ y


def upper(x, y, batch):
    return jnp.sum(jnp.sin(y)) + x @ x


def start(key):
    return jnp.zeros(2), jnp.zeros(3)


def problem_of(lower, **more):
    return bilevel.BilevelProblem(upper=upper, lower=lower, init=start, **more)


@pytest.mark.parametrize("derivative", [jax.jacfwd, jax.jacrev])
def test_a_linear_systems_solution_and_its_jacobian(derivative):
    y = bilevel.solution_map(problem_of(bilevel.Minimize(quadratic)))
    np.testing.assert_allclose(y(X), np.linalg.solve(H, P @ X), rtol=1e-12)
    np.testing.assert_allclose(derivative(y)(X), np.linalg.solve(H, P), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("derivative", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("row", [False, True], ids=["box", "row"])
def test_an_active_bound_holds_its_coordinate(derivative, row):
    """y_0 <= -0.2 is active at X: the other coordinates follow from the reduced system."""
    e = jnp.array([[1.0, 0.0, 0.0]])
    coupling = bilevel.LinearCoupling(A=e, b=jnp.array([-0.2]))
    limits = {"coupling": coupling} if row else {"y_set": bilevel.Box(jnp.full(3, -9.0), jnp.array([-0.2, 9.0, 9.0]))}
    y = bilevel.solution_map(problem_of(bilevel.Minimize(quadratic), **limits))
    free = np.linalg.solve(H[1:, 1:], P[1:] @ X - H[1:, 0] * -0.2)
    np.testing.assert_allclose(y(X), [-0.2, *free], rtol=1e-10)
    expected = np.vstack([np.zeros(2), np.linalg.solve(H[1:, 1:], P[1:])])
    np.testing.assert_allclose(derivative(y)(X), expected, rtol=1e-9, atol=1e-12)


def test_a_nonlinear_level_by_differences_and_for_many_points():
    def lower(x, y, batch):
        return quadratic(x, y, batch) + jnp.sum(y**4) / 4

    problem = problem_of(bilevel.Minimize(lower))
    y, F = bilevel.solution_map(problem), bilevel.implicit_objective(problem)
    step = 1e-5
    columns = [(y(X + step * d) - y(X - step * d)) / (2 * step) for d in jnp.eye(2)]
    np.testing.assert_allclose(jax.jacfwd(y)(X), jnp.stack(columns, axis=1), rtol=1e-7)
    chain = jax.grad(lambda x: upper(x, y(x), None))(X)
    np.testing.assert_allclose(chain, jax.grad(F)(X), rtol=1e-12)
    points = X[None] + jnp.arange(4.0)[:, None] / 10
    np.testing.assert_allclose(jax.vmap(y)(points), jnp.stack([y(x) for x in points]), rtol=1e-12)


def test_no_number_where_nothing_is_solved():
    y = bilevel.solution_map(problem_of(bilevel.Minimize(quadratic)), lower=bilevel.Newton(max_steps=0))
    assert np.isnan(y(X)).all()
    assert np.isnan(jax.jacrev(y)(X)).all()
