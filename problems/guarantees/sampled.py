"""SampledPenalty: brackets of the sampled value function, its lemma on a grid, descent with the theory's step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import BilevelProblem, Box, Full, Minimize, SampledPenalty
from bilevel.guarantees import Guarantee
from bilevel.sampled import smoothing
from bilevel.sampled.smoothing import Smoothness
from bilevel.theory import assumptions
from problems import strategies
from problems.guarantees.instances import EPS, normal
from problems.strategies import Waves, waves_lower, waves_upper

TERMS, EPSILON, NUM_SAMPLES = 2, 0.5, 16
GRID = np.linspace(-1, 1, 401)


class KnownWaves(NamedTuple):
    """Smoothness over [-1, 1]^2; L_y of g; the samples' covering radius; temperature; rho; the size of the numbers."""

    smoothness: Smoothness
    L_y: Array
    radius: Array
    temperature: Array
    rho: Array
    size: Array


class Wavy(NamedTuple):
    """Waves of f and g on [-1, 1]^2, samples of Y [NUM_SAMPLES, 1], a start x [1]."""

    f: Waves
    g: Waves
    samples: Array
    x: Array
    constants: KnownWaves

    @property
    def problem(self) -> BilevelProblem:
        """The bilevel problem."""
        return BilevelProblem(
            waves_upper, Minimize(waves_lower), x_set=Box(-1.0, 1.0), y_set=Box(-1.0, 1.0),
            upper_data=Full(self.f), lower_data=Full(self.g), init=strategies._interval_start,
        )  # fmt: skip


def tables(f: Waves, g: Waves, xs: Array, ys: Array) -> tuple[Array, Array]:
    """(f, g) at all pairs, by hand, shapes [len(xs), len(ys)]."""

    def wave(w: Waves) -> Array:
        phases = ys[None, :, None] + xs[:, None, None] * w.shifts[None, None, :]
        powers = 2 * (1.0 + jnp.arange(TERMS, dtype=float))
        return jnp.sum(w.weights[None, None, :] * jnp.sin(powers[None, None, :] * phases), axis=-1)

    return (ys[None, :] - xs[:, None]) ** 2 / 2 + wave(f), wave(g)


def lifted(f: Array, g: Array, rho: Any, t: Any) -> Array:
    """P = M_{rho t}[f + rho g] - rho M_t[g] over the last axis, M_t[g] = -t log sum exp(-g/t)."""
    soft = lambda values, t: -t * jax.nn.logsumexp(-values / t, axis=-1)  # noqa: E731
    return soft(f + rho * g, rho * t) - rho * soft(g, t)


def wavy(key: Array, height: Array, slant: Array, temperature: Array, rho: Array) -> Wavy:
    """|weights| about height, |shifts| about slant; samples are random points of Y."""
    keys = jax.random.split(key, 6)
    f, g = (Waves(height * normal(k, TERMS), slant * normal(l, TERMS)) for k, l in (keys[:2], keys[2:4]))
    ys = jax.random.uniform(keys[4], (NUM_SAMPLES, 1), float, -1, 1)
    x = jax.random.uniform(keys[5], (1,), float, -1, 1)
    powers = 2 * (1.0 + jnp.arange(TERMS, dtype=float))

    def curvature(w: Waves) -> Array:
        return jnp.sum(jnp.abs(w.weights) * powers**2 * (1 + w.shifts**2))

    def slopes(w: Waves) -> Array:
        return 2 * jnp.sum(jnp.abs(w.weights * w.shifts) * powers)

    smoothness = Smoothness(2 + curvature(f), curvature(g), 2 + slopes(f), slopes(g))
    ordered = jnp.sort(ys[:, 0])
    radius = jnp.max(jnp.stack([jnp.max(jnp.diff(ordered)) / 2, ordered[0] + 1, 1 - ordered[-1]]))
    size = 1 + jnp.sum(jnp.abs(f.weights)) + jnp.sum(jnp.abs(g.weights)) * (1 + rho)
    L_y = jnp.sum(jnp.abs(g.weights) * powers)
    return Wavy(f, g, ys, x, KnownWaves(smoothness, L_y, radius, temperature, rho, size))


def smooth_enough(instance: Wavy) -> Array:
    """Assumption: |hessian of g| <= L_g at the start."""
    point = jnp.stack([instance.x[0], instance.samples[0, 0]])
    hessian = jax.hessian(lambda z: waves_lower(z[:1], z[1:], instance.g))(point)
    return assumptions.smooth(hessian, jnp.maximum(instance.constants.smoothness.L_g, 1e-300))


waves = strategies.recipes(
    wavy, height=strategies.sizes(), slant=strategies.sizes(), temperature=strategies.fractions(0.01, 1.0),
    rho=strategies.fractions(1.0, 30.0),
)  # fmt: skip


def value(smooth_min: Callable = smoothing.smooth_min) -> Guarantee:
    """Brackets at x, and the lemma with X and Y replaced by grids, where all minima are exact."""

    def measure(instance: Wavy, horizon: tuple[int, ...]) -> Array:
        known = instance.constants
        t, rho = known.temperature, known.rho
        f, g = tables(instance.f, instance.g, jnp.array(GRID[::10]), jnp.array(GRID))
        sampled = tables(instance.f, instance.g, jnp.array(GRID[::10]), instance.samples[:, 0])[1]
        smoothed = jax.vmap(lambda values: smooth_min(values, t, True).value)(sampled)
        quadratic = jax.vmap(lambda values: smooth_min(values, t, False).value)(sampled)
        v, v_N = jnp.min(g, axis=1), jnp.min(sampled, axis=1)

        P = f + rho * (g - smoothed[:, None])
        i, j = jnp.unravel_index(jnp.argmin(P), P.shape)
        best = jnp.min(jnp.where(g <= v[:, None], f, jnp.inf))
        slack = known.temperature * np.log(NUM_SAMPLES) + known.L_y * known.radius  # a + b
        lemma = jnp.stack([f[i, j] - best, rho * (g[i, j] - v[i]) - (best - jnp.min(f))]) / (rho * slack)
        brackets = [v_N - v, v_N - smoothed, smoothed - v_N, quadratic - v_N, v_N - quadratic]
        return jnp.concatenate([jnp.stack([jnp.max(part) for part in brackets]), lemma])[None, :]

    def bound(known: KnownWaves, k: int) -> Array:
        t, zero, one = known.temperature, jnp.zeros(()), jnp.ones(())
        return jnp.stack([known.L_y * known.radius, t * np.log(NUM_SAMPLES), zero, t / 2, zero, one, one])

    return Guarantee(
        "sampled-value", "ours, bilevel.sampled.smoothing", (smooth_enough,), waves, measure, bound, (1,),
        lambda known: 1e2 * EPS * known.size / jnp.minimum(known.temperature, 1),
        "0 <= v_N - v <= L_y d; v_N - t log N <= v_t <= v_N <= v_quadratic <= v_N + t/2; minimisers of the penalty",
    )  # fmt: skip


def descent(make: Callable[..., Any] = SampledPenalty.from_theory) -> Guarantee:
    """The lifted form on frozen samples, with from_theory's rho, t and s = 1/L."""

    def measure(instance: Wavy, horizon: tuple[int, ...]) -> Array:
        known, key = instance.constants, jax.random.key(0)
        problem = instance.problem
        solver = make(known.smoothness, EPSILON, num_samples=NUM_SAMPLES)
        state = solver.init(problem, key)
        state = state._replace(x=instance.x[None], samples=instance.samples[None, :, None])
        L, ys = _smoothness(known), instance.samples[:, 0]

        def P(x: Array) -> Array:
            return lifted(*tables(instance.f, instance.g, x, ys), 1 / EPSILON, EPSILON**2 / np.log(NUM_SAMPLES))[0]

        def body(state: Any, _: Any) -> Any:
            after = solver.step(problem, state, key)[0]
            moved = jnp.linalg.norm(after.x - state.x)
            fall = P(state.x[0]) - P(after.x[0])
            return after, (L * moved, L * moved**2 / 2 - fall)

        lengths, excess = jax.lax.scan(body, state, None, length=horizon[-1])[1]
        start = P(instance.x)
        coarse = lifted(
            *tables(instance.f, instance.g, jnp.array(GRID), ys), 1 / EPSILON, EPSILON**2 / np.log(NUM_SAMPLES)
        )
        least = jnp.min(coarse) - L * (GRID[1] - GRID[0]) ** 2 / 8  # a minimum between grid points is no lower
        rows = [
            jnp.stack([jnp.min(lengths[:K]) ** 2 / (2 * L * (start - least) / K), jnp.max(excess[:K]) / known.size])
            for K in horizon
        ]
        return jnp.stack(rows)

    def bound(known: KnownWaves, k: int) -> Array:
        return jnp.array([1.0, 0.0])

    return Guarantee(
        "sampled-penalty", "ours, bilevel.solvers", (smooth_enough,), waves, measure, bound, (1, 4, 16, 64),
        lambda known: 1e3 * EPS, "min_k |G_k|^2 <= 2 L (P_0 - inf P)/K, and P falls by L |x+ - x|^2/2 at each step",
    )  # fmt: skip


def _smoothness(known: KnownWaves) -> Array:
    rho, t, c = 1 / EPSILON, EPSILON**2 / np.log(NUM_SAMPLES), known.smoothness
    return c.L_f + 2 * rho * c.L_g + rho * c.D_g**2 / (4 * t) + (c.D_f + rho * c.D_g) ** 2 / (4 * rho * t)


SAMPLED_VALUE = value()
SAMPLED_PENALTY = descent()
