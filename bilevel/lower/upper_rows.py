"""The hypergradient of f and those of the upper constraints' rows, by one solution of the lower level."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from bilevel import oracles
from bilevel.lower.method import Adjoint, LowerMethod
from bilevel.problem import BilevelProblem
from bilevel.record import ConstraintGradients, Hypergradient, solved

PyTree = Any


def with_constraints(
    problem: BilevelProblem, x: PyTree, y: PyTree, chosen: LowerMethod, adjoint: Adjoint
) -> Hypergradient:
    """The hypergradient of f and, where there are upper constraints, those of each row of (G, H): of the objectives
    w_0 f + (w_1, ...)'(G, H), w a unit vector, above the same lower level, which is solved once.
    """
    f, constraints = problem.upper, problem.upper_constraints
    if constraints is None:
        return chosen.hypergradient(problem, x, y, adjoint)
    rows = jnp.concatenate(constraints.values(x, y))

    def weighted(w: Array, adjoint: Adjoint) -> Hypergradient:
        def upper(x: PyTree, y: PyTree, batch: PyTree) -> Array:
            return w[0] * f(x, y, batch) + w[1:] @ jnp.concatenate(constraints.values(x, y))

        v = None if adjoint.v is None else optax.tree.scale(w[0], adjoint.v)  # of f; rows have none yet
        below = dataclasses.replace(problem, upper=upper, upper_constraints=None)
        return chosen.hypergradient(below, x, y, dataclasses.replace(adjoint, v=v))

    unit = jnp.eye(1 + rows.size, dtype=rows.dtype)
    if adjoint.constants is None:
        every = oracles.batched(lambda w: weighted(w, adjoint))(unit)
        of_f, of_rows = (jax.tree.map(lambda leaf, at=at: leaf[at], every) for at in (0, slice(1, None)))
    else:  # these are of f
        of_f = weighted(unit[0], adjoint)
        of_rows = oracles.batched(lambda w: weighted(w, dataclasses.replace(adjoint, constants=None)))(unit[1:])
    bad = ~solved(of_rows.status)
    status = jnp.where(jnp.any(bad) & solved(of_f.status), of_rows.status[jnp.argmax(bad)], of_f.status)
    found = ConstraintGradients(of_rows.value, of_rows.gradient, of_rows.error_bound)
    return dataclasses.replace(of_f, status=status, constraints=found)
