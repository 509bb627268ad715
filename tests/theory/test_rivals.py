"""Rival solvers with default steps on problems of their own papers, judged by the true lower gap."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
import problems
from bilevel.gap import measure_global
from problems.nonconvex_scaled import soft_threshold, weighted_l1

measure = jax.jit(measure_global)


def end(instance, solver, steps, seed=0):
    """(x, y) after `steps`."""

    @jax.jit
    def run(problem, key):
        state, _ = bilevel.advance(problem, solver, solver.init(problem, key), key, 0, steps)
        return solver.output(problem, state)

    return run(instance.problem, jax.random.key(seed))


def assert_solved(instance, x, y, tol=0.02, gap=1e-3, violation=1e-6):
    """The criterion of the suite: |F - F*| <= tol (1 + |F*|), a small true gap, feasible."""
    measured = measure(instance.problem, x, y)
    assert abs(measured.value - instance.truth.value) <= tol * (1 + abs(instance.truth.value))
    assert measured.lower_residual <= gap
    assert measured.violation <= violation


def test_meha_with_a_non_smooth_lower_level():
    """From x = 0.2 < 1/n: F is flat beyond 1/n."""
    instance = problems.make("nonconvex_scaled", case="meha_lasso", n=4)
    start = jnp.full(4, 0.2), jnp.zeros(4)
    instance = dataclasses.replace(instance, problem=dataclasses.replace(instance.problem, init=lambda key: start))
    solver = bilevel.MEHA(nonsmooth=weighted_l1, prox=soft_threshold, gamma=10.0)
    x, y = end(instance, solver, 5000)
    assert_solved(instance, x, y)
    assert np.all(np.asarray(x[:2]) >= 0.25 - 1e-6)
    assert np.all(np.asarray(x[2:]) <= 1e-6)


def test_meha_with_a_line_of_minimisers():
    instance = problems.make("nonconvex_scaled", case="bome_degenerate")
    for seed in range(3):
        assert_solved(instance, *end(instance, bilevel.MEHA(), 5000, seed))
