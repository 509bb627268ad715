"""Default step sizes from the problem's curvature at the starting point.

    a = 1/L, with L the largest eigenvalue of g_yy (Lanczos) at x0 and at SAMPLES points of a bounded X, or around x0;
        at most 1 for fixed points;
    c = 0.5/(L_F + 2 lag B), with L_F = |grad^2 F| at x0 (power iteration on differences of hypergradients) and what
        follows from y and v coming behind x; for fixed points a tenth of 0.5/L_F, in single loops
        5 mu/L of it where that is less, at least 1/100.

y and v come behind. Let T lower steps, each x step, reduce the error of y, and as many that of v, by r^T, r = 1 - a mu.
While x moves by dx a step, y settles at y(x) - (dy/dx) dx times lag = r^T/(1 - r^T) and v likewise; where x moves at
the same time as y and v, lag = 1/(1 - r). On quadratics the direction in x is then grad F(x) - K dx with

    K = W' l(H) A + A' l(H) W,   A = dy/dx,   W = H dv/dx,   H = g_yy,   l(h) = (1 - a h)^T/(1 - (1 - a h)^T),

so that x runs away when c |K| > 1, however small c L_F is: an f that is concave in x alone, held by its lower level,
does that. |K| <= 2 lag B with B = |A'W|, and A'W u = - R_x' (dv/dx) u needs no solve: B is the largest that is seen on
the way of the power iteration and of another, of A'W. On 120 quadratics with strong coupling or bad conditioning and T
from 1 to 30 the largest stable step was at least 1.1 times 1/(L_F + 2 lag B), and where coupling rules at most 5 times.

They cost a few lower-level solves once, at init, outside of the oracle count of a step. They are estimates, not bounds:
give numbers, schedules or optax transformations to control a run.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.backend.tree import norm
from bilevel.hypergradient import hypergradient
from bilevel.parts.descent import descend
from bilevel.parts.spectrum import spectrum
from bilevel.problem import BilevelProblem, FixedPoint
from bilevel.sets import Reals
from bilevel.step import Stepper, StepSize, stepper

PyTree = Any
PROBES = 6
SAMPLES = 4
LEAST, UNKNOWN = 1e-4, 2e-3  # mu/L is taken to be at least that much; where g is not convex


def upper_curvature(problem: BilevelProblem, x: PyTree, y: PyTree) -> Array:
    """An estimate of |grad^2 F(x)|_2, shape [], usually from below."""
    return _sensitivity(problem, x, y, 0)[0]


def _sensitivity(problem: BilevelProblem, x: PyTree, y: PyTree, probes: int) -> tuple[Array, Array]:
    """(|grad^2 F(x)|_2, |A'W|) of the module's docstring, both estimated, the second by `probes` more products."""
    flat, unravel = ravel_pytree(x)
    distance = jnp.finfo(flat.dtype).eps ** 0.25 * (1 + jnp.linalg.norm(flat))
    noise = 0.1 * jax.random.normal(jax.random.key(1), flat.shape, flat.dtype) / flat.size**0.5
    tiny = jnp.finfo(flat.dtype).tiny
    batch = problem.lower_data.full()

    def probe(k: Array, carry: Any) -> Any:
        """The first pass (direction 0) is the gradient at x: in the loop, the lower solve is compiled once."""
        (gradient, at_y, at_v), direction, size, feedback, y, v = carry
        moved = hypergradient(problem, unravel(flat + distance * direction), y, v=v, estimate=False)
        now = ravel_pytree(moved.gradient)[0]
        first = k == 0
        at = jax.tree.map(partial(jnp.where, first), (now, moved.y, moved.v), (gradient, at_y, at_v))
        change = jnp.where(first, now + jnp.linalg.norm(now) * noise, (now - at[0]) / distance)
        if probes:
            dv = jax.tree.map(jnp.subtract, moved.v, at[2])  # zero in the first pass
            back = ravel_pytree(oracles.cross(problem, x, at[1], dv, batch))[0] / distance
            feedback = jnp.maximum(feedback, jnp.linalg.norm(back))
            change = jnp.where(k <= PROBES, change, back)
        size = jnp.where(k <= PROBES, jnp.linalg.norm(change), size)
        fallback = jnp.where(first, jnp.ones_like(flat) / flat.size**0.5, direction)
        length = jnp.linalg.norm(change)
        return at, jnp.where(length > 0, change / jnp.maximum(length, tiny), fallback), size, feedback, moved.y, moved.v

    zero, nought = jnp.zeros_like(flat), jnp.zeros((), flat.dtype)
    v = jax.tree.map(jnp.zeros_like, y)
    end = lax.fori_loop(0, PROBES + 1 + probes, probe, ((zero, y, v), zero, nought, nought, y, v))
    return end[2], end[3]


def default_steps(problem: BilevelProblem, x: PyTree, y: PyTree, num_lower_steps: int | None) -> tuple[Array, Array]:
    """(lower step a, upper step c) of the module's docstring; where an estimate fails, 1e-2.

    num_lower_steps: T, 0 where x, y and v move at once, None where the step in x does not wait for y (lag 0).
    """
    batch = problem.lower_data.full()
    L, mu = spectrum(problem, x, y, batch)
    elsewhere = jax.vmap(lambda key: spectrum(problem, _near(problem, x, key), y, batch)[0])
    highest = jnp.maximum(L, jnp.max(elsewhere(jax.random.split(jax.random.key(2), SAMPLES))))
    if isinstance(problem.lower, FixedPoint):  # mu and L of the symmetric part say little about how fast T contracts
        highest = jnp.maximum(highest, 1)  # y <- y - a (y - T) contracts for every a in (0, 1], whatever the norm
        caution = jnp.clip(5 * mu / L, 1e-2, 0.1) if num_lower_steps == 0 else 0.1
        size = upper_curvature(problem, x, y) / caution
    elif num_lower_steps is None:
        size = upper_curvature(problem, x, y)
    else:
        curvature, feedback = _sensitivity(problem, x, y, PROBES)
        rate = 1 - jnp.where(mu > 0, jnp.maximum(mu / highest, LEAST), UNKNOWN)
        left = rate ** max(num_lower_steps, 1)
        size = curvature + 2 * feedback * (left if num_lower_steps else 1) / (1 - left)
    sizes = (1 / highest, 0.5 / size)
    lower, upper = (jnp.where(jnp.isfinite(size) & (size > 0), size, 1e-2) for size in sizes)
    return lower, upper


def _near(problem: BilevelProblem, x: PyTree, key: Array) -> PyTree:
    """A point where the run may come by: of X where it is bounded, else x0 plus standard normal noise, projected."""
    if problem.x_set.bounded:
        return problem.x_set.sample(key, x)
    return problem.x_set.project(jax.tree.map(jnp.add, x, Reals().sample(key, x)))


class Iterates(NamedTuple):
    """The state that most solvers share.

    x, y, v (the adjoint, shaped like y); the step rules with their states; the states of the two sources.
    """

    x: PyTree
    y: PyTree
    v: PyTree
    step_x: Stepper
    step_y: Stepper
    step_v: Stepper
    upper: PyTree
    lower: PyTree


def start(
    problem: BilevelProblem,
    key: Array,
    upper_step: StepSize | None,
    lower_step: StepSize | None,
    linear_step: StepSize | None,
    num_lower_steps: int | None,
    caution: float = 1.0,
) -> Iterates:
    """The state at init's (x0, y0) with v = 0; a step rule that is None takes its default times `caution`."""
    key_start, key_upper, key_lower = jax.random.split(key, 3)
    x, y = problem.init(key_start)
    v = jax.tree.map(jnp.zeros_like, y)
    lower_size = upper_size = None
    if None in (upper_step, lower_step, linear_step):
        lower_size, upper_size = (caution * size for size in default_steps(problem, x, y, num_lower_steps))
    return Iterates(
        x,
        y,
        v,
        step_x=stepper(upper_step, upper_size, x),
        step_y=stepper(lower_step, lower_size, y),
        step_v=stepper(linear_step, lower_size, v),
        upper=problem.upper_data.init(key_upper),
        lower=problem.lower_data.init(key_lower),
    )


def implicit_step(
    problem: BilevelProblem, state: Iterates, key: Array, num_lower_steps: int, adjoint: Callable
) -> tuple[Iterates, Array]:
    """(next state, |direction|) of methods that nest their loops: lower steps, one batch D of f, the adjoint, then x:

        y <- y - a R(x, y; B) `num_lower_steps` times,   x <- Proj_X(x - c (f_x(x, y; D) - R_x(x, y; B)' v)),

    with a fresh batch B wherever one is named. adjoint: (y, f_y, lower source, key) -> (v, its stepper, lower source).
    """
    x = state.x
    key_y, key_f, key_v, key_x = jax.random.split(key, 4)
    y, step_y, lower = descend(problem, x, state.y, state.step_y, state.lower, key_y, num_lower_steps)
    batch_f, upper = problem.upper_data.next(state.upper, key_f, x, y)
    fx, fy = oracles.upper_gradients(problem, x, y, batch_f)
    v, step_v, lower = adjoint(y, fy, lower, key_v)
    batch_g, lower = problem.lower_data.next(lower, key_x, x, y)
    direction = jax.tree.map(jnp.subtract, fx, oracles.cross(problem, x, y, v, batch_g))
    x, step_x = state.step_x(x, direction)
    return Iterates(problem.x_set.project(x), y, v, step_x, step_y, step_v, upper, lower), norm(direction)
