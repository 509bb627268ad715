"""F and its gradient at a point, with the lower level solved there: what methods along the exact gradient share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from bilevel import lower
from bilevel.lower import Adjoint
from bilevel.lower.upper_rows import with_constraints
from bilevel.problem import BilevelProblem
from bilevel.record import ConstraintGradients, OracleCount, solved

PyTree = Any

LEAST = OracleCount(upper_gradients=1, lower_gradients=1)
"""The calls of an evaluation whose lower level is solved where it starts: `Solver.cost` of an adaptive solver."""


class Evaluation(NamedTuple):
    """What is known of F at a point."""

    value: Array
    """F(x), shape []; infinite where y(x) was not found."""
    gradient: PyTree
    """Of F, shaped like x; 0 there."""
    y: PyTree
    """y(x); the warm start there."""
    v: PyTree
    """The adjoint, likewise."""
    constraints: ConstraintGradients | None
    """The upper constraints and their gradients, where the problem has some; 0 where y(x) was not found."""
    good: Array
    """Whether y(x) was found, and all of this is finite, shape []."""


def evaluate(problem: BilevelProblem, x: PyTree, y: PyTree, v: PyTree, what: str) -> Evaluation:
    """F at x on all of the data, from the warm starts y and v; `what` asks, for errors."""
    method = lower.choose(problem, y, None, what)
    found = with_constraints(problem, x, y, method, Adjoint(v=v, estimate=False))
    rows = None if found.constraints is None else (found.constraints.values, found.constraints.jacobian)
    parts = found.value, found.gradient, found.y, found.v, rows
    good = solved(found.status) & jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(parts)]).all()
    keep = lambda new, old: optax.tree.where(good, new, old)  # noqa: E731
    nothing = optax.tree.zeros_like((found.gradient, found.constraints))
    gradient, constraints = keep((found.gradient, found.constraints), nothing)
    value = jnp.where(good, found.value, jnp.inf)
    return Evaluation(value, gradient, keep(found.y, y), keep(found.v, v), constraints, good)


def refuse_unsolvable(solver: Any, problem: BilevelProblem) -> str | None:
    """Why a method that evaluates F cannot take this problem, or None."""
    reason = lower.unsolvable(problem)
    return None if reason is None else f"{type(solver).__name__} solves the lower level at every point: {reason}."
