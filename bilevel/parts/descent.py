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


class Descended(NamedTuple):
    """A variable on its way down the lower level, batch by batch."""

    y: PyTree
    """The lower variable."""

    step: Stepper
    """Its step rule, with its state."""

    source: PyTree
    """The state of the lower source."""


def descend(
    problem: BilevelProblem, x: PyTree, y: PyTree, step_y: Stepper, source: PyTree, key: Array, num_steps: int,
    project: Callable = lambda y: y,
) -> Descended:  # fmt: skip
    """What num_steps of y <- project(y - a R(x, y; batch)) lead to, a fresh batch each."""

    def body(at: Descended, key: Array) -> tuple[Descended, None]:
        batch, source = problem.lower_data.next(at.source, key, x, at.y)
        y, step = at.step(at.y, oracles.residual(problem, x, at.y, batch))
        return Descended(project(y), step, source), None

    return lax.scan(body, Descended(y, step_y, source), jax.random.split(key, num_steps))[0]


class Series(NamedTuple):
    """A Neumann series under way."""

    power: PyTree
    """Its last term, over eta."""

    total: PyTree
    """The sum of its terms, over eta."""

    source: PyTree
    """The state of the lower source."""


class Summed(NamedTuple):
    """A Neumann series that was cut off."""

    v: PyTree
    """Its sum."""

    source: PyTree
    """The state of the lower source."""


def neumann(
    problem: BilevelProblem, x: PyTree, y: PyTree, b: PyTree, eta: Any, source: PyTree, key: Array, num_steps: int,
    project: Callable = lambda v: v,
) -> Summed:  # fmt: skip
    """The sum v = eta sum_{q = 0}^{Q} prod_{j = 1}^{q} (I - eta P R_y(x, y; B_j)') b, Q = num_steps.

    A fresh batch B_j of the lower source each; `project` is P, and b lies in its range. Near (P R_y' P)^-1 b there.
    """

    def term(at: Series, key: Array) -> tuple[Series, None]:
        batch, source = problem.lower_data.next(at.source, key, x, y)
        power = move(at.power, project(oracles.hvp(problem, x, y, at.power, batch)), eta)
        return Series(power, optax.tree.add(at.total, power), source), None

    end = lax.scan(term, Series(b, b, source), jax.random.split(key, num_steps))[0]
    return Summed(jax.tree.map(lambda leaf: jnp.asarray(eta, leaf.dtype) * leaf, end.total), end.source)


class Projected(NamedTuple):
    """A variable on its way down the lower level in Y."""

    y: PyTree
    """The lower variable."""

    step: Stepper
    """Its step rule, with its state."""


def projected_steps(problem: BilevelProblem, x: PyTree, y: PyTree, stepper: Stepper, num_steps: int) -> Projected:
    """What `num_steps` of y <- Proj_Y(y - b R(x, y)) lead to, on all of the data."""
    batch = problem.lower_data.full()

    def step(at: Projected, _: None) -> tuple[Projected, None]:
        y, stepper = at.step(at.y, oracles.residual(problem, x, at.y, batch))
        return Projected(problem.y_set.project(y), stepper), None

    return lax.scan(step, Projected(y, stepper), length=num_steps)[0]


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
