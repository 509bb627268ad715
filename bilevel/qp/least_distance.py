"""Least-distance programs: the projection on a polyhedron, exact and with static shapes.

    min |d|^2/2  with  A d <= slack.

The dual active-set method of Goldfarb and Idnani with the identity as Hessian, which starts from the unconstrained
minimum d = 0 and an empty active set, and repeats

1. choose the most violated row p, of normal n_p; where none is violated, d is the answer;
2a. find the directions: z, the part of n_p orthogonal to the active normals N, and r = N^+ n_p, how the multipliers of
    the active rows fall while that of p rises;
2b. find the step length t = min(t_1, t_2): t_1 brings the first multiplier of an active row to zero, t_2 brings row p
    to its bound and is infinite where z = 0;
2c. step: d <- d - t z, u <- u - t r, u_p <- u_p + t. Where t is infinite the rows contradict each other. Where t = t_2
    row p joins the active rows; else the blocking row leaves, and 2a is done again for the same p.

Each row taken in lengthens d, so that no active set comes twice. d and u are computed afresh, by QR, for every new
active set, so that rounding errors do not add up.

Reference: Goldfarb, Idnani. A numerically stable dual method for solving strictly convex quadratic programs.
Mathematical Programming 27, 1983, section 3.
"""

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import solve_triangular

from bilevel.backend.order import after
from bilevel.backend.tree import norm, row_norms

_SEARCHING, _SOLVED, _EMPTY = range(3)
_FREE = -1  # no row, in a slot or as p


class Nearest(NamedTuple):
    """The shortest d, or why there is none."""

    d: Array
    """[n], NaN where there is none."""
    active: Array
    """[rows], an independent set of rows that holds d."""
    multipliers: Array
    """[rows], u >= 0 with d = -A'u; where rows contradict each other, u >= 0 with A'u = 0 and slack'u < 0."""
    empty: Array
    """[], whether rows were found to contradict each other."""


class _Program(NamedTuple):
    """G d <= h with rows of length one, in a unit of length in which d is not short: one tolerance serves all rows."""

    G: Array
    """[rows, n]"""
    h: Array
    """[rows]"""
    allowance: Array
    """[rows], error that h carries."""
    scale: Array
    """[], the unit: the largest violation at d = 0, which |d| exceeds."""
    length: Array
    """[rows], of the rows of A; one where that is zero."""


class _Search(NamedTuple):
    """Carry: the active rows stand in n slots, since no more are independent."""

    d: Array
    """[n]"""
    slots: Array
    """[n], the active rows' numbers, _FREE where there is none."""
    u: Array
    """[n], the multipliers of the rows in the slots."""
    p: Array
    """[], the row that is coming in; _FREE before one is chosen."""
    u_p: Array
    """[], its multiplier."""
    count: Array
    status: Array


class _Direction(NamedTuple):
    """Where row p leads."""

    z: Array
    """[n], the part of its normal that is orthogonal to the active ones."""
    r: Array
    """[n], how the multipliers in the slots fall while its own rises."""
    independent: Array
    """[], whether z is more than rounding error."""


class _Active(NamedTuple):
    """The active rows' normals N = Q R, [n, n]: columns of free slots are zero in Q, and units in R."""

    Q: Array
    R: Array
    used: Array
    """[n], the slots that hold a row."""

    def coefficients(self, b: Array) -> Array:
        """R^-1 b [n]: the vector Q b in terms of the active normals."""
        return solve_triangular(self.R, b)


def least_distance(A: Array, slack: Array, noise: Array | None = None) -> Array:
    """The shortest d with A d <= slack, or NaN where there is none. Shapes: A [rows, n], slack [rows] -> [n]."""
    return nearest(A, slack, noise).d


def nearest(A: Array, slack: Array, noise: Array | None = None, skip: Array | bool = False) -> Nearest:
    """`least_distance` with the active rows. Static shapes: jit, vmap.

    A row counts as violated beyond rounding and `noise` [rows], the error that slack already carries, both propagated
    through the active rows. A set whose nearest point is farther than eps^(-2/3) times the largest violation counts as
    empty. Missing rows have infinite slack. With `skip` nothing is computed.
    """
    rows, n = A.shape
    chex.assert_shape(slack, (rows,))
    if rows == 0 or n == 0:
        return Nearest(jnp.zeros(n, A.dtype), jnp.zeros(rows, bool), jnp.zeros(rows, A.dtype), jnp.array(False))
    program = _scaled(A, slack, noise)
    nothing = jnp.zeros(n, A.dtype)
    begin = _Search(
        d=nothing,
        slots=jnp.full(n, _FREE),
        u=nothing,
        p=jnp.array(_FREE),
        u_p=jnp.zeros((), A.dtype),
        count=jnp.array(0),
        status=jnp.where(skip, _SOLVED, _SEARCHING),
    )
    end = jax.lax.while_loop(
        lambda c: (c.status == _SEARCHING) & (c.count < 10 * (rows + n)), partial(_step, program), begin
    )
    solved, empty = end.status == _SOLVED, end.status == _EMPTY
    chosen = end.slots[:, None] == jnp.arange(rows)[None, :]
    weights = jnp.sum(jnp.where(chosen & (solved | empty), end.u[:, None], 0), axis=0)
    weights = weights + jnp.where(empty & (jnp.arange(rows) == end.p), 1, 0)
    return Nearest(
        d=jnp.where(solved, program.scale * end.d, jnp.nan),
        active=jnp.any(chosen & solved, axis=0),
        multipliers=weights * program.scale / program.length,
        empty=empty,
    )


def _scaled(A: Array, slack: Array, noise: Array | None) -> _Program:
    eps = float(jnp.finfo(A.dtype).eps)
    length = row_norms(A)
    length = jnp.where(length > 0, length, 1)
    G, h = A / length[:, None], slack / length
    scale = jnp.max(-h)
    scale = jnp.where(scale > 0, scale, 1)
    h = h / scale
    allowance = 10 * eps * A.shape[1] * jnp.abs(h) + (0 if noise is None else noise / length / scale)
    return _Program(G, h, allowance, scale, length)


def _step(program: _Program, c: _Search) -> _Search:
    """Steps 1 to 2c of the method, for a new row p or once more for the last one."""
    active = _factored(program, c.slots)
    fresh = c.p < 0
    d, u = _exact_pair(program, c, active)
    d, u = jnp.where(fresh, d, c.d), jnp.where(fresh, u, c.u)
    size = norm(d)
    excess = _violations(program, c.slots, active, d, size, u)
    p, u_p = jnp.where(fresh, jnp.argmax(excess), c.p), jnp.where(fresh, 0, c.u_p)
    solved = fresh & (excess[p] <= 0)

    way = _direction(program, active, p)
    t, joins, leaving = _length(program, d, u, p, way)
    empty = ~solved & (~jnp.isfinite(t) | (size > float(jnp.finfo(d.dtype).eps) ** (-2 / 3)))
    t = jnp.where(solved | empty, 0, t)
    d = d - jnp.where(way.independent, t, 0) * way.z
    u, u_p = jnp.maximum(u - t * way.r, 0), u_p + t
    slot = jnp.where(joins, jnp.argmin(c.slots), leaving)  # a free slot holds the least number
    going = ~(solved | empty)
    return _Search(
        d=d,
        slots=jnp.where(going, c.slots.at[slot].set(jnp.where(joins, p, _FREE)), c.slots),
        u=jnp.where(going, u.at[slot].set(jnp.where(joins, u_p, 0)), jnp.where(empty, jnp.maximum(-way.r, 0), u)),
        p=jnp.where(joins & going, _FREE, p),
        u_p=u_p,
        count=c.count + 1,
        status=jnp.where(solved, _SOLVED, jnp.where(empty, _EMPTY, _SEARCHING)),
    )


def _factored(program: _Program, slots: Array) -> _Active:
    """The QR factors of the active normals."""
    used, n = slots >= 0, len(slots)
    N = jnp.where(used[:, None], program.G[slots], 0)
    Q, R = jnp.linalg.qr(jnp.concatenate([N.T, jnp.diag(jnp.where(used, 0, 1).astype(N.dtype))]))
    return _Active(Q[:n], after(R, Q[0, 0]), used)


def _exact_pair(program: _Program, c: _Search, active: _Active) -> tuple[Array, Array]:
    """(d, u) [n]: the shortest d that holds the active rows, N'd = h, and its multipliers, d = -N u."""
    w = solve_triangular(active.R, jnp.where(active.used, program.h[c.slots], 0), trans=1)
    signs = -active.coefficients(w)
    return active.Q @ w, jnp.where(active.used, jnp.maximum(signs, 0), 0)


def _violations(program: _Program, slots: Array, active: _Active, d: Array, size: Array, u: Array) -> Array:
    """By how much each row [rows] is violated beyond rounding; minus infinity for the active rows.

    Row i = sum of r_ij times active row j, plus an orthogonal part: errors of active rows reach it through r_ij.
    """
    G, eps = program.G, float(jnp.finfo(d.dtype).eps)
    rows, n = G.shape
    reach = jnp.abs(active.coefficients(after((G @ active.Q).T, u[:1, None])))
    error = program.allowance + 10 * eps * n * size
    beyond = G @ d - program.h - error - jnp.where(active.used, error[slots], 0) @ reach
    inside = jnp.any(slots[:, None] == jnp.arange(rows)[None, :], axis=0)
    return jnp.where(inside, -jnp.inf, beyond)


def _direction(program: _Program, active: _Active, p: Array) -> _Direction:
    """Step 2a."""
    row, n, eps = program.G[p], program.G.shape[1], float(jnp.finfo(program.G.dtype).eps)
    coordinates = active.Q.T @ row
    z = row - active.Q @ coordinates
    z = z - active.Q @ (active.Q.T @ z)
    independent = (norm(z) > 100 * eps * n) & ~jnp.all(active.used)
    return _Direction(z, jnp.where(active.used, active.coefficients(coordinates), 0), independent)


def _length(program: _Program, d: Array, u: Array, p: Array, way: _Direction) -> tuple[Array, Array, Array]:
    """(t, whether row p joins, the slot whose row leaves if it does not): step 2b."""
    square = jnp.where(way.independent, way.z @ way.z, 1)
    full = jnp.where(way.independent, (program.G[p] @ d - program.h[p]) / square, jnp.inf)
    ratios = jnp.where(way.r > 0, u / jnp.where(way.r > 0, way.r, 1), jnp.inf)
    leaving = jnp.argmin(ratios)
    return jnp.minimum(full, ratios[leaving]), full <= ratios[leaving], leaving
