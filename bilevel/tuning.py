"""Default step sizes from the problem's curvature at the starting point.

    a = 1/L, with L the largest eigenvalue of g_yy (Lanczos) at x0 and at SAMPLES points of a bounded X, or around x0;
        at most 1 for fixed points;
    c = 0.5/L_F, with L_F = |grad^2 F| at x0 (power iteration on differences of hypergradients), times `caution`:
        for single-loop methods min(1/4, 5 mu/L), at least 1/100, with mu and L at x0; for fixed points at most 1/10.

They cost a few lower-level solves once, at init, outside of the oracle count of a step. They are estimates, not bounds:
give numbers, schedules or optax transformations to control a run.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.diagnostics import norm
from bilevel.hypergradient import hypergradient
from bilevel.lower import descend, spectrum
from bilevel.problem import BilevelProblem, FixedPoint
from bilevel.sets import Reals
from bilevel.step import Stepper, StepRule, stepper

PyTree = Any
PROBES = 6
SAMPLES = 4


def upper_curvature(problem: BilevelProblem, x: PyTree, y: PyTree) -> Array:
    """An estimate of |grad^2 F(x)|_2, shape [], usually from below."""
    flat, unravel = ravel_pytree(x)
    distance = jnp.finfo(flat.dtype).eps ** 0.25 * (1 + jnp.linalg.norm(flat))
    noise = 0.1 * jax.random.normal(jax.random.key(1), flat.shape, flat.dtype) / flat.size**0.5
    tiny = jnp.finfo(flat.dtype).tiny

    def probe(k: Array, carry: Any) -> Any:
        """The first pass (direction 0) is the gradient at x: in the loop, the lower solve is compiled once."""
        here, direction, size, y, v = carry
        moved = hypergradient(problem, unravel(flat + distance * direction), y, v=v, estimate=False)
        gradient = ravel_pytree(moved.gradient)[0]
        here = jnp.where(k == 0, gradient, here)
        change = jnp.where(k == 0, here + jnp.linalg.norm(here) * noise, (gradient - here) / distance)
        size = jnp.linalg.norm(change)
        fallback = jnp.where(k == 0, jnp.ones_like(flat) / flat.size**0.5, direction)
        return here, jnp.where(size > 0, change / jnp.maximum(size, tiny), fallback), size, moved.y, moved.v

    zero = jnp.zeros_like(flat)
    start = zero, zero, jnp.zeros((), flat.dtype), y, jax.tree.map(jnp.zeros_like, y)
    return lax.fori_loop(0, PROBES + 1, probe, start)[2]


def default_steps(problem: BilevelProblem, x: PyTree, y: PyTree, single_loop: bool) -> tuple[Array, Array]:
    """(lower step a, upper step c); where an estimate fails, 1e-2."""
    batch = problem.lower_data.full()
    L, mu = spectrum(problem, x, y, batch)
    elsewhere = jax.vmap(lambda key: spectrum(problem, _near(problem, x, key), y, batch)[0])
    highest = jnp.maximum(L, jnp.max(elsewhere(jax.random.split(jax.random.key(2), SAMPLES))))
    caution = jnp.clip(5 * mu / L, 1e-2, 0.25) if single_loop else jnp.ones_like(L)
    if isinstance(problem.lower, FixedPoint):  # mu and L of the symmetric part say little about how fast T contracts
        caution = jnp.minimum(caution, 0.1)
    if isinstance(problem.lower, FixedPoint):  # y <- y - a (y - T) contracts for every a in (0, 1], whatever the norm
        highest = jnp.maximum(highest, 1)
    sizes = (1 / highest, 0.5 * caution / upper_curvature(problem, x, y))
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
    upper_step: StepRule | None,
    lower_step: StepRule | None,
    linear_step: StepRule | None,
    single_loop: bool,
    caution: float = 1.0,
) -> Iterates:
    """The state at init's (x0, y0) with v = 0; a step rule that is None takes its default times `caution`."""
    key_start, key_upper, key_lower = jax.random.split(key, 3)
    x, y = problem.init(key_start)
    v = jax.tree.map(jnp.zeros_like, y)
    lower_size = upper_size = None
    if None in (upper_step, lower_step, linear_step):
        lower_size, upper_size = (caution * size for size in default_steps(problem, x, y, single_loop))
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
