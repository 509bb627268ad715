"""Whether F falls anywhere from a kink: F'(x; d) for every feasible d, branch by branch of the active set.

Around a kink x of F the polyhedral lower level has one solution for each set of rows that may be active next to it. On
the branch of rows a, with S the active rows that have a multiplier and W those without one (weakly active), S within a,

    H p + G d + C_a'v = 0,   C_a p = -B_a d,        c_a'd = f_x'd + f_y'p(d)

are linear in d, and the branch is the one along d where p and v have the right signs: in the cone

    K_a = {d : C_i p <= -B_i d for i in W, not in a (at hi),   v_i >= 0 for i in W and a (at hi)}.

These cones cover all d along which the lower level stays feasible, and F'(x; d) = c_a'd on K_a. With the cone T of
directions into X, the rate of the steepest descent is therefore

    max over unit d in T of -F'(x; d) = max over a of |Proj(-c_a) on K_a and T|,

a least-distance program for each of the 2^|W| branches. It is 0 exactly where x is B-stationary: F'(x; d) >= 0 for
every feasible d. Where active rows depend on each other their multipliers are not unique, and the branches are all
independent sets of active rows that have multipliers of the right sign.

Reference: Scheel, Scholtes. Mathematical programs with complementarity constraints: stationarity, optimality and
sensitivity. Mathematics of Operations Research 25, 2000. Jittorntrum, as in `lower.directional`.
"""

import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.backend.bounded import Flat, bounded_jit
from bilevel.backend.precision import full_precision
from bilevel.lower import ActiveSet, choose, polyhedral
from bilevel.lower.directional import Local, local
from bilevel.lower.polyhedral_gradient import at_solution
from bilevel.problem import BilevelProblem
from bilevel.qp.active_set import kkt_solve, masked_inverse
from bilevel.qp.least_distance import nearest
from bilevel.record import solved

PyTree = Any
MOST = 10  # rows that may be active or not: 2^MOST branches
LARGEST = 200  # unknowns of x beyond which nothing is tested


class Kink(NamedTuple):
    """What is found at a point."""

    descent: float
    """The rate of the steepest descent of F over the unit directions into X, >= 0; 0 where x is B-stationary. NaN where
    nothing was tested.
    """
    branches: int
    """How many sets of rows may be active next to x; 1 where F is smooth, 0 where nothing was tested."""
    reason: str = ""
    """Why nothing was tested."""


class Around(NamedTuple):
    """The lower level around its solution, and which rows may be active next to it."""

    here: Local
    G: Array
    """g_yx, [n, dim x]."""
    sides: Array
    """[m], 1 for rows at or nearest to hi, -1 for those at lo."""
    strong: Array
    """[m], active with a multiplier, and equalities."""
    open: Array
    """[m], rows that may be active or not: weakly active, or no more than `near` from that."""
    dependent: Array
    """[], whether the active rows depend on each other, so that multipliers are not unique."""
    failed: Array
    """[], whether the lower level is not solved."""


@bounded_jit
@full_precision
def _around(problem: BilevelProblem, x: PyTree, y: PyTree, near: Array, settings: ActiveSet) -> Around:
    """What is known of the lower level at x."""
    batch = problem.lower_data.full()
    found = polyhedral.solve(problem, x, y, batch, settings)
    found = at_solution(problem, x, found, batch)
    here = local(problem, x, found)
    limits, flat, unravel = here.limits, *ravel_pytree(x)
    at, fixed = limits.C @ ravel_pytree(found.y)[0], limits.lo == limits.hi
    length = jnp.linalg.norm(limits.C, axis=1)
    to_hi, to_lo, active = jnp.abs(limits.hi - at), jnp.abs(at - limits.lo), found.active != 0
    by_multiplier = jnp.abs(found.multipliers) / here.factor.d**2
    room = jnp.where(active, by_multiplier, jnp.minimum(to_hi, to_lo)) / jnp.where(length > 0, length, 1)
    weak = (found.weak | (room <= near)) & ~fixed & (length > 0)
    sides = jnp.where(active, found.active, jnp.where(to_hi <= to_lo, 1, -1).astype(flat.dtype))
    strong = (fixed | active) & ~weak
    meeting = jnp.where(strong | weak, sides, 0)
    dependent = ~masked_inverse(here.factor.S, meeting)[1]
    along = partial(oracles.cross_forward, problem, x, found.y, batch=batch)
    G = jax.vmap(lambda e: ravel_pytree(along(d=unravel(e)))[0])(jnp.eye(flat.size, dtype=flat.dtype)).T
    return Around(here, G, sides, strong, weak, dependent, ~solved(found.status))


@bounded_jit
@full_precision
def _descents(around: Around, tangent: Array, branches: Array) -> Array:
    """The rate of the steepest descent on each branch [k, m], rows of 1 and 0: which rows are active. NaN where it is
    none. tangent [r, dim x]: T = {d : tangent d <= 0}.
    """
    return jax.lax.map(partial(_descent, around, tangent), branches)


def _descent(around: Around, tangent: Array, inside: Array) -> Array:
    here, factor, limits = around.here, around.here.factor, around.here.limits
    eps = float(jnp.finfo(limits.C.dtype).eps)
    a = jnp.where(inside > 0, around.sides, 0)
    inverse, independent = masked_inverse(factor.S, a)
    u, lam = kkt_solve(factor, inverse, a, -here.grad)  # multipliers on these rows alone; u = 0 where there are any
    size = jnp.max(jnp.abs(lam / factor.d), initial=0)
    wrong = (a * lam / factor.d < -(eps**0.5) * size) & (limits.lo != limits.hi)
    right = ~jnp.any(wrong & (a != 0))
    right &= jnp.linalg.norm(u) <= eps**0.5 * (1 + jnp.linalg.norm(factor.up(factor.down(here.grad))))
    free_sign = around.strong | (around.dependent & (jnp.abs(lam / factor.d) > eps**0.5 * size))

    P, V = jax.vmap(lambda g, b: kkt_solve(factor, inverse, a, -g, -b), in_axes=(1, 1), out_axes=1)(around.G, limits.B)
    c = here.fx + here.fy @ P
    side = around.sides[:, None]
    stay = _cleaned(side * (limits.C @ P + limits.B), jnp.abs(limits.C) @ jnp.abs(P) + jnp.abs(limits.B))
    push = _cleaned(-side * V, jnp.full_like(V, jnp.max(jnp.abs(V))))
    off, on = around.open & (a == 0), (a != 0) & ~free_sign
    cone = jnp.where(on[:, None], push, jnp.where(off[:, None], stay, 0))
    M = jnp.concatenate([cone, tangent])
    found = nearest(M, M @ c, 100 * eps * jnp.linalg.norm(M, axis=1) * jnp.linalg.norm(c))
    exists = independent & (right | ~around.dependent)
    rate = jnp.linalg.norm(found.d - c)
    return jnp.where(exists, jnp.where(jnp.isfinite(rate), rate, jnp.inf), jnp.nan)


def _cleaned(rows: Array, sizes: Array) -> Array:
    """Rows [m, dim x] with those zero that are rounding error against the `sizes` of their terms."""
    eps = float(jnp.finfo(rows.dtype).eps)
    kept = jnp.linalg.norm(rows, axis=1) > 1e3 * eps * jnp.linalg.norm(sizes, axis=1)
    return jnp.where(kept[:, None], rows, 0)


def _tangent(problem: BilevelProblem, x: PyTree, near: float) -> np.ndarray | None:
    """Rows N with T = {d : N d <= 0} the directions into X, or None where X is not polyhedral."""
    flat = np.asarray(ravel_pytree(x)[0])
    if not problem.x_set.polyhedral:
        return None
    blocks = problem.x_set.rows(x)
    if not blocks:
        return np.zeros((1, flat.size), flat.dtype)
    C, lo, hi = (np.concatenate([np.asarray(block[k]) for block in blocks]) for k in range(3))
    at, length = C @ flat, near * (1 + np.linalg.norm(C, axis=1))
    return np.concatenate([C[at >= hi - length], -C[at <= lo + length], np.zeros((1, flat.size), flat.dtype)])


def steepest_descent(problem: BilevelProblem, x: PyTree, y: PyTree, near: float = 0.0) -> Kink:
    """The rate of the steepest descent of F at x over X, also at a kink: by the module's docstring.

    Args:
        problem: with a polyhedral lower level that is solved by `ActiveSet`, and a polyhedral X.
        x: the point.
        y: a warm start of the lower level.
        near: how far, over 1 + |y|, a row may be from weakly active and count as such; rounding error always does.

    Returns:
        the rate and the number of branches; a reason where nothing is tested: another kind of problem, more than `MOST`
        rows that may be active or not, more than `LARGEST` unknowns of x.
    """
    flat = ravel_pytree(x)[0]
    if not problem.constrained_lower or not _polyhedral(problem, y):
        return Kink(np.nan, 0, "the lower level is not solved by an active-set method")
    tangent = _tangent(problem, x, max(near, 10 * float(jnp.finfo(flat.dtype).eps)))
    if tangent is None or flat.size > LARGEST:
        return Kink(np.nan, 0, "X is not polyhedral" if tangent is None else f"more than {LARGEST} unknowns of x")
    size = near * (1 + jnp.linalg.norm(ravel_pytree(y)[0]))
    around = _around(Flat(problem), x, y, size, ActiveSet())  # pyright: ignore[reportArgumentType]
    if around.failed:
        return Kink(np.nan, 0, "the lower level is not solved")
    strong, either = np.asarray(around.strong), np.asarray(around.open)
    if around.dependent:
        fixed = np.asarray(around.here.limits.lo == around.here.limits.hi)
        strong, either = fixed, (strong | either) & ~fixed
    rows = np.flatnonzero(either)
    if len(rows) > MOST:
        return Kink(np.nan, 0, f"{len(rows)} rows may be active or not, more than {MOST}")
    branches = np.repeat(strong[None].astype(flat.dtype), 2 ** len(rows), axis=0)
    branches[:, rows] = list(itertools.product((0, 1), repeat=len(rows)))
    around = around._replace(strong=jnp.asarray(strong), open=jnp.asarray(either))
    rates = np.asarray(_descents(around, jnp.asarray(tangent), jnp.asarray(branches)))
    known = rates[~np.isnan(rates)]
    return Kink(float(known.max()) if known.size else np.nan, int(known.size), "" if known.size else "no branch")


def _polyhedral(problem: BilevelProblem, y: PyTree) -> bool:
    try:
        return isinstance(choose(problem, y), ActiveSet)
    except NotImplementedError:
        return False
