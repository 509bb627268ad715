"""The leader's domain {x in X : Y(x) is not empty}, where the follower's constraints move with x."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import constraints
from bilevel.problem import BilevelProblem, LinearCoupling

PyTree = Any
MOST = 200  # rows of X, Y and the coupling beyond which nothing is moved into the domain


def project_upper(problem: BilevelProblem, x: PyTree, y: PyTree) -> PyTree:
    """The point of X nearest to x, and where Y is empty there the nearest point of the leader's domain: outside of it F
    has no value, as if it were infinite.

    The domain is known, as a projection of the polyhedron of all (x, y) that are feasible, where X, Y and the coupling
    are described by at most `MOST` rows. What is moved ends a little inside of it, y in the metric makes no difference.
    y: anything shaped like the problem's y, close to Y(x) at best.
    """
    projected = problem.x_set.project(x)
    if not isinstance(problem.coupling, LinearCoupling) or constraints.refuse_joint(problem) is not None:
        return projected
    here = constraints.rows(problem, projected, y)
    if len(here.lo) > MOST:
        return projected
    empty = constraints.project_on(here, ravel_pytree(y)[0]).empty

    def nearest() -> PyTree:
        flat, unravel = ravel_pytree((x, y))
        return problem.x_set.project(unravel(_nearest(problem, x, y, flat))[0])

    return lax.cond(empty, nearest, lambda: projected)


def _nearest(problem: BilevelProblem, x: PyTree, y: PyTree, flat: Array) -> Array:
    """The (x, y) on all rows, a little inside of the coupling's, whose x is nearest to that of `flat` [dim], which is
    (x, y) raveled; `flat` itself where there is none.

    By projections in |x|^2 + |s y|^2 with a small s, each from the last one's y, so that y draws x less and less.
    """
    joint, coupling = constraints.joint_rows(problem, x, y), problem.coupling
    assert isinstance(coupling, LinearCoupling)
    eps, num = float(jnp.finfo(flat.dtype).eps), coupling.num_inequalities + coupling.num_equalities
    coupled = (jnp.arange(len(joint.lo)) < num) & (joint.lo < joint.hi)
    inside = jnp.where(coupled, 1e3 * eps * (jnp.linalg.norm(joint.C, axis=1) * (1 + jnp.max(jnp.abs(flat)))), 0)
    of_x = jnp.arange(flat.size) < ravel_pytree(x)[0].size
    unit = jnp.where(of_x, 1, eps ** (1 / 6)).astype(flat.dtype)
    rows = joint._replace(C=joint.C / unit[None], hi=joint.hi - inside)

    def step(_: Array, at: Array) -> Array:
        found = constraints.project_on(rows, unit * jnp.where(of_x, flat, at))
        return jnp.where(found.empty | ~jnp.isfinite(found.y).all(), at, found.y / unit)

    return lax.fori_loop(0, 3, step, flat)
