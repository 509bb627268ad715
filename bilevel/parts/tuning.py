"""Default step sizes from the problem's curvature at the starting point.

    a = 1/L, with L the largest eigenvalue of g_yy (Lanczos) at x0 and at SAMPLES points of a bounded X, or around x0;
        at most 1 for fixed points;
    c = 0.5/(L_F + 2 lag B), with L_F = |grad^2 F| at x0 (power iteration on differences of hypergradients) and what
        follows from y and v coming behind x; for fixed points a tenth of 0.5/L_F, in single loops
        5 mu/L of it where that is less, at least 1/100.

The lower variables lag behind x. Let the T lower steps between two steps of x reduce the error of y by r^T, with
r = 1 - a mu, and let that of v fall as fast. While x moves by dx a step, y settles at y(x) - lag (dy/dx) dx with
lag = r^T/(1 - r^T), and v likewise; where x moves at the same time as y and v, lag = 1/(1 - r). On quadratics the
direction in x is then grad F(x) - K dx with

    K = W' l(H) A + A' l(H) W,   A = dy/dx,   W = H dv/dx,   H = g_yy,   l(h) = (1 - a h)^T/(1 - (1 - a h)^T),

so that x runs away when c |K| > 1, however small c L_F is: an f that is concave in x alone, held by its lower level,
does that. The bound |K| <= 2 lag B with B = |A'W| needs no solve, since A'W u = - R_x' (dv/dx) u: B is the largest
|A'W u| that the power iteration and another one, of A'W, come by. On 120 quadratics with strong coupling or bad
conditioning and T from 1 to 30 the largest stable step was at least 1.1 times 1/(L_F + 2 lag B), and where coupling
rules at most 5 times.

Where a lower level is not solved, neither is the estimate: the step is then 1e-2.

They cost a few lower-level solves once, at init, outside of the oracle count of a step. They are estimates, not bounds:
give numbers, schedules or optax transformations to control a run.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
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


class Seen(NamedTuple):
    """A hypergradient, raveled, with the y and the adjoint v that it is from."""

    gradient: Array
    y: PyTree
    v: PyTree


class Probe(NamedTuple):
    """Power iterations for |grad^2 F| and then for |A'W|, by differences of hypergradients."""

    at: Seen
    """At x itself."""

    direction: Array
    """The next one to look along, shape [dim x]."""

    curvature: Array
    """The last |grad^2 F d| of the first iteration, shape []."""

    feedback: Array
    """The largest |A'W d| so far, shape []."""

    y: PyTree
    """Where the next lower solve begins."""

    v: PyTree
    """Where the next adjoint solve begins."""


def _sensitivity(problem: BilevelProblem, x: PyTree, y: PyTree, probes: int) -> tuple[Array, Array]:
    """(|grad^2 F(x)|_2, |A'W|) of the module's docstring, both estimated, the second by `probes` more products."""
    flat, unravel = ravel_pytree(x)
    distance = jnp.finfo(flat.dtype).eps ** 0.25 * (1 + jnp.linalg.norm(flat))
    noise = 0.1 * jax.random.normal(jax.random.key(1), flat.shape, flat.dtype) / flat.size**0.5
    tiny = jnp.finfo(flat.dtype).tiny
    batch = problem.lower_data.full()

    def probe(k: Array, now: Probe) -> Probe:
        """The first pass, whose direction is 0, is the gradient at x: in the loop, the lower solve is compiled once."""
        moved = hypergradient(problem, unravel(flat + distance * now.direction), now.y, v=now.v, estimate=False)
        there = Seen(ravel_pytree(moved.checked().gradient)[0], moved.y, moved.v)
        first = k == 0
        at = jax.tree.map(partial(jnp.where, first), there, now.at)
        noisy = there.gradient + jnp.linalg.norm(there.gradient) * noise
        change = jnp.where(first, noisy, (there.gradient - at.gradient) / distance)
        feedback = now.feedback
        if probes:
            dv = optax.tree.sub(there.v, at.v)  # zero in the first pass
            back = ravel_pytree(oracles.cross(problem, x, at.y, dv, batch))[0] / distance
            feedback = jnp.maximum(feedback, jnp.linalg.norm(back))
            change = jnp.where(k <= PROBES, change, back)
        size = jnp.where(k <= PROBES, jnp.linalg.norm(change), now.curvature)
        fallback = jnp.where(first, jnp.ones_like(flat) / flat.size**0.5, now.direction)
        length = jnp.linalg.norm(change)
        direction = jnp.where(length > 0, change / jnp.maximum(length, tiny), fallback)
        return Probe(at, direction, size, feedback, there.y, there.v)

    zero, nought = jnp.zeros_like(flat), jnp.zeros((), flat.dtype)
    v = optax.tree.zeros_like(y)
    start = Probe(Seen(zero, y, v), zero, nought, nought, y, v)
    end = lax.fori_loop(0, PROBES + 1 + probes, probe, start)
    return end.curvature, end.feedback


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
    return problem.x_set.project(optax.tree.add(x, Reals().sample(key, x)))


class Iterates(NamedTuple):
    """The state that most solvers share."""

    x: PyTree
    y: PyTree
    v: PyTree
    """The adjoint, shaped like y."""

    step_x: Stepper
    """The step rule of x, with its state."""

    step_y: Stepper
    step_v: Stepper
    upper: PyTree
    """The state of the upper source."""

    lower: PyTree
    """The state of the lower source."""


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
    v = optax.tree.zeros_like(y)
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
    direction = optax.tree.sub(fx, oracles.cross(problem, x, y, v, batch_g))
    x, step_x = state.step_x(x, direction)
    return Iterates(problem.x_set.project(x), y, v, step_x, step_y, step_v, upper, lower), norm(direction)
