"""Linear solvers against dense algebra: accuracy, monotone errors, honest ends."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import CG, GMRES, MINRES, Dense, Neumann
from bilevel.backend.precision import full_precision
from bilevel.linear import DENSE_LIMIT, default_solver

EPS = np.finfo(float).eps


def matrix(kind, n, condition, seed=0):
    """Singular values from 1 to 1/condition; "definite" (SPD), "indefinite" (symmetric) or "general"."""
    rng = np.random.default_rng([seed, n])
    Q, P = (np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in range(2))
    values = np.logspace(0, -np.log10(condition), n)
    if kind == "indefinite":
        values = values * np.where(np.arange(n) % 2, -1, 1)
    M = (Q * values) @ (P if kind == "general" else Q).T
    return M if kind == "general" else (M + M.T) / 2


@partial(jax.jit, static_argnames="solver")
def _solve(solver, M, b, v0):
    return solver.prepare(lambda v: M @ v, b.size, b.dtype)(b, v0)


def solve(solver, M, b, v0=None):
    b = jnp.asarray(b)
    return _solve(solver, jnp.asarray(M), b, jnp.zeros_like(b) if v0 is None else jnp.asarray(v0))


SOLVERS = {
    "CG": (CG(), "definite"),
    "MINRES, definite": (MINRES(), "definite"),
    "MINRES": (MINRES(), "indefinite"),
    "GMRES, definite": (GMRES(restart=60), "definite"),
    "GMRES, indefinite": (GMRES(restart=60), "indefinite"),
    "GMRES": (GMRES(restart=60), "general"),
    "Cholesky": (Dense(positive_definite=True), "definite"),
    "LU": (Dense(), "general"),
}
GROUPS = {"CG": CG(), "MINRES": MINRES(), "GMRES": GMRES(restart=60), "LU": Dense(), "Neumann": Neumann()}
DIRECT = ("LU", "Cholesky", "GMRES")


@pytest.mark.parametrize("n", [1, 17, 60])
@pytest.mark.parametrize("name", SOLVERS)
def test_against_dense_algebra(name, n):
    solver, kind = SOLVERS[name]
    for condition in (1.0, 1e2, 1e4, 1e6, 1e8):
        M = matrix(kind, n, condition)
        exact = np.random.default_rng(n).normal(size=n)
        b = M @ exact
        v, residual, iterations = solve(solver, M, b)
        # Rounding costs CG and MINRES more than 10 n iterations on hard systems: there only honesty is checked.
        recomputed = np.linalg.norm(b - M @ np.asarray(v))
        assert abs(residual - recomputed) <= 50 * EPS * np.linalg.norm(v) + 1e-12 * recomputed
        if name.startswith(DIRECT) or condition <= 1e4 or n <= 17:
            # MINRES's recurrence for v loses a factor of the condition number to rounding, also in the residual.
            attainable = 10 * EPS * condition if name.startswith("MINRES") else 0
            assert residual <= max(1e-12, attainable) * np.linalg.norm(b), (condition, iterations)
            assert np.linalg.norm(v - exact) <= 1e-13 * n * condition * np.linalg.norm(exact) + 1e-14, condition


@pytest.mark.parametrize("kind", ["definite", "indefinite", "general"])
@pytest.mark.parametrize("condition", [1e4, 1e6])
def test_gmres_of_200_unknowns_against_dense_algebra(kind, condition):
    """More unknowns than a Krylov space of 50; without restarts by default, so that a hard M is no harder to solve."""
    M = matrix(kind, 200, condition)
    exact = np.random.default_rng(7).normal(size=200)
    v, residual, iterations = solve(GMRES(), M, M @ exact)
    assert residual <= 1e-13 * np.linalg.norm(M @ exact)
    assert iterations <= 200
    assert np.linalg.norm(v - exact) <= 10 * EPS * condition * np.linalg.norm(exact)
    assert np.linalg.norm(v - np.linalg.solve(M, M @ exact)) <= 20 * EPS * condition * np.linalg.norm(exact)


def test_gmres_with_restarts_ends_only_at_the_tolerance():
    """Each cycle of 50 takes a third off the residual: that takes more than a thousand products, and it gets them."""
    M = matrix("definite", 200, 1e4)
    exact = np.random.default_rng(7).normal(size=200)
    b = M @ exact
    _, residual, iterations = solve(GMRES(tol=1e-11, restart=50), M, b)
    assert residual <= 1e-11 * np.linalg.norm(b)
    assert 50 < iterations <= 2000


def test_gmres_ends_inside_of_a_cycle():
    """A minimal polynomial of degree 3: three products and a fourth that rounding may ask for."""
    M = np.diag(np.repeat([1.0, -2.0, 5.0], 4)) @ np.eye(12)
    solution = solve(GMRES(), M, np.arange(1.0, 13.0))
    assert solution.iterations <= 4
    assert solution.residual <= 1e-13


def iterates(solver, M, b, counts):
    """Solutions with max_iterations = k for each k of `counts`.

    One program for all of them, in which k is an input; but GMRES makes its cycles of that length.
    """

    @partial(jax.jit, static_argnums=(0,) if isinstance(solver, GMRES) else ())
    def after(k):
        return dataclasses.replace(solver, max_iterations=k).iterate(lambda v: M @ v, b, jnp.zeros_like(b))[0]

    return [np.asarray(after(k)) for k in counts]


@pytest.mark.parametrize("condition", [1e1, 1e4, 1e8])
@pytest.mark.parametrize("tol", [None, 0.0])
def test_cg_energy_error_never_grows(condition, tol):
    """Up to 10 n iterations, far beyond convergence; tol = 0 lets it run as long as it wants.

    Rounding allowance: the error that b's own rounding makes, 10 eps |b| in the norm of M^-1.
    """
    n = 8
    M = matrix("definite", n, condition)
    exact = np.random.default_rng(1).normal(size=n)
    b = M @ exact
    counts = [*range(1, 2 * n), 3 * n, 10 * n]
    errors = [np.sqrt((v - exact) @ M @ (v - exact)) for v in iterates(CG(tol=tol), M, jnp.asarray(b), counts)]
    errors = [np.sqrt(exact @ M @ exact), *errors]
    allowance = 10 * EPS * np.linalg.norm(b) * np.sqrt(condition)
    assert np.all(np.diff(errors) <= allowance)
    assert errors[-1] <= 10 * allowance + 1e-7 * errors[0]


@pytest.mark.parametrize("solver", [MINRES(), GMRES(restart=4)])
@pytest.mark.parametrize("condition", [1e1, 1e6])
def test_minres_and_gmres_residuals_never_grow(solver, condition):
    n = 8
    M = matrix("indefinite" if isinstance(solver, MINRES) else "general", n, condition)
    b = M @ np.random.default_rng(2).normal(size=n)
    counts = [*range(1, 2 * n), 3 * n] if isinstance(solver, MINRES) else [4, 8, 12, 40]
    residuals = [np.linalg.norm(b - M @ v) for v in iterates(solver, M, jnp.asarray(b), counts)]
    residuals = [np.linalg.norm(b), *residuals]
    assert np.all(np.diff(residuals) <= 100 * EPS * np.linalg.norm(b) * (1 if isinstance(solver, GMRES) else condition))
    assert residuals[1] < residuals[0]


def test_cg_gmres_and_minres_take_few_iterations_for_few_eigenvalues():
    M = np.diag(np.repeat([1.0, 2.0, 5.0], 4))
    for solver in (CG(), MINRES()):
        assert solve(solver, M, np.ones(12)).iterations <= 4


@pytest.mark.parametrize("name", GROUPS)
def test_warm_start(name):
    M = matrix("definite", 12, 10.0)
    exact = np.random.default_rng(3).normal(size=12)
    solver = GROUPS[name]
    cold, warm = solve(solver, M, M @ exact), solve(solver, M, M @ exact, exact)
    assert np.linalg.norm(warm.v - exact) <= 1e-13
    if name != "LU":
        assert warm.iterations <= 1
        assert cold.iterations > 1
        near = solve(solver, M, M @ exact, exact + 1e-6)
        assert near.iterations <= cold.iterations
        np.testing.assert_allclose(near.v, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", GROUPS)
def test_zero_right_hand_side(name):
    M = matrix("definite", 12, 10.0)
    v, residual, iterations = solve(GROUPS[name], M, np.zeros(12))
    np.testing.assert_array_equal(v, 0)
    assert residual == 0
    if name != "LU":
        assert iterations == 0
        v = solve(GROUPS[name], M, np.zeros(12), np.ones(12)).v  # a warm start is no excuse
        assert np.linalg.norm(v) <= 1e-10


@pytest.mark.parametrize("name", ["CG", "MINRES", "GMRES"])
def test_singular_systems_end_with_an_honest_residual(name):
    M = np.diag([3.0, 2.0, 1.0, 0.0])
    inside, outside = np.array([3.0, 2.0, 1.0, 0.0]), np.array([3.0, 2.0, 1.0, 1.0])
    v, residual, iterations = solve(GROUPS[name], M, inside)
    assert residual <= 1e-13  # consistent: a solution exists
    np.testing.assert_allclose(v[:3], 1, rtol=1e-12)
    v, residual, iterations = solve(GROUPS[name], M, outside)
    assert iterations <= 40
    if np.isfinite(residual):  # inconsistent: no v does better than 1
        assert residual >= 1 - 1e-12
        np.testing.assert_allclose(residual, np.linalg.norm(outside - M @ v), rtol=1e-12)
    v, residual, iterations = solve(GROUPS[name], np.zeros((4, 4)), outside)
    assert iterations <= 8
    np.testing.assert_allclose(residual, np.linalg.norm(outside), rtol=1e-14)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("where", ["matrix", "right-hand side"])
def test_nan_ends_at_once_and_is_reported(name, where):
    M, b = matrix("definite", 12, 1e4), np.ones(12)
    if where == "matrix":
        M = M * np.nan
    else:
        b = b * np.nan
    _, residual, iterations = solve(GROUPS[name], M, b)
    assert np.isnan(residual)
    assert iterations <= (60 if name == "GMRES" else 12 if name == "LU" else 1)


def test_indefinite_matrix_ends_cg_honestly():
    M = np.diag([1.0, -1.0, 2.0])
    for b in (np.array([0.0, 1.0, 0.0]), np.array([1.0, 1.0, 0.0]), np.array([1.0, 2.0, 3.0])):
        v, residual, iterations = solve(CG(), M, b)
        assert np.isfinite(v).all()
        assert iterations <= 3
        np.testing.assert_allclose(residual, np.linalg.norm(b - M @ v), rtol=1e-12, atol=1e-15)


def test_neumann_partial_sums_and_divergence():
    M = matrix("definite", 6, 4.0)
    b = np.random.default_rng(4).normal(size=6)
    step = 0.5
    series = sum(step * np.linalg.matrix_power(np.eye(6) - step * M, j) @ b for j in range(7))
    np.testing.assert_allclose(solve(Neumann(step, max_iterations=7), M, b).v, series, rtol=1e-12)
    v, residual, iterations = solve(Neumann(step), M, b)
    np.testing.assert_allclose(v, np.linalg.solve(M, b), rtol=1e-12)
    assert iterations < 400
    v, residual, _ = solve(Neumann(3.0, max_iterations=50), M, b)  # |1 - 3| = 2: divergence
    assert residual > 1e10 * np.linalg.norm(b)
    np.testing.assert_allclose(residual, np.linalg.norm(b - M @ v), rtol=1e-6)
    assert not np.isfinite(solve(Neumann(30.0), M, b).residual)


@pytest.mark.parametrize("name", GROUPS)
def test_float32(name):
    M = matrix("definite", 20, 50.0)
    exact = np.random.default_rng(5).normal(size=20)
    v, residual, iterations = full_precision(solve)(GROUPS[name], M.astype("f4"), (M @ exact).astype("f4"))
    assert (v.dtype, residual.dtype) == (jnp.float32, jnp.float32)
    np.testing.assert_allclose(v, exact, rtol=0, atol=2e-3)
    assert iterations <= 1000


@pytest.mark.parametrize("name", GROUPS)
def test_vmap_equals_loop(name):
    solver = GROUPS[name]
    M = jnp.stack([jnp.asarray(matrix("definite", 9, c, seed)) for seed, c in enumerate((1.0, 10.0, 100.0))])
    b = jnp.asarray(np.random.default_rng(6).normal(size=(3, 9)))
    together = jax.jit(jax.vmap(lambda M, b: solver.prepare(lambda v: M @ v, 9, b.dtype)(b, 0 * b)))(M, b)
    for k in range(3):
        one = solve(solver, M[k], b[k])
        np.testing.assert_allclose(together.v[k], one.v, rtol=0, atol=1e-12 * 100)
        if name == "Neumann":
            assert together.iterations[k] == one.iterations


def test_max_products_counts_the_most():
    products = 0

    def matvec(M, v):
        nonlocal products
        products += 1
        return M @ v

    M = jnp.asarray(matrix("indefinite", 6, 1e6))
    limited = (CG, MINRES, partial(GMRES, restart=2), partial(Neumann, 0.1))
    for solver in (make(max_iterations=4) for make in limited):
        products = 0
        with jax.disable_jit():
            solver.iterate(partial(matvec, M), jnp.ones(6), jnp.zeros(6))
        assert 1 < products <= solver.max_products(6)


def test_default_solver():
    assert isinstance(default_solver(DENSE_LIMIT, True), Dense)
    assert isinstance(default_solver(DENSE_LIMIT + 1, True), CG)
    assert isinstance(default_solver(DENSE_LIMIT + 1, False), GMRES)


@pytest.mark.parametrize(("scale", "dtype"), [(1e15, jnp.float32), (1e-15, jnp.float32), (1e-110, jnp.float64)])
def test_cg_does_not_depend_on_the_scale_of_the_system(scale, dtype):
    M = scale * jnp.diag(jnp.array([1.0, 2.0, 3.0], dtype))
    solution = solve(CG(), M, jnp.full(3, scale, dtype))
    np.testing.assert_allclose(solution.v, [1, 1 / 2, 1 / 3], rtol=1e-5)
