"""SampledPenalty where Y(x) moves with x: every iterate is feasible, and both smoothings have the right gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bilevel
from bilevel import oracles
from bilevel.sampled import Blocks, Smoothness
from bilevel.sampled.feasible import restore_all
from bilevel.sampled.penalised import Form, Penalised
from bilevel.sampled.renewal import Samples

KEY = jax.random.key(0)
BOX = bilevel.Box(-1.0, 1.0)


def waves(x, y, w):
    """Sum of sin(p_k'x + q_k'y + r_k), w of shape [3, 5]."""
    return jnp.sum(jnp.sin(w[:, :2] @ x + w[:, 2:4] @ y + w[:, 4]))


def start(key):
    x, y = jax.random.uniform(key, (2, 2), float, -1, 1)
    return x, y


def moving(x, y):
    """A disc around x/2 and a wavy line: Y(x) has y = x/2 in its interior for all x."""
    return jnp.stack([jnp.sum((y - x / 2) ** 2) - 0.16, y[0] - 0.3 * jnp.sin(3 * y[1]) - 0.5 * x[0] - 0.35])


def half_planes(rng):
    """Two inequalities and an equality; for every x some y of |y| <= 0.35 fulfils it and is inside of the others."""
    A, B = rng.normal(size=(2, 2)), rng.normal(size=(2, 2))
    angle = rng.uniform(0, 2 * np.pi)
    A_eq, B_eq = np.array([[np.cos(angle), np.sin(angle)]]), rng.uniform(-0.15, 0.15, (1, 2))
    b = np.abs(B).sum(axis=1) + 0.35 * np.linalg.norm(A, axis=1) + 0.05
    parts = A, B, b, A_eq, B_eq, rng.uniform(-0.05, 0.05, 1)
    return bilevel.LinearCoupling(*map(jnp.asarray, parts))


def coupled(kind, seed):
    rng = np.random.default_rng(seed)
    f, g = (bilevel.Full(jnp.asarray(w)) for w in rng.uniform(-3, 3, (2, 3, 5)))
    coupling = bilevel.SmoothCoupling(moving) if kind == "smooth" else half_planes(rng)
    return bilevel.BilevelProblem(
        waves, bilevel.Minimize(waves), BOX, BOX, coupling, upper_data=f, lower_data=g, init=start
    )


@functools.cache
def violations(form):
    """(problem, key) -> the largest violation by the lanes' x and y after each of 30 steps, jitted."""
    solver = bilevel.SampledPenalty(form=form, num_samples=8, num_slots=1, num_starts=3, num_ladders=1)

    @jax.jit
    def run(problem, key):
        def outside(x, y):
            rows = oracles.coupling_residual(problem, x, y)
            return jnp.max(jnp.abs(rows)) + problem.x_set.violation(x) + problem.y_set.violation(y)

        def body(state, k):
            state, _ = solver.step(problem, state, jax.random.fold_in(key, k))
            return state, jnp.max(jax.vmap(outside)(state.x, state.y))

        return jax.lax.scan(body, solver.init(problem, key), jnp.arange(30))[1]

    return run


@pytest.mark.parametrize(
    ("form", "kind"),
    [("joint", "smooth"), pytest.param("lifted", "linear", marks=[pytest.mark.nightly, pytest.mark.slow])],
)
@given(st.integers(0, 2**20))
@settings(max_examples=15)
def test_every_iterate_is_feasible(form, kind, seed):
    assert violations(form)(coupled(kind, seed), jax.random.key(seed)).max() <= 1e-8


@functools.cache
def slope(form, smoothing):
    """(problem, x, samples, held, rho, t) -> (samples moved into Y(x) on the rows `held`, those that hold them, P there
    and its gradient in x), jitted.
    """

    @jax.jit
    def look(problem, x, samples, held, rho, t):
        view = Blocks.of(problem, samples[0, 0])
        P = Penalised(view, Form(form == "joint", smoothing == "entropic", frozen=False), rho, rho * t, chunk=1024)
        samples, failed, held, lift = restore_all(view, x, samples, held)
        f, g = view.values(x, samples)
        found = P.at(f, g)
        direction = P.gradient(x, Samples(samples, f, g, held), lift[:4], found)
        return samples, direction.motion.held, jnp.where(jnp.any(failed), jnp.nan, found.value), direction.x

    return look


@pytest.mark.parametrize(("form", "smoothing"), [("lifted", "entropic"), ("joint", "quadratic")])
@given(st.integers(0, 2**20), st.floats(0.1, 20), st.floats(0.05, 1))
@settings(max_examples=8)
def test_gradient_has_the_motion_of_the_samples(form, smoothing, seed, rho, t):
    """On inequalities, an equality and Y's box, which samples follow as x moves, against finite differences."""
    problem, look = coupled("linear", seed), slope(form, smoothing)
    rng, h = np.random.default_rng(seed), 1e-6
    x, samples = rng.uniform(-0.5, 0.5, 2), rng.uniform(-1, 1, (8, 1, 2))
    samples, held, _, gradient = look(problem, x, samples, jnp.zeros((8, 1, 5)), rho, t)
    assert held[:, 0, 2].all()
    for d in np.eye(2):
        up, down = (look(problem, x + s * h * d, samples, held, rho, t)[2] for s in (1, -1))
        np.testing.assert_allclose(gradient @ d, (up - down) / (2 * h), rtol=1e-5, atol=1e-5 * (1 + rho))


def test_frozen_samples_refuse_a_coupling():
    """Their bound is for a set that does not move; the constants of `from_theory` know of no coupling either."""
    solver = bilevel.SampledPenalty.from_theory(Smoothness(1.0, 1.0, 1.0, 1.0), 0.5)
    with pytest.raises(bilevel.Unsupported, match="refresh"):
        bilevel.solve(coupled("smooth", 0), solver, key=KEY)
