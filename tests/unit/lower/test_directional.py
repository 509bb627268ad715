"""One-sided derivatives against difference quotients: strict, weakly active, dependent and infeasible rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import Status


def upper(x, y, batch):
    return jnp.sum(batch["c"] * y) + 0.5 * jnp.sum(y**2) + jnp.sum(x) + 0.3 * jnp.sum(x * x)


def lower(x, y, batch):
    return 0.5 * y @ batch["H"] @ y - y @ (batch["G"] @ x + batch["b"])


def drawn(seed, m, twice):
    """A quadratic program whose y(0) = 0 lies on m rows, the first two with multipliers; one of these comes twice."""
    draws = np.random.default_rng(seed)
    n, k = 4, 3
    A, B = draws.normal(size=(m, n)), draws.normal(size=(m, k))
    if twice:  # the same normal and bound at x = 0, another motion with x
        A = np.concatenate([A, A[:1]])
        B = np.concatenate([B, draws.normal(size=(1, k))])
    lam = np.where(np.arange(len(A)) < 2, draws.uniform(0.5, 1.5, len(A)), 0.0)
    L = draws.normal(size=(n, n))
    H, G = L @ L.T + np.eye(n), draws.normal(size=(n, k))
    data = {"H": H, "G": G, "b": A.T @ lam, "c": draws.normal(size=n)}
    data = jax.tree.map(jnp.asarray, data)
    return bilevel.BilevelProblem(
        upper, bilevel.Minimize(lower), coupling=bilevel.LinearCoupling(*map(jnp.asarray, (A, B, np.zeros(len(A))))),
        upper_data=bilevel.Full(data), lower_data=bilevel.Full(data), init=start,
    )  # fmt: skip


def start(key):
    return jnp.zeros(3), jnp.zeros(4)


def quotient(problem, x, d):
    """[F(x + t d) - F(x)]/t, extrapolated."""
    F = bilevel.implicit_objective(problem)
    one, two = ((float(F(x + t * d)) - float(F(x))) / t for t in (1e-5, 2e-5))
    return 2 * one - two


@pytest.mark.parametrize("twice", [False, True], ids=["independent", "dependent"])
def test_against_one_sided_differences(twice):
    """At x = 0 all rows are active; two have multipliers, and where one of these comes twice, d chooses whose they are:
    min_k over the two of -B_k d bounds the step, and only that row may have the multiplier.
    """
    sides = 0
    for seed in range(4):
        problem, draws = drawn(seed, 3, twice), np.random.default_rng(100 + seed)
        for d in jnp.asarray(draws.normal(size=(6, 3))):
            found = bilevel.directional_derivative(problem, jnp.zeros(3), d)
            assert int(found.status) == Status.UNCHECKED
            np.testing.assert_allclose(found.value, quotient(problem, jnp.zeros(3), d), rtol=2e-5, atol=2e-5)
            back = bilevel.directional_derivative(problem, jnp.zeros(3), -d)
            sides += abs(float(found.value + back.value)) > 1e-3
    assert sides > 6  # F has kinks there


def test_where_F_is_smooth_it_is_the_gradient_times_d(key):
    problem = drawn(0, 3, False)
    x, d = jnp.array([0.3, -0.2, 0.4]), jnp.array([1.0, 2.0, -1.0])
    h = bilevel.hypergradient(problem, x)
    np.testing.assert_allclose(bilevel.directional_derivative(problem, x, d).value, h.gradient @ d, rtol=1e-10)
    free = bilevel.BilevelProblem(upper, problem.lower, upper_data=problem.upper_data, lower_data=problem.lower_data,
                                  init=start)  # fmt: skip
    found, h = bilevel.directional_derivative(free, x, d), bilevel.hypergradient(free, x)
    np.testing.assert_allclose(found.value, h.gradient @ d, rtol=1e-10)
    assert int(found.status) == Status.ESTIMATED


def opposed(x, y, batch):
    return 0.5 * jnp.sum(y**2)


def test_a_direction_into_infeasibility_is_named():
    """x <= y <= -x: only y = 0 at x = 0, nothing for x > 0; F(x) = x for x < 0."""
    rows = bilevel.LinearCoupling(jnp.array([[1.0], [-1.0]]), jnp.ones((2, 1)), jnp.zeros(2))
    problem = bilevel.BilevelProblem(
        lambda x, y, batch: jnp.sum(x + y), bilevel.Minimize(opposed), coupling=rows,
        init=lambda key: (jnp.zeros(1), jnp.zeros(1)),
    )  # fmt: skip
    out, back = (bilevel.directional_derivative(problem, jnp.zeros(1), jnp.full(1, s)) for s in (1.0, -1.0))
    assert int(out.status) == Status.INFEASIBLE_LOWER
    assert np.isnan(out.value)
    assert int(back.status) == Status.UNCHECKED
    np.testing.assert_allclose(back.value, -1, atol=1e-12)


def test_a_direction_of_another_shape_is_named():
    with pytest.raises(bilevel.InvalidInput, match="direction: got"):
        bilevel.directional_derivative(drawn(0, 3, False), jnp.zeros(3), jnp.zeros(2))
