"""Gradient, projected and accelerated gradient descent on F with exact hypergradients: the classical rates.

All on functions F that are mu-strongly convex with an L-Lipschitz gradient, from x_0:

    x+ = x - s grad F(x):            |x_k - x*| <= max(|1 - s mu|, |1 - s L|)^k |x_0 - x*|
    x+ = Proj_X(x - s grad F(x)):    the same, x* the minimiser over X, a fixed point of a step that contracts so
    x+ = z - grad F(z)/L, z+ = x+ + b (x+ - x), b = (sqrt(L) - sqrt(mu))/(sqrt(L) + sqrt(mu)):
                                     F(x_k) - F* <= (1 - sqrt(mu/L))^k (F(x_0) - F* + mu |x_0 - x*|^2/2)

The first two are attained, by |x|^2 times mu/2 or L/2. The third is not: `python -m benchmarks.peers.pepit` has the
exact worst case beside it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bilevel import BilevelProblem, Box, Full, Minimize, hypergradient, theory
from bilevel.guarantees import Guarantee
from bilevel.theory import assumptions
from problems import strategies
from problems.guarantees.instances import (
    DIM,
    EPS,
    Known,
    Quadratic,
    basis,
    mask,
    normal,
    of_length,
    origin,
    upper_smooth,
    upper_strongly_convex,
)
from problems.guarantees.single_loop import HORIZON, quadratics


def gradient_step(problem: BilevelProblem, x: Array, y: Array, step: Array) -> tuple[Array, Array]:
    """The point x - step grad F(x), and y(x) for the next start."""
    h = hypergradient(problem, x, y, estimate=False).checked()
    return x - step * h.gradient, h.y


def projected_step(problem: BilevelProblem, x: Array, y: Array, step: Array) -> tuple[Array, Array]:
    """Proj_X(x - step grad F(x)), and y(x)."""
    x, y = gradient_step(problem, x, y, step)
    return problem.x_set.project(x), y


def accelerated_step(problem: BilevelProblem, pair: tuple[Array, Array], y: Array, steps: tuple[Array, Array]) -> Any:
    """((x+, z+), y(z)) from (x, z) with steps = (1/L, b)."""
    x, z = pair
    new, y = gradient_step(problem, z, y, steps[0])
    return (new, new + steps[1] * (new - x)), y


def descend(problem: BilevelProblem, x: Any, y: Array, step: Any, ks: tuple[int, ...], move: Callable) -> Any:
    """The iterates after each k of `ks`, shape [len(ks), dim x]; of each part where x is a pytree."""

    def segment(carry: Any, count: Array) -> Any:
        carry = jax.lax.fori_loop(0, count, lambda _, c: move(problem, *c, step), carry)
        return carry, carry[0]

    counts = jnp.diff(jnp.array((0, *ks)))
    return jax.lax.scan(segment, (x, y), counts)[1]


def rounding(known: Known) -> Array:
    """Of hypergradients, amplified twice by the lower level's condition."""
    return 1e3 * EPS * known.size / known.base.mu


def strongly_convex(move: Callable = gradient_step) -> Guarantee:
    """Contraction with step 2/(mu + L) on quadratics."""

    def measure(instance: Quadratic, horizon: tuple[int, ...]) -> Array:
        known = instance.constants
        step = 2 / (known.mu_F + known.L_F)
        xs = descend(instance.problem, instance.x, instance.y, step, horizon, move)
        return jnp.linalg.norm(xs - instance.x_star[None, :], axis=1)

    def bound(known: Known, k: int) -> Array:
        return theory.contraction(2 / (known.mu_F + known.L_F), known.mu_F, known.L_F) ** k * known.start.e

    return Guarantee(
        "gd-quadratic", "Nesterov 2004, 2.1.15", (upper_strongly_convex, upper_smooth),
        quadratics, measure, bound, HORIZON[1:7], rounding,
        "|x_k - x*| <= ((L - mu)/(L + mu))^k |x_0 - x*|, step 2/(mu + L), F quadratic", "geometric",
    )  # fmt: skip


class KnownHuber(NamedTuple):
    """L of grad F, mu of F, |x_0 - x*|, F(x_0) - F* + mu |x_0 - x*|^2/2."""

    L: Array
    mu: Array
    distance: Array
    potential: Array


class HuberData(NamedTuple):
    """Directions U [DIM, DIM] (rows), widths [DIM], L, mu, x_star [DIM], slope [DIM] = grad F(x*)."""

    U: Array
    width: Array
    L: Array
    mu: Array
    x_star: Array
    slope: Array


def huber(t: Array, width: Array) -> Array:
    """t^2/2 where |t| <= width, width |t| - width^2/2 beyond: 1-smooth and convex."""
    size = jnp.abs(t)
    return jnp.where(size <= width, t**2 / 2, width * size - width**2 / 2)


def huber_upper(x: Array, y: Array, batch: HuberData) -> Array:
    """The upper objective f = mu |y - x*|^2/2 + (L - mu) sum_i huber(u_i'(y - x*)) + slope'(y - x*)."""
    away = y - batch.x_star
    curved = batch.mu * away @ away / 2 + (batch.L - batch.mu) * jnp.sum(huber(batch.U @ away, batch.width))
    return curved + batch.slope @ away


def identity_lower(x: Array, y: Array, batch: Any) -> Array:
    """The lower objective g = |y - x|^2/2, so that y(x) = x and F(x) = f(x, x)."""
    return (y - x) @ (y - x) / 2


class Huber(NamedTuple):
    """F = mu |x - x*|^2/2 + (L - mu) times a sum of Huber functions along orthonormal directions, from x.

    With a slope c, F is minimised over `box`, at x*, where -c points out of it.
    """

    data: HuberData
    x: Array
    constants: KnownHuber
    box: Box

    @property
    def problem(self) -> BilevelProblem:
        """The bilevel problem."""
        return BilevelProblem(
            huber_upper, Minimize(identity_lower), x_set=self.box, upper_data=Full(self.data), init=origin
        )


def huber_instance(
    key: Array, dim: Array, L: Array, convexity: Array, width: Array, spread: Array, offset: Array,
    corner: Array | float = 0.0,
) -> Huber:  # fmt: skip
    """|x_0 - x*| = 1; widths `width` times up to 1 + spread; mu = convexity L; a slope of entries of about corner L.

    The box ends at x* in the coordinates with a slope, half of them, and nowhere in the others.
    """
    keys = jax.random.split(key, 5)
    widths = width * (1 + spread * jax.random.uniform(keys[0], (DIM,), float))
    U, x_star = basis(keys[1]), offset * normal(keys[2], DIM)
    x = x_star + U.T @ of_length(normal(keys[3], DIM) * mask(dim), jnp.ones(()))
    slope = jnp.where(jnp.arange(DIM) % 2 == 0, corner * L * normal(keys[4], DIM), 0)
    box = Box(jnp.where(slope > 0, x_star, -jnp.inf), jnp.where(slope < 0, x_star, jnp.inf))
    data, one, mu = HuberData(U, widths, L, convexity * L, x_star, slope), jnp.ones(()), convexity * L
    return Huber(data, x, KnownHuber(L, mu, one, huber_upper(x, x, data) + mu / 2), box)


def _hessian(instance: Huber) -> Array:
    return jax.hessian(lambda x: huber_upper(x, x, instance.data))(instance.x)


def smooth_at_start(instance: Huber) -> Array:
    """Assumption: |grad^2 F(x_0)| <= L."""
    return assumptions.smooth(_hessian(instance), instance.constants.L)


def convex_at_start(instance: Huber) -> Array:
    """Assumption: grad^2 F(x_0) >= mu, up to rounding."""
    return jnp.linalg.eigvalsh(_hessian(instance))[0] - instance.constants.mu + 1e-9 * instance.constants.L


def hubers(convexity: Any, L: Any = None, **more: Any) -> Any:
    """Recipes of `huber_instance` with mu/L from `convexity`."""
    return strategies.recipes(
        huber_instance, dim=strategies.dims(DIM), L=strategies.scales() if L is None else L, convexity=convexity,
        width=strategies.fractions(0.0, 1.0), spread=strategies.sizes(), offset=strategies.switches, **more,
    )  # fmt: skip


def convex(move: Callable = gradient_step) -> Guarantee:
    """Values with step 1/L on smooth convex functions."""

    def measure(instance: Huber, horizon: tuple[int, ...]) -> Array:
        xs = descend(instance.problem, instance.x, instance.x, 1 / instance.constants.L, horizon, move)
        return jax.vmap(lambda x: huber_upper(x, x, instance.data))(xs)  # the least value is 0

    return Guarantee(
        "gd-convex", "Drori, Teboulle 2014", (smooth_at_start, convex_at_start),
        hubers(strategies.just(0.0)), measure,
        lambda known, k: known.L * known.distance**2 / (4 * k + 2), (1, 2, 5, 10, 20, 50),
        lambda known: 1e4 * EPS * known.L, "F(x_k) - F* <= L |x_0 - x*|^2/(4 k + 2), step 1/L", "power",
    )  # fmt: skip


def both(move: Callable = gradient_step) -> Guarantee:
    """Distances with step 2/(mu + L) on smooth, strongly convex functions that are not quadratic."""

    def measure(instance: Huber, horizon: tuple[int, ...]) -> Array:
        step = 2 / (instance.constants.L + instance.constants.mu)
        xs = descend(instance.problem, instance.x, instance.x, step, horizon, move)
        return jnp.linalg.norm(xs - instance.data.x_star[None, :], axis=1)

    def bound(known: KnownHuber, k: int) -> Array:
        return theory.contraction(2 / (known.L + known.mu), known.mu, known.L) ** k * known.distance

    return Guarantee(
        "gd-smooth", "Nesterov 2004, 2.1.15", (smooth_at_start, convex_at_start),
        hubers(strategies.fractions(0.001, 1.0)), measure, bound, (1, 2, 5, 10, 20, 50), lambda known: 1e4 * EPS,
        "|x_k - x*| <= ((L - mu)/(L + mu))^k |x_0 - x*|, step 2/(mu + L), F not quadratic", "geometric",
    )  # fmt: skip


def projected(move: Callable = projected_step) -> Guarantee:
    """Distances with step 1/L and x in a box, at a corner of which the solution may be."""

    def measure(instance: Huber, horizon: tuple[int, ...]) -> Array:
        xs = descend(instance.problem, instance.x, instance.x, 1 / instance.constants.L, horizon, move)
        outside = jnp.max(jnp.maximum(instance.box.lo[None] - xs, xs - instance.box.hi[None]), axis=1)
        return jnp.stack([jnp.linalg.norm(xs - instance.data.x_star[None, :], axis=1), outside], axis=1)

    def bound(known: KnownHuber, k: int) -> Array:
        return jnp.stack([theory.contraction(1 / known.L, known.mu, known.L) ** k * known.distance, jnp.zeros(())])

    return Guarantee(
        "gd-projected", "Taylor et al. 2018", (smooth_at_start, convex_at_start),
        hubers(strategies.fractions(0.001, 1.0), corner=strategies.sizes()), measure, bound, (1, 2, 5, 10, 20, 50),
        lambda known: 1e4 * EPS, "|x_k - x*| <= (1 - mu/L)^k |x_0 - x*|, x* over a box, step 1/L; x_k in the box",
        "geometric",
    )  # fmt: skip


def momentum(mu: Any, L: Any) -> Any:
    """Nesterov's constant (sqrt(L) - sqrt(mu))/(sqrt(L) + sqrt(mu))."""
    return (jnp.sqrt(L) - jnp.sqrt(mu)) / (jnp.sqrt(L) + jnp.sqrt(mu))


def accelerated(move: Callable = accelerated_step) -> Guarantee:
    """Values of Nesterov's method with constant momentum."""

    def measure(instance: Huber, horizon: tuple[int, ...]) -> Array:
        L, mu, x = instance.constants.L, instance.constants.mu, instance.x
        xs, _ = descend(instance.problem, (x, x), x, (1 / L, momentum(mu, L)), horizon, move)
        return jax.vmap(lambda x: huber_upper(x, x, instance.data))(xs)

    return Guarantee(
        "gd-accelerated", "d'Aspremont et al. 2021, 4.15", (smooth_at_start, convex_at_start),
        hubers(strategies.fractions(0.001, 1.0)), measure,
        lambda known, k: (1 - jnp.sqrt(known.mu / known.L)) ** k * known.potential, (1, 2, 5, 10, 20, 50),
        lambda known: 1e4 * EPS * known.L,
        "F(x_k) - F* <= (1 - sqrt(mu/L))^k (F(x_0) - F* + mu |x_0 - x*|^2/2), Nesterov's method", "geometric",
    )  # fmt: skip


STRONGLY_CONVEX = strongly_convex()
CONVEX = convex()
SMOOTH = both()
PROJECTED = projected()
ACCELERATED = accelerated()
