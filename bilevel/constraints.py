"""The constraints of a lower level as two-sided rows lo <= C y <= hi on the raveled y."""

import dataclasses
from typing import Any

import chex
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel.problem import BilevelProblem, LinearCoupling, Minimize, SmoothCoupling
from bilevel.qp.active_set import Rows
from bilevel.qp.projection import Projection, Region
from bilevel.sets import Product, Set

PyTree = Any


def refuse(problem: BilevelProblem) -> str | None:
    """Why the constrained lower level is not of the kind solved here, or None."""
    if not isinstance(problem.lower, Minimize):
        return f"a constrained lower level must be Minimize(g); got {type(problem.lower).__name__}"
    if isinstance(problem.coupling, SmoothCoupling):
        return "SmoothCoupling is not supported here; write linear constraints as LinearCoupling"
    return _refuse_set(problem.y_set)


def _refuse_set(y_set: Set) -> str | None:
    wrong = next((type(one).__name__ for one in y_set.simple() if not one.polyhedral), None)
    return wrong and f"y_set must be Reals, Box, Simplex, Polyhedron or a Product of them; got {wrong}"


def rows(problem: BilevelProblem, x: PyTree, y: PyTree) -> Rows:
    """The constraints of the lower level at x; y gives shapes and dtype only."""
    (flat_x, _), (flat_y, _) = ravel_pytree(x), ravel_pytree(y)
    dtype, empty = flat_y.dtype, jnp.zeros((0, flat_x.size), flat_y.dtype)
    blocks, by_x = [], [empty]
    coupling = problem.coupling
    if isinstance(coupling, LinearCoupling):
        given = coupling.raveled(x, y)
        for A, B, b, equal in ((given.A_eq, given.B_eq, given.b_eq, True), (given.A, given.B, given.b, False)):
            if A.shape[0]:
                A, B, b = (jnp.asarray(part, dtype) for part in (A, B, b))
                bound = b - B @ jnp.asarray(flat_x, dtype)
                blocks.append((A, bound if equal else jnp.full_like(bound, -jnp.inf), bound))
                by_x.append(B)
    fixed = problem.y_set.rows(y)
    by_x += [jnp.zeros((C.shape[0], flat_x.size), dtype) for C, _, _ in fixed]
    nothing = jnp.zeros((0, flat_y.size), dtype), jnp.zeros(0, dtype), jnp.zeros(0, dtype)
    if not blocks and not fixed:  # one row that never binds, so that there always is one
        never = jnp.full(1, jnp.inf, dtype)
        return Rows(jnp.zeros((1, flat_y.size), dtype), -never, never, jnp.zeros((1, flat_x.size), dtype))
    C, lo, hi = (jnp.concatenate(parts) for parts in zip(nothing, *blocks, *fixed, strict=True))
    B = jnp.concatenate(by_x)
    chex.assert_shape([C, B, lo, hi], [(lo.size, flat_y.size), (lo.size, flat_x.size), (lo.size,), (lo.size,)])
    return Rows(C, lo, hi, B)


def project_on(limits: Rows, u: Array, soft: Array | None = None, held: Array | None = None) -> Projection:
    """The point of lo <= C y <= hi nearest to u [n]. soft: rows [m] that give way where the set is empty; held: rows
    [m] that are equalities, 1 at hi and -1 at lo, where the set has such points.
    """
    return Region.of(limits).project(u, soft, held)


def joint_rows(problem: BilevelProblem, x: PyTree, y: PyTree) -> Rows:
    """The constraints of X, Y and the coupling together, on the raveled (x, y); x and y give shapes and dtype only.

    For sets that `refuse_joint` does not refuse.
    """
    flat, coupling = ravel_pytree((x, y))[0], problem.coupling
    if isinstance(coupling, LinearCoupling):
        given = coupling.raveled(x, y)

        def both(A: Any, B: Any, b: Any) -> tuple:
            A, B, b = (jnp.asarray(part, flat.dtype) for part in (A, B, b))
            return jnp.concatenate([B, A], axis=1), jnp.zeros((len(b), 0), flat.dtype), b

        unequal, equal = (given.A, given.B, given.b), (given.A_eq, given.B_eq, given.b_eq)
        coupling = LinearCoupling(*both(*unequal), *both(*equal))
    sets = Product((problem.x_set, problem.y_set))
    return rows(dataclasses.replace(problem, coupling=coupling, y_set=sets), jnp.zeros(0, flat.dtype), (x, y))


def refuse_joint(problem: BilevelProblem) -> str | None:
    """Why X, Y and the coupling together are not of the kind that `joint_rows` describes, or None."""
    reason = _refuse_set(problem.x_set)
    return refuse(problem) if reason is None else reason.replace("y_set", "x_set")
