"""Strictly convex quadratic programs with two-sided rows, by a primal-dual active-set method with a finite fallback.

    min over p of  R'p + p'H p/2   with  lo <= C (y + p) <= hi,    H = L L',  W = D C L'^-1,  S = W W',

D diagonal, so that rows are measured in the norm of H^-1: S has a unit diagonal. From multipliers lam, scaled by D^-1,
R = gradient + C'D lam, and an active set a, the model's step is

    S_aa dlam_a = D (C (y + p0) - bound)_a,    p = p0 - H^-1 C'D dlam,    p0 = -H^-1 R,    dlam_i = -lam_i outside of a.

The active set that the search starts from is tried first, and where it is the right one nothing else is done: one pass,
without a factorization where its inverse is given. Else the search for a is a semismooth Newton method: solve for the
rows in a, take in the rows that are violated, drop those with a multiplier of the wrong sign, all at once. It takes a
few passes. Where the number of wrong rows has not fallen for three passes, one row is changed at a time until it has
(Kostreva's rule, finite for independent rows). Where rows are dependent, or the search is long, the dual method of
Goldfarb and Idnani (`least_distance`) takes over, in z = L'p: it is finite, and finds out where the rows contradict
each other.

Calls of LAPACK form one chain: XLA's thread pool can deadlock on two batched ones that wait for nothing of each other
(jaxlib 0.10 on two cores). So `Factor.down` waits for W.

Reference: Hintermueller, Ito, Kunisch. The primal-dual active set strategy as a semismooth Newton method. SIAM Journal
on Optimization 13, 2002. Kostreva. Block pivot methods for solving the complementarity problem. Linear Algebra and its
Applications 21, 1978.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.scipy.linalg import solve_triangular

from bilevel.qp.least_distance import nearest


class Rows(NamedTuple):
    """lo <= C y <= hi at one x, y raveled: C [m, n], lo, hi [m]; B [m, dim x], minus the derivative of the bounds."""

    C: Array
    lo: Array
    hi: Array
    B: Array


class Factor(NamedTuple):
    """Of H and the rows: L [n, n], L L' = H; X = L^-1 where it was formed, which pays when the factor is used in many
    calls, else None; W [m, n] = diag(d) C L'^-1; d [m], one over the norms of the rows of C L'^-1, so that those of W
    have length one; S [m, m] = W W'; length [m], d_i |C_i|; trace [] of H.
    """

    L: Array
    X: Array | None
    W: Array
    S: Array
    d: Array
    length: Array
    trace: Array

    def down(self, r: Array) -> Array:
        """L^-1 r, once W is there."""
        return solve_triangular(self.L, r + 0 * self.d[0], lower=True) if self.X is None else self.X @ r

    def up(self, r: Array) -> Array:
        """L'^-1 r."""
        return solve_triangular(self.L, r, lower=True, trans=1) if self.X is None else r @ self.X

    def for_many_calls(self) -> "Factor":
        """With X."""
        eye = jnp.broadcast_to(jnp.eye(self.L.shape[-1], dtype=self.L.dtype), self.L.shape)
        return self._replace(X=solve_triangular(self.L, eye, lower=True))


def factorize(H: Array, C: Array) -> Factor:
    """The factors of H [n, n] and the rows C [m, n]; NaN where H is not positive definite."""
    return with_rows(lax.linalg.cholesky(H, symmetrize_input=False), jnp.sum(jnp.diagonal(H)), C)


def with_rows(L: Array, trace: Array, C: Array) -> Factor:
    """The factors of H = L L', with its trace, and the rows C [m, n]."""
    W = lax.linalg.triangular_solve(L, C, lower=True, transpose_a=True)
    squares = jnp.sum(W**2, axis=1)
    d = 1 / jnp.sqrt(jnp.where(squares > 0, squares, 1))
    W = d[:, None] * W
    return Factor(L, None, W, W @ W.T, d, d * jnp.linalg.norm(C, axis=1), trace)


class Model(NamedTuple):
    """Solution of the quadratic model: step p [n], multipliers, active set, its inverse, how the search ended."""

    p: Array
    multipliers: Array
    active: Array
    inverse: Array  # [m, m], `masked_inverse` of S
    empty: Array
    unsolved: Array
    dependent: Array
    room: Array  # distance of each row to a change, rows in the norm of H^-1
    noise: Array  # rounding in it


def masked_inverse(S: Array, a: Array, ridge: Array | float = 0.0) -> tuple[Array, Array]:
    """(Y [m, m], whose Y'Y is the inverse of S + ridge I on the rows in a and zero elsewhere; whether these rows are
    independent).
    """
    inside, m = a != 0, len(a)
    unit = np.eye(m, dtype=S.dtype)  # a literal: XLA would build it anew before every loop
    K = jnp.where(inside[:, None] & inside[None, :], S, 0) + unit * jnp.where(inside, ridge, 1).astype(S.dtype)[None]
    L = lax.linalg.cholesky(K, symmetrize_input=False)
    Y = solve_triangular(L, unit * inside.astype(S.dtype)[None], lower=True)
    smallest = jnp.min(jnp.diagonal(L), initial=1.0) ** 2
    return Y, smallest > 1e3 * float(jnp.finfo(S.dtype).eps) * max(m, 1)


def solve_model(
    factor: Factor, limits: Rows, y: Array, z: Array, lam: Array | None, a: Array, max_changes: int,
    inverse: Array | None = None,
) -> Model:  # fmt: skip
    """The quadratic model's solution from the active set a; z = L^-1 (grad_y g + C' lam), lam = 0 where it is None.

    inverse: `masked_inverse` of a, if it is at hand.
    """
    _, _, W, S, d, length, _ = factor
    eps, (m, n) = float(jnp.finfo(y.dtype).eps), limits.C.shape
    z0 = -z
    at = limits.C @ y
    lo, hi = d * (limits.lo - at), d * (limits.hi - at)
    base = jnp.zeros_like(d) if lam is None else lam / d
    fixed = limits.lo == limits.hi
    reach = W @ z0
    finite = lambda end: jnp.where(jnp.isfinite(end), jnp.abs(end), 0)  # noqa: E731
    size = length * jnp.linalg.norm(y) + d * jnp.maximum(finite(limits.lo), finite(limits.hi))
    noise = 10 * eps * (size + (n + m) ** 0.5 * jnp.linalg.norm(z0))

    def step_on(a: Array, inverse: Array) -> tuple[Array, Array]:
        """(change of lam, C p), scaled."""
        out = jnp.where(a != 0, 0, -base)
        moved = 0 if lam is None else S @ out
        rhs = jnp.where(a != 0, reach - jnp.where(a > 0, hi, lo) - moved, 0)
        change = (inverse @ rhs) @ inverse + out
        return change, reach - S @ change

    def wrong(a: Array, change: Array, value: Array) -> Array:
        """What each row should be instead: its violated side, 0 for a multiplier of the wrong sign, else a."""
        drop = (a * (base + change) < -noise) & ~fixed
        side = jnp.where(value > hi + noise, 1, jnp.where(value < lo - noise, -1, 0)).astype(a.dtype)
        return jnp.where(a != 0, jnp.where(drop, 0, a), side)

    # Phases: exact; with a ridge once rows turn out dependent, which makes every subset independent; a last exact pass.
    exact, ridged, last_pass = range(3)

    def search(c: tuple) -> tuple:
        a, _, _, _, passes, best, patience, phase, _, _ = c
        inverse, independent = masked_inverse(S, a, jnp.where(phase == ridged, eps**0.5, 0))
        change, value = step_on(a, inverse)
        better = wrong(a, change, value)
        off = better != a
        count = jnp.sum(off)
        patience = jnp.where(count < best, 3, patience - 1)
        last = m - 1 - jnp.argmax(off[::-1])
        alone = (patience < 0) & (jnp.arange(m) != last)
        good = independent & jnp.isfinite(jnp.sum(change))
        settled = good & (count == 0)
        done = settled & (phase != ridged)
        begin_ridge, end_ridge = ~good & (phase == exact), settled & (phase == ridged)
        failed = (~good & ~begin_ridge) | (passes >= max_changes) | (~settled & (phase == last_pass))
        a = jnp.where(done | failed | begin_ridge | alone, a, better)
        best = jnp.where(begin_ridge, m + 1, jnp.minimum(best, count))
        phase = jnp.where(begin_ridge, ridged, jnp.where(end_ridge, last_pass, phase))
        return a, change, value, inverse, passes + 1, best, patience, phase, done, failed & ~done

    def dual(c: tuple) -> tuple:
        """The dual method in z = L'p, from the unconstrained step."""
        free = reach + S @ base
        slack, allow = jnp.concatenate([hi - free, free - lo]), jnp.concatenate([noise, noise])
        # `skip` is never true here, but ties the inner loop to the carry: XLA would hoist it and run it always.
        exact = nearest(jnp.concatenate([W, -W]), slack, allow, skip=~c[-1])
        a = exact.active[:m].astype(a0.dtype) - exact.active[m:].astype(a0.dtype)
        inverse, independent = masked_inverse(S, a)
        return a, *step_on(a, inverse), inverse, ~independent, exact.empty, jnp.isnan(exact.d).any(), no

    def find(c: tuple) -> tuple:
        """The search and, where it fails, the dual method: loops of at most one pass, since XLA's conditional would
        copy every array that it sees.
        """
        begin = (*c[:4], jnp.array(0), jnp.array(m + 1), jnp.array(3), jnp.array(exact), no, no)
        *found, failed = lax.while_loop(lambda c: ~(c[-1] | c[-2]), search, begin)
        return lax.while_loop(lambda c: c[-1], dual, (*found[:4], no, no, no, failed))

    no, a0 = jnp.array(False), a
    inverse, independent = masked_inverse(S, a) if inverse is None else (inverse, ~no)
    change, value = step_on(a, inverse)
    better = wrong(a, change, value)
    good = independent & jnp.isfinite(jnp.sum(change))
    again = jnp.any(better != a) | ~good
    a, change, value, inverse, dependent, empty, unsolved, _ = lax.while_loop(
        lambda c: c[-1], find, (jnp.where(good, better, a), change, value, inverse, no, no, no, again)
    )
    total = base + change
    slack = jnp.minimum(hi - value, value - lo)
    room = jnp.where(fixed, jnp.inf, jnp.where(a != 0, jnp.abs(total), slack))
    p = factor.up(z0 - change @ W)
    unsolved = unsolved | ~jnp.isfinite(jnp.sum(p))
    return Model(p, d * total, a, inverse, empty, unsolved, dependent, room, noise)


def kkt_solve(factor: Factor, inverse: Array, active: Array, r: Array, s: Array | None = None) -> tuple[Array, Array]:
    """(u [n], v [m]) with H u + C_a' v_a = r, C_a u = s_a, and v_i = s_i on inactive rows; s = 0 where it is None."""
    z = factor.down(r)
    reach = factor.W @ z
    v = (inverse @ (reach if s is None else reach - factor.d * s)) @ inverse
    u = factor.up(z - v @ factor.W)
    return u, factor.d * v if s is None else jnp.where(active != 0, factor.d * v, s)
