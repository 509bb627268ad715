"""Least-distance programs: the projection on a polyhedron, exact and with static shapes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

_SEARCHING, _SOLVED, _EMPTY = range(3)


class Nearest(NamedTuple):
    """d [n], NaN where there is none; active [rows], an independent set that holds d; multipliers [rows], d = -A'u;
    empty [], whether rows were found to contradict each other.
    """

    d: Array
    active: Array
    multipliers: Array
    empty: Array


def least_distance(A: Array, slack: Array, noise: Array | None = None) -> Array:
    """The shortest d with A d <= slack, or NaN where there is none. Shapes: A [rows, n], slack [rows] -> [n]."""
    return nearest(A, slack, noise).d


def nearest(A: Array, slack: Array, noise: Array | None = None, skip: Array | bool = False) -> Nearest:
    """`least_distance` with the active rows. With `skip` nothing is computed; missing rows have infinite slack.

    The dual active-set method of Goldfarb and Idnani (A numerically stable dual method for solving strictly convex
    quadratic programs, Mathematical Programming 27, 1983) with the identity as Hessian: from d = 0 take in the most
    violated row p, moving along its component z orthogonal to the active rows; active rows whose multiplier reaches
    zero on the way leave; where z = 0 and none can leave, the rows contradict each other. Each row taken in lengthens
    d, so that no active set comes twice. d and the multipliers u are computed afresh, by QR, for every new active set.

    A row counts as violated beyond rounding and `noise` [rows], the error that slack already carries, both propagated
    through the active rows. A set whose nearest point is farther than eps^(-2/3) times the largest violation counts as
    empty. Static shapes: jit, vmap.
    """
    rows, n = A.shape
    if rows == 0 or n == 0:
        return Nearest(jnp.zeros(n, A.dtype), jnp.zeros(rows, bool), jnp.zeros(rows, A.dtype), jnp.array(False))
    eps = float(jnp.finfo(A.dtype).eps)
    length = jnp.linalg.norm(A, axis=1)
    safe = jnp.where(length > 0, length, 1)  # rows of norm one: one tolerance for all
    G, h = A / safe[:, None], slack / safe
    scale = jnp.max(-h)  # |d| >= scale: solve for d/scale
    scale = jnp.where(scale > 0, scale, 1)
    h = h / scale
    allowance = 10 * eps * n * jnp.abs(h) + (0 if noise is None else noise / safe / scale)

    # Slots: W [n] holds the active rows, -1 where free; u [n] their multipliers; p is the row coming in, -1 before one
    # is chosen, and u_p its multiplier.
    def go_on(carry: tuple) -> Array:
        return (carry[-1] == _SEARCHING) & (carry[-2] < 10 * (rows + n))

    def body(carry: tuple) -> tuple:
        d, W, u, p, u_p, count, _ = carry
        used, fresh = W >= 0, p < 0
        N = jnp.where(used[:, None], G[W], 0)
        Q, R = jnp.linalg.qr(jnp.concatenate([N.T, jnp.diag(jnp.where(used, 0, 1).astype(A.dtype))]))
        R = R + 0 * Q[0, 0]  # one chain of LAPACK calls: XLA's thread pool can deadlock on two batched ones at a time
        Q = Q[:n]  # columns of used slots span the active rows, the others are zero
        w = jax.scipy.linalg.solve_triangular(R, jnp.where(used, h[W], 0), trans=1)
        d = jnp.where(fresh, Q @ w, d)
        signs = -jax.scipy.linalg.solve_triangular(R, w)
        u = jnp.where(fresh, jnp.where(used, jnp.maximum(signs, 0), 0), u)
        size = jnp.linalg.norm(d)
        active = jnp.any(W[:, None] == jnp.arange(rows)[None, :], axis=0)
        # Row i = sum of r_ij times active row j, plus an orthogonal part: errors of active rows reach it through r_ij.
        reach = jnp.abs(jax.scipy.linalg.solve_triangular(R, (G @ Q).T + 0 * signs[:1, None]))
        error = allowance + 10 * eps * n * size
        excess = jnp.where(active, -jnp.inf, G @ d - h - error - jnp.where(used, error[W], 0) @ reach)
        p = jnp.where(fresh, jnp.argmax(excess), p)
        u_p = jnp.where(fresh, 0, u_p)
        solved = fresh & (excess[p] <= 0)

        coordinates = Q.T @ G[p]
        z = G[p] - Q @ coordinates
        z = z - Q @ (Q.T @ z)
        independent = (jnp.linalg.norm(z) > 100 * eps * n) & ~jnp.all(used)
        r = jnp.where(used, jax.scipy.linalg.solve_triangular(R, coordinates), 0)
        full = jnp.where(independent, (G[p] @ d - h[p]) / jnp.where(independent, z @ z, 1), jnp.inf)
        ratios = jnp.where(r > 0, u / jnp.where(r > 0, r, 1), jnp.inf)
        leaving = jnp.argmin(ratios)
        t, joins = jnp.minimum(full, ratios[leaving]), full <= ratios[leaving]
        empty = ~jnp.isfinite(t) | (size > eps ** (-2 / 3))
        t = jnp.where(solved | empty, 0, t)
        d = d - jnp.where(independent, t, 0) * z
        u, u_p = jnp.maximum(u - t * r, 0), u_p + t
        slot = jnp.where(joins, jnp.argmin(W), leaving)  # a free slot holds -1
        going = ~(solved | empty)
        W = jnp.where(going, W.at[slot].set(jnp.where(joins, p, -1)), W)
        u = jnp.where(going, u.at[slot].set(jnp.where(joins, u_p, 0)), u)
        status = jnp.where(solved, _SOLVED, jnp.where(empty, _EMPTY, _SEARCHING))
        return d, W, u, jnp.where(joins, -1, p), u_p, count + 1, status

    nothing, nobody = jnp.zeros(n, A.dtype), jnp.array(-1)
    begin = jnp.where(skip, _SOLVED, _SEARCHING)
    start = (nothing, jnp.full(n, -1), nothing, nobody, jnp.zeros((), A.dtype), jnp.array(0), begin)
    d, W, u, *_, status = jax.lax.while_loop(go_on, body, start)
    chosen = (W[:, None] == jnp.arange(rows)[None, :]) & (status == _SOLVED)
    multipliers = jnp.sum(jnp.where(chosen, u[:, None], 0), axis=0) * scale / safe
    return Nearest(
        jnp.where(status == _SOLVED, scale * d, jnp.nan), jnp.any(chosen, axis=0), multipliers, status == _EMPTY
    )
