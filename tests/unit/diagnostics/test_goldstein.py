"""Minimum-norm points against a quadratic program, and Goldstein distances at the kink, whose values are known."""

import clarabel
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse

import bilevel
import problems
from bilevel import diagnostics
from bilevel.diagnostics.goldstein import curve, minimum_norm, plot_curve, smoothed_goldstein


def by_clarabel(G):
    """The least |G'w| over the simplex, as a quadratic program in (w, G'w)."""
    (m, n), size = G.shape, np.linalg.norm(G, axis=1).max()
    G = G / size
    P = sparse.block_diag([sparse.csc_matrix((m, m)), sparse.eye(n)], format="csc")
    equal = np.block([[np.ones((1, m)), np.zeros((1, n))], [G.T, -np.eye(n)]])
    A = sparse.csc_matrix(np.vstack([equal, np.hstack([-np.eye(m), np.zeros((m, n))])]))
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    for name in ("tol_gap_abs", "tol_gap_rel", "tol_feas"):
        setattr(settings, name, 1e-12)
    cones = [clarabel.ZeroConeT(n + 1), clarabel.NonnegativeConeT(m)]
    b = np.concatenate([[1.0], np.zeros(n + m)])
    solution = clarabel.DefaultSolver(P, np.zeros(m + n), A, b, cones, settings).solve()
    return size * np.linalg.norm(np.array(solution.x)[m:])


def test_minimum_norm_against_a_quadratic_program():
    rng = np.random.default_rng(0)
    solve, inside = jax.jit(minimum_norm), 0
    for k in range(60):
        G = (rng.normal(size=(8, 4)) + 0.1 * (k % 10)) * 10.0 ** rng.integers(-3, 4)
        found, exact = solve(jnp.asarray(G)), by_clarabel(G)
        size = np.linalg.norm(G, axis=1).max()
        np.testing.assert_allclose(found.distance, exact, atol=1e-5 * size)
        inside += int(found.distance == 0)
        if found.distance > 0:
            np.testing.assert_allclose(found.weights.sum(), 1, rtol=1e-12)
            assert (found.weights >= 0).all()
            p = found.weights @ G  # optimal exactly where G p >= |p|^2
            assert (G @ p >= p @ p - 1e-9 * size**2).all()
    assert 5 <= inside <= 55
    assert np.isnan(solve(jnp.full((8, 4), jnp.nan)).distance)


def test_the_kinks_distances(key):
    """F(x) = max(x, 0) - 0.3 x + 0.1 x^2: slopes of both signs within reach of 0, else the least slope in the ball."""
    problem = problems.make("constrained", dim=1).problem
    measure = jax.jit(diagnostics.goldstein, static_argnames="samples")
    assert measure(problem, jnp.zeros(1), 0.01, samples=20, key=key).distance == 0
    right = measure(problem, jnp.array([0.2]), 0.1, samples=20, key=key).distance
    assert 0.7 + 0.2 * 0.1 <= right <= 0.7 + 0.2 * 0.13
    left = measure(problem, jnp.array([-0.2]), 0.1, samples=20, key=key).distance
    assert 0.3 + 0.2 * 0.1 <= left <= 0.3 + 0.2 * 0.13


def test_the_curve_falls_with_samples_and_sees_the_kink_at_its_distance(key, tmp_path):
    problem = problems.make("constrained", dim=3).problem
    radii = jnp.array([0.05, 0.5])
    x = jnp.full(3, 0.1)  # the kinks are at a distance of 0.1
    distances = jax.jit(curve, static_argnames="samples")(problem, x, radii, samples=(1, 4, 16, 64), key=key)
    assert (np.diff(distances, axis=1) <= 1e-12).all()
    assert (distances[0] > 1).all()
    assert distances[1, -1] <= 1e-10
    path = plot_curve(radii, (1, 4, 16, 64), distances, tmp_path / "plots" / "curve.png", title="kink")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_smoothed_estimate_is_small_at_the_smoothed_minimiser(key):
    """For s = 0.05 the smoothed F has its minimum at -0.0255 (tests/theory), where F itself has slope -0.305."""
    problem, x = problems.make("constrained", dim=1).problem, jnp.array([-0.0255])
    estimate = jax.jit(smoothed_goldstein, static_argnames=("samples", "num_perturbations"))
    smoothed = estimate(problem, x, 1e-3, samples=4, key=key, sigma=0.05, num_perturbations=2000)
    assert smoothed <= 0.05
    plain = jax.jit(diagnostics.goldstein, static_argnames="samples")(problem, x, 1e-3, samples=4, key=key).distance
    np.testing.assert_allclose(plain, 0.305, atol=1e-3)


def test_bad_input_is_named(key):
    problem = problems.make("constrained", dim=1).problem
    with pytest.raises(bilevel.InvalidInput, match="samples"):
        diagnostics.goldstein(problem, jnp.zeros(1), 0.1, 0, key)
    with pytest.raises(bilevel.InvalidInput, match="radius"):
        diagnostics.goldstein(problem, jnp.zeros(1), -1.0, 3, key)
