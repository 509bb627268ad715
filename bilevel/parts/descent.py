"""Runs of simple steps inside a solver: descent on the lower level, on batches (`descend`) or on all of the data
(`projected_steps`), on any function with Barzilai and Borwein's step lengths (`barzilai_borwein`); a Neumann series.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.problem import BilevelProblem
from bilevel.sets import Set
from bilevel.step import Stepper, move

PyTree = Any


def descend(
    problem: BilevelProblem, x: PyTree, y: PyTree, step_y: Stepper, source: PyTree, key: Array, num_steps: int,
    project: Callable = lambda y: y,
) -> tuple[PyTree, Stepper, PyTree]:  # fmt: skip
    """(y, stepper, source state) after num_steps of y <- project(y - a R(x, y; batch)), a fresh batch each."""

    def body(carry: tuple[PyTree, Stepper, PyTree], key: Array) -> tuple[tuple[PyTree, Stepper, PyTree], None]:
        y, step_y, source = carry
        batch, source = problem.lower_data.next(source, key, x, y)
        y, step_y = step_y(y, oracles.residual(problem, x, y, batch))
        return (project(y), step_y, source), None

    return lax.scan(body, (y, step_y, source), jax.random.split(key, num_steps))[0]


def neumann(
    problem: BilevelProblem, x: PyTree, y: PyTree, b: PyTree, eta: Any, source: PyTree, key: Array, num_steps: int,
    project: Callable = lambda v: v,
) -> tuple[PyTree, PyTree]:  # fmt: skip
    """(v, source state), v = eta sum_{q = 0}^{Q} prod_{j = 1}^{q} (I - eta P R_y(x, y; B_j)') b, Q = num_steps.

    A fresh batch B_j of the lower source each; `project` is P, and b lies in its range. Near (P R_y' P)^-1 b there.
    """

    def term(carry: tuple[PyTree, PyTree, PyTree], key: Array) -> tuple[tuple[PyTree, PyTree, PyTree], None]:
        power, total, source = carry
        batch, source = problem.lower_data.next(source, key, x, y)
        power = move(power, project(oracles.hvp(problem, x, y, power, batch)), eta)
        return (power, optax.tree.add(total, power), source), None

    (_, total, source), _ = lax.scan(term, (b, b, source), jax.random.split(key, num_steps))
    return jax.tree.map(lambda leaf: jnp.asarray(eta, leaf.dtype) * leaf, total), source


def projected_steps(problem: BilevelProblem, x: PyTree, y: PyTree, stepper: Any, num_steps: int) -> tuple[PyTree, Any]:
    """(y, stepper) after `num_steps` of y <- Proj_Y(y - b R(x, y)), on all of the data; stepper: `step.Stepper`."""
    batch = problem.lower_data.full()

    def step(carry: tuple[PyTree, Any], _: None) -> tuple[tuple[PyTree, Any], None]:
        y, stepper = carry
        y, stepper = stepper(y, oracles.residual(problem, x, y, batch))
        return (problem.y_set.project(y), stepper), None

    return lax.scan(step, (y, stepper), length=num_steps)[0]


class Descent(NamedTuple):
    """A projected gradient descent; all raveled."""

    y: Array
    """Shape [n]."""

    value: Array
    """Shape []."""

    gradient: Array
    """Shape [n]."""

    size: Array
    """Of the next step, shape []."""


def barzilai_borwein(set: Set, look: Callable, y: PyTree, num_steps: int, size: Any = 0.0) -> tuple[PyTree, Array]:
    """(y, its value) after `num_steps` projected gradient steps of Barzilai and Borwein's length, from y in the set.

    look: y -> (value, gradient). A step is kept only where the value does not rise. size: the first one's, 0 for a
    guess.
    """
    flat, unravel = ravel_pytree(y)
    rounding = 10 * float(jnp.finfo(flat.dtype).eps)

    def at(flat: Array) -> tuple[Array, Array]:
        value, gradient = look(unravel(flat))
        return value, ravel_pytree(gradient)[0]

    def step(here: Descent, _: None) -> tuple[Descent, None]:
        y, g, gradient, size = here
        trial = ravel_pytree(set.project(unravel(y - size * gradient)))[0]
        value, slope = at(trial)
        kept = value <= g + rounding * jnp.abs(g)  # where rounding hides the fall, the gradient still shows the way
        moved = trial - y
        bend, length = moved @ (slope - gradient), moved @ moved
        long = jnp.where(bend > 0, length / jnp.where(bend > 0, bend, 1), 4 * size)
        shorter = jnp.where((bend > 0) & (long < size), long, size / 5)
        size = jnp.where(kept & (length > 0), jnp.clip(long, 1e-8 * size, 1e8 * size), shorter)
        y, g, gradient = (jnp.where(kept, new, old) for new, old in ((trial, y), (value, g), (slope, gradient)))
        return Descent(y, g, gradient, size), None

    value, gradient = at(flat)
    steep = jnp.linalg.norm(gradient)
    guess = 0.05 * (1 + jnp.linalg.norm(flat)) / jnp.where(steep > 0, steep, 1)
    start = Descent(flat, value, gradient, jnp.where(size > 0, size, guess))
    end = lax.scan(step, start, length=num_steps)[0]
    return unravel(end.y), end.value
