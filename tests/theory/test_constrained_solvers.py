"""Solvers for linearly constrained lower levels: against known optima and the smoothed kink's closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize
from scipy.stats import norm as normal

import bilevel
import problems
from bilevel import diagnostics, run
from bilevel.backend import draws
from bilevel.parts import tracking
from problems.constrained import ALPHA, MU


def near_the_kink(key):
    return jnp.full(20, 0.1), jnp.zeros(20)


def smoothed_slope(x, s):
    return normal.cdf(x / s) - normal.cdf((x - 1) / s) - ALPHA + MU * x


def test_ds_blo_on_the_kink_finds_the_minimiser_of_the_smoothed_objective():
    """Phi(x/s) - Phi((x - 1)/s) - alpha + mu x = 0, which is close to s Phi^-1(alpha) for small s.

    Steps eta spread the iterates by about (eta s alpha (1 - alpha)/0.7)^(1/2), as if s were larger: with eta <= s/10 by
    one per cent, with eta = s by a fifth.
    """
    problem = dataclasses.replace(problems.make("constrained", dim=20).problem, init=near_the_kink)
    key, num_steps = jax.random.key(0), 20_000

    @jax.jit
    def mean_x(sigma):
        solver = bilevel.DSBLO(beta=0.9, gamma_1=10 / sigma, gamma_2=10 / sigma, sigma=sigma, num_lower_steps=1)

        def body(k, carry):
            state, total = carry
            state, _ = solver.step(problem, state, jax.random.fold_in(key, k))
            return state, total + jnp.where(k >= num_steps // 2, state.x, 0)

        start = solver.init(problem, key)
        return jnp.mean(jax.lax.fori_loop(0, num_steps, body, (start, 0 * start.x))[1]) / (num_steps // 2)

    for s in (0.0125, 0.025, 0.05):
        exact = optimize.brentq(smoothed_slope, -1, 0.3, args=(s,))
        found = float(mean_x(s))
        assert abs(found - exact) <= 0.05 * abs(exact)
        assert abs(found - s * normal.ppf(ALPHA)) <= 0.05 * abs(s * normal.ppf(ALPHA))


@pytest.mark.nightly
@pytest.mark.slow
def test_line_search_stops_on_the_ridge_and_fresh_perturbations_do_not():
    """F = 5 |x1| + (x2 - 3)^2/2. Where the line search ends, the hull of nearby gradients is far from 0, it is
    |x2 - 3| away: not a stationary point. DSBLO comes to x2 = 3, PIGD with a small step as well.
    """
    problem = problems.make("constrained", kind="ridge").problem

    keys = jax.random.split(jax.random.key(0), 4)
    distances = jax.jit(jax.vmap(lambda x, key: diagnostics.goldstein(problem, x, 0.05, 10, key).distance))

    def end(solver, steps):
        def one(key):
            return bilevel.advance(problem, solver, solver.init(problem, key), key, 0, steps)[0].x

        x = jax.jit(jax.vmap(one))(keys)
        return x, distances(x, keys)

    x, distance = end(bilevel.DSIGD(sigma=1e-12, shrink=0.5, num_trials=40), 300)
    assert (np.abs(x[:, 0]) <= 1e-3).all()
    assert (np.abs(x[:, 1] - 3) > 0.5).sum() >= 3
    np.testing.assert_allclose(distance, np.abs(x[:, 1] - 3), atol=0.05)
    x, distance = end(bilevel.DSBLO(sigma=0.01, gamma_1=100.0, gamma_2=100.0), 3000)
    np.testing.assert_allclose(x, [[0, 3]] * 4, atol=0.05)
    assert (distance <= 0.1).all()


@pytest.mark.parametrize(
    "solver",
    [
        bilevel.PIGD(upper_step_size=0.1),
        bilevel.SSIGD(upper_step_size=0.1, sigma=1e-4),
        bilevel.DSBLO(sigma=1e-4, gamma_1=0.5, gamma_2=10.0),
        bilevel.DSIGD(sigma=1e-4),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_known_optimum_of_a_random_instance(solver, key):
    """F - F* <= 1e-3, recomputed by the referee; the assumptions are seen to hold on the way."""
    instance = problems.make("constrained", kind="random", dim=6, rows=5, seed=1)
    state = jax.jit(solver.init)(instance.problem, key)
    state, info = jax.jit(run.advance)(instance.problem, solver, state, key, 0, 2000)
    measured = jax.jit(diagnostics.measure)(instance.problem, state.x, state.y)
    assert measured.value - instance.truth.value <= 1e-3
    assert bool(info.feasible & info.independent & info.definite)
    assert info.margin >= 0


@jax.jit
def objective_on(problem, points):
    """F at every point; one compilation serves the instances of one structure."""
    return jax.lax.map(bilevel.implicit_objective(problem), points)


@pytest.mark.parametrize("kind", [f"quadratic{k}" for k in (14, 16, 17, 18)])
def test_the_quadratics_optima_are_global(kind):
    """Against a grid of exact lower solutions: no point below F*, and F* is reached."""
    instance = problems.make("constrained", kind=kind)
    problem = instance.problem.validate()
    axis = jnp.linspace(-26.0, 26.0, 53)
    grid = jnp.stack(jnp.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    values = objective_on(problem, grid)
    assert values.min() >= instance.truth.value - 1e-9
    np.testing.assert_allclose(values.min(), instance.truth.value, rtol=1e-12)


def test_random_instances_have_the_active_set_that_was_asked_for():
    for weak in (0, 2):
        instance = problems.make("constrained", kind="random", dim=8, rows=7, active=4, weak=weak, seed=3)
        problem, truth = instance.problem.validate(), instance.truth
        h = bilevel.hypergradient(problem, truth.x)
        np.testing.assert_allclose(h.y, truth.y, atol=1e-10)
        np.testing.assert_allclose(h.value, 0, atol=1e-13)  # terms of f, about 10, that cancel
        np.testing.assert_allclose(h.gradient, 0, atol=1e-9)
        assert int(h.status) == (bilevel.Status.WEAKLY_ACTIVE if weak else bilevel.Status.ESTIMATED)


def test_perturbations_have_their_law(key):
    keys, like = jax.random.split(key, 4000), jnp.zeros(3)
    draw = lambda law: np.asarray(jax.vmap(lambda key: draws.perturbation(key, like, law, 0.1))(keys))  # noqa: E731
    lengths = {law: np.linalg.norm(draw(law), axis=1) for law in draws.DISTRIBUTIONS}
    np.testing.assert_allclose(draw("gaussian").std(), 0.1, rtol=0.03)
    np.testing.assert_allclose(lengths["sphere"], 0.1, rtol=1e-12)
    np.testing.assert_allclose(np.mean((lengths["ball"] / 0.1) ** 3), 0.5, rtol=0.05)
    assert lengths["ball"].max() <= 0.1
    with pytest.raises(bilevel.InvalidInput, match="distribution: got 'box'"):
        bilevel.DSBLO(distribution="box")


def test_theory_constants_of_ds_blo():
    """By the paper's formulas, written out for L_F = 1, accuracy 0.1, radius 0.5, option I: d = 2, c = 4."""
    solver = bilevel.DSBLO.from_theory(1.0, 0.1, 0.5)
    gap = 0.01 / (960 * 6)
    K = np.log(1280.0) / -np.log(1 - gap)
    np.testing.assert_allclose([1 - solver.beta, solver.gamma_1, solver.gamma_2], [gap, 2 * K, 32 * K], rtol=1e-9)


def test_several_perturbations_average(key):
    """With num_perturbations the momentum starts as the mean of the single gradients."""
    problem = problems.make("constrained", dim=2).problem
    two = bilevel.DSBLO(sigma=1.0, num_perturbations=2)
    x, y = jnp.array([0.2, 0.9]), jnp.zeros(2)
    active = tracking.no_rows_active(problem, x, y)
    mean, _ = jax.jit(two._gradient)(problem, x, y, active, key, None)
    alone = jax.jit(lambda key: bilevel.DSBLO(sigma=1.0)._gradient(problem, x, y, active, key, None)[0])
    ones = [alone(k) for k in jax.random.split(key, 2)]
    np.testing.assert_allclose(mean, sum(ones) / 2, rtol=1e-14)
