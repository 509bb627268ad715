"""SampledPenalty: its stationary points are KKT points of a relaxed bilevel problem, at their own gap (our derivation).

Joint form. A stationary point z = (x, y) of P = f + rho (g - v_t) over X x Y has -grad P(z) in the normal cone N(z).
That is the stationarity condition, with the multiplier rho >= 0, of

    min f over X x Y  subject to  g - v_t <= gap,      gap = (g - v_t)(z),

where z is feasible, and complementary as g - v_t = gap.
A step z+ = Proj(z - s grad P(z)) has nu = (z - z+)/s - grad P(z) in N(z+), so that with s = 1/L and G = L (z - z+)

    dist(-grad f - rho grad(g - v_t), N) at z+  <=  |grad P(z+) - grad P(z)| + |z - z+|/s  <=  2 |G|,

and min_{k <= K} of its square is at most 8 L (P_0 - inf P)/K: approximate KKT points at a rate.

Lifted form. With weights w on the samples, the same holds in (x, w), w in the simplex, for

    min sum_i w_i f_i  subject to  sum_i w_i g_i + t sum_i w_i log w_i - v_t(x) <= gap,

where w = softmax(-(f + rho g)/(rho t)) solves the conditions in w exactly, and gap >= 0 as v_t is the least over w.
All derivatives are written out here.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import SampledPenalty
from bilevel.guarantees import Guarantee
from problems.guarantees.instances import EPS
from problems.guarantees.sampled import (
    EPSILON,
    GRID,
    NUM_SAMPLES,
    TERMS,
    KnownWaves,
    Wavy,
    lifted,
    smooth_enough,
    tables,
    waves,
)
from problems.strategies import Waves

RHO, T = 1 / EPSILON, EPSILON**2 / np.log(NUM_SAMPLES)
COARSE = GRID[::4]


def slopes(w: Waves, x: Array, y: Array) -> tuple[Array, Array]:
    """(d/dx, d/dy) of the wave at (x, y), by hand, shaped like y [n]."""
    powers = 2 * (1.0 + jnp.arange(TERMS, dtype=float))
    waves = (w.weights * powers)[None] * jnp.cos(powers[None] * (y[:, None] + (x * w.shifts)[None]))
    return waves @ w.shifts, jnp.sum(waves, axis=-1)


def outside_cone(slope: Array, z: Array) -> Array:
    """The distance of -slope to the normal cone of [-1, 1] at z."""
    return jnp.where(z <= -1, jnp.maximum(-slope, 0), jnp.where(z >= 1, jnp.maximum(slope, 0), jnp.abs(slope)))


def _smoothness(known: KnownWaves, joint: bool) -> Array:
    c = known.smoothness
    both = c.L_f + 2 * RHO * c.L_g + RHO * c.D_g**2 / (4 * T)
    return both if joint else both + (c.D_f + RHO * c.D_g) ** 2 / (4 * RHO * T)


def _soft(values: Array) -> Array:
    return -T * jax.nn.logsumexp(-values / T, axis=-1)


def look(instance: Wavy, x: Array, y: Array, joint: bool) -> tuple[Array, Array, Array]:
    """(P, the KKT conditions' residual, the gap) at one point."""
    f, g, ys = instance.f, instance.g, instance.samples[:, 0]
    f_i, g_i = (table[0] for table in tables(f, g, x[None], ys))
    below = jax.nn.softmax(-g_i / T)
    value_slope = below @ slopes(g, x, ys)[0]
    v = _soft(g_i)
    if joint:
        at_f, at_g = (table[0, 0] for table in tables(f, g, x[None], y[None]))
        (fx, fy), (gx, gy) = (tuple(part[0] for part in slopes(w, x, y[None])) for w in (f, g))
        fx, fy = fx + x - y, fy + y - x
        by_x, by_y = fx + RHO * (gx - value_slope), fy + RHO * gy
        residual = jnp.hypot(outside_cone(by_x, x), outside_cone(by_y, y))
        return at_f + RHO * (at_g - v), residual, at_g - v
    logits = -(f_i + RHO * g_i) / (RHO * T)
    log_w = jax.nn.log_softmax(logits)
    w = jnp.exp(log_w)
    by_x = w @ (slopes(f, x, ys)[0] + x - ys + RHO * slopes(g, x, ys)[0]) - RHO * value_slope
    by_w = f_i + RHO * (g_i + T * (1 + log_w))  # the same for all samples
    residual = jnp.hypot(outside_cone(by_x, x), jnp.max(by_w) - jnp.min(by_w))
    return lifted(f_i, g_i, RHO, T), residual, w @ (g_i + T * log_w) - v


def _least(instance: Wavy, joint: bool) -> Array:
    """At most inf P: on a grid, from which a minimiser differs only along directions without slope."""
    ys, grid = instance.samples[:, 0], jnp.asarray(COARSE)
    f_i, g_i = tables(instance.f, instance.g, grid, ys)
    h = COARSE[1] - COARSE[0]
    if joint:
        f, g = tables(instance.f, instance.g, grid, grid)
        return jnp.min(f + RHO * (g - _soft(g_i)[:, None])) - _smoothness(instance.constants, True) * h**2 / 4
    return jnp.min(lifted(f_i, g_i, RHO, T)) - _smoothness(instance.constants, False) * h**2 / 8


def correspondence(make: Callable[..., Any] = SampledPenalty.from_theory) -> Guarantee:
    """Both forms, on frozen samples, with from_theory's rho, t and s = 1/L."""

    def one(instance: Wavy, horizon: tuple[int, ...], joint: bool) -> Array:
        known, key, problem = instance.constants, jax.random.key(0), instance.problem
        solver = make(known.smoothness, EPSILON, form="joint" if joint else "lifted", num_samples=NUM_SAMPLES)
        samples, y = instance.samples, jnp.zeros((1, 1))
        state = solver.init(problem, key)
        samples = jnp.concatenate([samples, y]) if joint else samples
        state = state._replace(x=instance.x[None], y=y, samples=samples[None, :, None])
        L = _smoothness(known, joint)

        def body(state: Any, _: Any) -> Any:
            after = solver.step(problem, state, key)[0]
            moved = jnp.append(after.x - state.x, after.y - state.y if joint else 0.0)
            _, residual, gap = look(instance, after.x[0, 0], after.y[0, 0], joint)
            return after, (L * jnp.linalg.norm(moved), residual, gap)

        G, residuals, gaps = jax.lax.scan(body, state, None, length=horizon[-1])[1]
        start = look(instance, instance.x[0], jnp.zeros(()), joint)[0]
        floor = 1e4 * EPS * known.size * (1 + L)
        rows = [
            jnp.stack([
                jnp.max(residuals[:K] / (2 * G[:K] + floor)),
                jnp.min(residuals[:K]) ** 2 / (8 * L * (start - _least(instance, joint)) / K + floor),
                jnp.zeros(()) if joint else jnp.max(-gaps[:K]) / floor,
            ])
            for K in horizon
        ]  # fmt: skip
        return jnp.stack(rows)

    def measure(instance: Wavy, horizon: tuple[int, ...]) -> Array:
        return jnp.concatenate([one(instance, horizon, joint) for joint in (True, False)], axis=1)

    return Guarantee(
        "sampled-kkt", "ours, in problems.guarantees", (smooth_enough,), waves, measure,
        lambda known, k: jnp.ones(6), (1, 4, 16, 64), lambda known: 0.0,
        "KKT residual at z+ <= 2 |G|, the least of K squared <= 8 L (P_0 - inf P)/K, multiplier rho, at its own gap",
    )  # fmt: skip


CORRESPONDENCE = correspondence()
