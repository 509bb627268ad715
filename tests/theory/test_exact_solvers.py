"""LBFGS and TrustRegion against answers by other means: bounds, a simplex, a curved valley; Implicit against a loop by
hand.
"""

import cvxpy as cp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize

import bilevel

N = 8


def misfit(x, y, batch):
    return jnp.sum((batch["A"] @ y - batch["b"]) ** 2) / 2


def follower(x, y, batch):
    """Its minimiser is y(x) = C x + e."""
    return jnp.sum((y - batch["C"] @ x - batch["e"]) ** 2) / 2


def start(key):
    return jnp.full(N, 1 / N), jnp.zeros(N)


def least_squares(seed, x_set):
    """(the problem, M and r with F(x) = |M x - r|^2/2), M of condition 1e3."""
    rng = np.random.default_rng(seed)
    A, C = rng.normal(size=(2, N, N))
    left, _, right = np.linalg.svd(A @ C)
    M = left @ np.diag(np.geomspace(1, 1e-3, N)) @ right
    A, b, e = M @ np.linalg.inv(C), rng.normal(size=N), rng.normal(size=N)
    upper, lower = bilevel.Full({"A": A, "b": b}), bilevel.Full({"C": C, "e": e})
    problem = bilevel.BilevelProblem(
        misfit, bilevel.Minimize(follower), x_set, upper_data=upper, lower_data=lower, init=start
    )
    return problem, M, b - A @ e


@pytest.mark.parametrize("kind", [bilevel.LBFGS, bilevel.TrustRegion])
def test_bounds_as_in_scipy(key, kind):
    """Half of the bounds hold x at the optimum; F0 is 100 times F* and more."""
    for seed in range(3):
        problem, M, r = least_squares(seed, bilevel.Box(-1.0, 0.5))
        x = optimize.lsq_linear(M, r, (-1.0, 0.5), tol=1e-14).x
        solution = bilevel.solve(problem, kind(), key=key, max_steps=200, every=50, tol=1e-9)
        assert solution.status == bilevel.Status.CONVERGED
        F = np.sum((M @ np.asarray(solution.x) - r) ** 2) / 2
        assert np.sum((M @ x - r) ** 2) / 2 + 1e-12 >= F
        np.testing.assert_allclose(solution.record["value"][-1], F, rtol=1e-10)
        assert (np.abs(np.asarray(solution.x) - x) <= 1e-5).all()
        assert np.isnan(solution.stats["oracles"])


def test_a_simplex_as_in_cvxpy(key):
    """Never by a quasi-Newton step that is projected: the spectral one."""
    problem, M, r = least_squares(5, bilevel.Simplex(1.0))
    x = cp.Variable(N)
    program = cp.Problem(cp.Minimize(cp.sum_squares(M @ x - r) / 2), [x >= 0, cp.sum(x) == 1])
    program.solve(solver=cp.CLARABEL, tol_gap_abs=1e-13, tol_gap_rel=1e-13, tol_feas=1e-13)
    solution = bilevel.solve(problem, bilevel.LBFGS(), key=key, max_steps=400, every=100, tol=1e-9)
    assert solution.status == bilevel.Status.CONVERGED
    np.testing.assert_allclose(solution.x, x.value, atol=1e-6)


def valley(x, y, batch):
    return jnp.sum(100 * (y[1:] - y[:-1] ** 2) ** 2 + (1 - y[:-1]) ** 2)


def same(x, y, batch):
    return jnp.sum((y - x) ** 2)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_a_curved_valley_and_the_price_of_its_steps(key, dtype):
    """Rosenbrock's function of y(x) = x, from (-1.2, 1): SciPy's BFGS takes 32 iterations and 39 evaluations."""

    def begin(key):
        return jnp.asarray([-1.2, 1.0], dtype), jnp.zeros(2, dtype)

    problem = bilevel.BilevelProblem(valley, bilevel.Minimize(same), init=begin)
    solver = bilevel.LBFGS()
    step = jax.jit(solver.step)
    state, evaluations = solver.init(problem, key), 0
    for _ in range(60):
        state, info = step(problem, state, key)
        evaluations += int(info.evaluations)
        if info.direction < 1e-3:
            break
    assert evaluations <= 80
    np.testing.assert_allclose(state.x, 1.0, atol=5e-3)
    assert state.x.dtype == dtype


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_newton_steps_through_the_valley(key, dtype):
    """The Hessian of F there is not definite at the start; SciPy's trust-krylov takes some 20 iterations."""

    def begin(key):
        return jnp.asarray([-1.2, 1.0, -1.2, 1.0], dtype), jnp.zeros(4, dtype)

    problem = bilevel.BilevelProblem(valley, bilevel.Minimize(same), init=begin)
    solution = bilevel.solve(problem, bilevel.TrustRegion(), key=key, max_steps=50, every=10)
    assert solution.record["value"][-1] < 1e-8
    if dtype == jnp.float64:  # in float32 the gradient is known to 1e-2 there, and no tolerance is met for certain
        assert solution.status == bilevel.Status.CONVERGED
    np.testing.assert_allclose(solution.x, 1.0, atol=1e-2 if dtype == jnp.float32 else 1e-7)
    assert solution.x.dtype == dtype


def test_trust_region_refuses_other_sets_and_bad_counts():
    problem = least_squares(5, bilevel.Simplex(1.0))[0]
    assert "x_set = Simplex" in str(bilevel.TrustRegion().unsupported(problem))
    with pytest.raises(bilevel.InvalidInput, match=r"TrustRegion\.max_products"):
        bilevel.TrustRegion(max_products=0)


def test_bad_counts_are_named():
    for name, bad in (("memory", 0), ("max_evaluations", 1), ("memory", 2.5), ("memory", True)):
        with pytest.raises(bilevel.InvalidInput, match=f"LBFGS.{name}"):
            bilevel.LBFGS(**{name: bad})


def test_a_rule_as_in_a_loop_by_hand(key):
    problem, *_ = least_squares(1, bilevel.Box(-1.0, 0.5))
    rule = optax.adam(optax.cosine_decay_schedule(0.1, 20))
    F = jax.jit(jax.value_and_grad(bilevel.implicit_objective(problem)))
    x = start(key)[0]
    memory = rule.init(x)
    for _ in range(20):
        value, gradient = F(x)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integer counts and floats
            updates, memory = rule.update(gradient, memory, x)
        x = jnp.clip(x + updates, -1.0, 0.5)
    solution = bilevel.solve(problem, bilevel.Implicit(upper_step_size=rule), key=key, max_steps=20, every=10, tol=0.0)
    np.testing.assert_allclose(solution.x, x, rtol=1e-9)
    np.testing.assert_allclose(solution.info.objective, value, rtol=1e-9)
    assert solution.info.lower_solved


def leaning(x, y, batch):
    """Without a minimiser where x > 1."""
    return jnp.sum((1 - x) * y**2) / 2 - jnp.sum(y)


def outward(x, y, batch):
    return jnp.sum(y) - 5 * jnp.sum(x)


def test_x_stays_where_the_lower_level_has_no_solution(key):
    """F = 1/(1 - x) - 5 x has its minimum at 1 - 1/sqrt(5); a step of 1 leads from 0 to x = 4."""
    problem = bilevel.BilevelProblem(outward, bilevel.Minimize(leaning), init=lambda key: (jnp.zeros(1), jnp.zeros(1)))
    solution = bilevel.solve(problem, bilevel.Implicit(upper_step_size=1.0), key=key, max_steps=6, every=3)
    np.testing.assert_allclose(solution.x, 4.0, rtol=1e-12)
    assert solution.status in (bilevel.Status.DIVERGED, bilevel.Status.SADDLE)
    assert sum(solution.stats["failed"].values()) == 5
    solution = bilevel.solve(problem, bilevel.LBFGS(), key=key, max_steps=30, tol=1e-8)
    assert solution.status == bilevel.Status.CONVERGED
    np.testing.assert_allclose(solution.x, 1 - 1 / np.sqrt(5), rtol=1e-9)
