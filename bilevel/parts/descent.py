"""Runs of simple steps inside a solver: descent on the lower level, a Neumann series."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from bilevel import oracles
from bilevel.problem import BilevelProblem
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
        return (power, jax.tree.map(jnp.add, total, power), source), None

    (_, total, source), _ = lax.scan(term, (b, b, source), jax.random.split(key, num_steps))
    return jax.tree.map(lambda leaf: jnp.asarray(eta, leaf.dtype) * leaf, total), source


def projected_steps(problem: BilevelProblem, x: PyTree, y: PyTree, stepper: Any, num_steps: int) -> tuple[PyTree, Any]:
    """(y, stepper) after `num_steps` of y <- Proj_Y(y - b g_y(x, y)), on all of the data; stepper: `step.Stepper`."""
    batch = problem.lower_data.full()

    def step(carry: tuple[PyTree, Any], _: None) -> tuple[tuple[PyTree, Any], None]:
        y, stepper = carry
        y, stepper = stepper(y, oracles.residual(problem, x, y, batch))
        return (problem.y_set.project(y), stepper), None

    return lax.scan(step, (y, stepper), length=num_steps)[0]
