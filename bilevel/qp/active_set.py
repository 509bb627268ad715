"""Strictly convex quadratic programs with two-sided rows, by a primal-dual active-set method with a finite fallback.

    min over p of  R'p + p'H p/2   with  lo <= C (y + p) <= hi.

With H = L L' and z = L'p it is a projection, and it is solved as one, in rows of unit length:

    the z nearest to z0 = -L^-1 R  with  D (lo - C y) <= W z <= D (hi - C y),    W = D C L'^-1,    S = W W',

where the diagonal D makes the diagonal of S one. The gradient R = grad g + C' lam counts multipliers lam already;
in scaled rows they are D^-1 lam. A step on an active set a (1 at the upper bound, -1 at the lower, 0 between) changes
them by dlam:

    S_aa dlam_a = (W z0 - bound - S_ai dlam_i)_a,    dlam_i = -lam_i outside of a,    z = z0 - W' dlam.

1. The active set that the search starts from is tried first. Where it is the right one nothing else is done: one pass,
   without a factorization where its inverse is given.
2. Else a semismooth Newton method searches: solve for the rows in a, take in the rows that are violated, drop those
   with a multiplier of the wrong sign, all at once. It takes a few passes. Where the number of wrong rows has not
   fallen for three passes, one row is changed at a time until it has (Kostreva's rule, finite for independent rows).
3. Where rows are dependent, or the search is long, the dual method of Goldfarb and Idnani (`least_distance`) takes
   over: it is finite, and finds out where the rows contradict each other.

Reference: Hintermueller, Ito, Kunisch. The primal-dual active set strategy as a semismooth Newton method. SIAM Journal
on Optimization 13, 2002. Kostreva. Block pivot methods for solving the complementarity problem. Linear Algebra and its
Applications 21, 1978.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.scipy.linalg import solve_triangular

from bilevel.backend.loops import once_if
from bilevel.backend.order import after
from bilevel.backend.tree import norm, row_norms
from bilevel.qp.least_distance import nearest

MAX_CHANGES = 200  # passes of the search, after which the dual method takes over
PATIENCE = 3  # passes in which the number of wrong rows need not fall
SEARCHED, DUAL, FEWER = range(3)  # attempts with factors of the rows themselves, `_Attempt.count`


class Rows(NamedTuple):
    """lo <= C y <= hi at one x, y raveled: C [m, n], lo, hi [m]; B [m, dim x], minus the derivative of the bounds."""

    C: Array
    lo: Array
    hi: Array
    B: Array


class Factor(NamedTuple):
    """What steps need of H and of the rows' normals C, and what does not change with the bounds."""

    L: Array
    """[n, n], lower triangular: L L' = H."""
    X: Array | None
    """[n, n], L^-1 where it was formed, which pays when the factor is used in many calls."""
    W: Array
    """[m, n], D C L'^-1: rows of length one."""
    S: Array
    """[m, m], W W'."""
    d: Array
    """[m], the diagonal of D: one over the lengths of the rows of C L'^-1."""
    length: Array
    """[m], d_i |C_i|."""
    diagonal: Array
    """[n], of H without shift or pin."""
    shift: Array | None = None
    """[n], what was added to H's diagonal (`convex`); None for nothing."""
    pin: Array | None = None
    """[m], the diagonal D of what `convex.pinned` added to H; None for nothing."""

    @property
    def trace(self) -> Array:
        """[], of H."""
        return jnp.sum(self.diagonal)

    def down(self, r: Array) -> Array:
        """L^-1 r."""
        return solve_triangular(self.L, after(r, self.d[0]), lower=True) if self.X is None else self.X @ r

    def up(self, r: Array) -> Array:
        """L'^-1 r."""
        return solve_triangular(self.L, r, lower=True, trans=1) if self.X is None else r @ self.X

    def for_many_calls(self) -> "Factor":
        """With X."""
        eye = jnp.broadcast_to(jnp.eye(self.L.shape[-1], dtype=self.L.dtype), self.L.shape)
        return self._replace(X=solve_triangular(self.L, eye, lower=True))


def factorize(H: Array, C: Array) -> Factor:
    """The factors of H [n, n] and the rows C [m, n]; NaN where H is not positive definite."""
    return with_rows(lax.linalg.cholesky(H, symmetrize_input=False), jnp.diagonal(H), C)


def with_rows(L: Array, diagonal: Array, C: Array) -> Factor:
    """The factors of H = L L', with its diagonal [n], and the rows C [m, n]."""
    W = lax.linalg.triangular_solve(L, C, lower=True, transpose_a=True)
    length = row_norms(W)
    d = 1 / jnp.where(length > 0, length, 1)
    W = d[:, None] * W
    return Factor(L, None, W, W @ W.T, d, d * row_norms(C), diagonal)


def exact_inverse(factor: Factor, a: Array) -> Array:
    """`masked_inverse` of the factor's S, or `inverse_of_rows` where that is not exact."""
    found = masked_inverse(factor.S, a)
    return once_if(~found[1], lambda _: inverse_of_rows(factor.W, after(a, found[0][0, 0])), found)[0]


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


def inverse_of_rows(W: Array, a: Array) -> tuple[Array, Array]:
    """`masked_inverse` of W W' from W [m, n] itself, by QR: exact to the condition of the rows in a, not its square."""
    inside, (m, n) = a != 0, W.shape
    unit = np.eye(m, dtype=W.dtype)
    rows = jnp.where(inside[:, None], W, 0)
    R = jnp.linalg.qr(jnp.concatenate([rows.T, unit * jnp.where(inside, 0, 1).astype(W.dtype)[None]]), mode="r")
    Y = solve_triangular(R, unit * inside.astype(W.dtype)[None], trans=1)
    smallest = jnp.min(jnp.abs(jnp.diagonal(R)), initial=1.0)
    return Y, smallest > 100 * float(jnp.finfo(W.dtype).eps) * n


class Point(NamedTuple):
    """Where a model is made."""

    y: Array
    """[n]"""
    z: Array
    """[n], L^-1 (grad_y g + C' lam)."""
    lam: Array | None = None
    """[m], multipliers that z counts; None for zeros, which saves products."""


class Model(NamedTuple):
    """The solution of a quadratic model, and how the search for it ended."""

    p: Array
    """[n], the step from y."""
    multipliers: Array
    """[m], signed: >= 0 at hi, <= 0 at lo."""
    active: Array
    """[m], 1 at hi, -1 at lo, 0 between; for linearly dependent rows a set that spans them."""
    inverse: Array
    """[m, m], `masked_inverse` of S and `active`."""
    empty: Array
    """[], the rows contradict each other."""
    unsolved: Array
    """[], no finite step was found."""
    dependent: Array
    """[], the active rows are linearly dependent."""
    room: Array
    """[m], how far each row is from a change of sides, in rows of unit length: slack or |multiplier|."""
    noise: Array
    """[m], the rounding error in `room`."""


class _Scaled(NamedTuple):
    """The model in z = L'p and in rows of unit length."""

    W: Array
    S: Array
    reach: Array
    """[m], W z0: what the rows are at the unconstrained step."""
    lo: Array
    """[m], like `hi`: the bounds as seen from y, D (bound - C y)."""
    hi: Array
    lam: Array
    """[m], the multipliers that z0 counts, D^-1 lam."""
    noise: Array
    """[m], the rounding error of a row and of a multiplier."""
    fixed: Array
    """[m], equalities: these stay active."""
    counted: bool
    """Whether lam may be other than zero."""


class _Step(NamedTuple):
    """change [m] of the multipliers, and what the rows are after it, W z [m]."""

    change: Array
    value: Array


class _Found(NamedTuple):
    """An active set a [m], the step on it and its `masked_inverse`; and how the search ended, [] each."""

    a: Array
    step: _Step
    inverse: Array
    dependent: Array
    empty: Array
    unsolved: Array


class _Search(NamedTuple):
    """Carry of the primal-dual search."""

    a: Array
    """[m], the active set to solve for next; at the end, the one that was."""
    step: _Step
    inverse: Array
    passes: Array
    fewest: Array
    """The least number of wrong rows so far."""
    patience: Array
    """Passes left until that number must have fallen; below zero one row is changed at a time."""
    ridged: Array
    """Whether rows turned out dependent: from then on a ridge on S makes every subset independent."""
    settled: Array
    """No row is wrong."""
    failed: Array


class _Attempt(NamedTuple):
    """Carry of `_exactly`, which makes up to three attempts, the last two of them with the dual method's rows."""

    count: Array
    """SEARCHED, DUAL, FEWER, or past the last one."""
    found: _Found
    """Of the last attempt."""
    fewer: Array
    """[m], the dual method's active set, without equalities that hold by themselves."""
    right: Array
    """[], the attempt's rows are independent and its active set is one of the solution."""


def _scaled(factor: Factor, limits: Rows, at: Point) -> _Scaled:
    eps, (m, n) = float(jnp.finfo(at.y.dtype).eps), limits.C.shape
    d, z0, rows = factor.d, -at.z, limits.C @ at.y
    finite = lambda end: jnp.where(jnp.isfinite(end), jnp.abs(end), 0)  # noqa: E731
    size = factor.length * norm(at.y) + d * jnp.maximum(finite(limits.lo), finite(limits.hi))
    return _Scaled(
        W=factor.W,
        S=factor.S,
        reach=factor.W @ z0,
        lo=d * (limits.lo - rows),
        hi=d * (limits.hi - rows),
        lam=jnp.zeros_like(d) if at.lam is None else at.lam / d,
        noise=10 * eps * (size + (n + m) ** 0.5 * norm(z0)),
        fixed=limits.lo == limits.hi,
        counted=at.lam is not None,
    )


def _step_on(model: _Scaled, a: Array, inverse: Array) -> _Step:
    """The step on the active set a: the module's equations."""
    outside = jnp.where(a != 0, 0, -model.lam)
    bound = jnp.where(a > 0, model.hi, model.lo)
    moved = model.S @ outside if model.counted else 0
    rhs = jnp.where(a != 0, model.reach - bound - moved, 0)
    change = (inverse @ rhs) @ inverse + outside
    return _Step(change, model.reach - model.S @ change)


def _mended(model: _Scaled, a: Array, step: _Step) -> Array:
    """What each row should be instead: its violated side, 0 where its multiplier has the wrong sign, else a_i."""
    drop = (a * (model.lam + step.change) < -model.noise) & ~model.fixed
    above, below = step.value > model.hi + model.noise, step.value < model.lo - model.noise
    return jnp.where(a != 0, jnp.where(drop, 0, a), jnp.where(above, 1, jnp.where(below, -1, 0)).astype(a.dtype))


def _pass(model: _Scaled, max_changes: int, c: _Search) -> _Search:
    """Solve for the rows in a, and change those that are wrong."""
    eps, m = float(jnp.finfo(c.a.dtype).eps), len(c.a)
    inverse, independent = masked_inverse(model.S, c.a, jnp.where(c.ridged, eps**0.5, 0))
    step = _step_on(model, c.a, inverse)
    better = _mended(model, c.a, step)
    wrong = better != c.a
    count = jnp.sum(wrong)
    good = independent & jnp.isfinite(jnp.sum(step.change))

    settled, begin_ridge = good & (count == 0), ~good & ~c.ridged
    failed = (~good & c.ridged) | (c.passes >= max_changes)
    patience = jnp.where(count < c.fewest, PATIENCE, c.patience - 1)
    last_wrong = m - 1 - jnp.argmax(wrong[::-1])
    passed_over = (patience < 0) & (jnp.arange(m) != last_wrong)
    return _Search(
        a=jnp.where(settled | failed | begin_ridge | passed_over, c.a, better),
        step=step,
        inverse=inverse,
        passes=c.passes + 1,
        fewest=jnp.where(begin_ridge, m + 1, jnp.minimum(c.fewest, count)),
        patience=patience,
        ridged=c.ridged | begin_ridge,
        settled=settled,
        failed=failed & ~settled,
    )


def _search(model: _Scaled, max_changes: int, begin: _Search) -> _Found:
    """The primal-dual search. Where it fails, or needed a ridge, its end is made exact from the rows themselves."""
    no = jnp.array(False)
    end = lax.while_loop(lambda c: ~(c.failed | c.settled), partial(_pass, model, max_changes), begin)
    found = _Found(end.a, end.step, end.inverse, no, no, no)
    start = jnp.where(end.settled, SEARCHED, DUAL)
    begins = _Attempt(start, found, end.a, end.settled & ~end.ridged)
    go_on = lambda c: ~c.right & (c.count <= FEWER)  # noqa: E731
    return lax.while_loop(go_on, partial(_exactly, model), begins).found


def _exactly(model: _Scaled, c: _Attempt) -> _Attempt:
    """An active set with the exact inverse of its rows: the search's; else the dual method's; else that without what
    depends on the rest.
    """
    found, fewer = once_if(c.count == DUAL, partial(_by_dual_method, model, c.count), (c.found, c.fewer))
    a = jnp.where(c.count == FEWER, fewer, found.a)
    inverse, independent = inverse_of_rows(model.W, after(a, fewer[0]))
    step = _step_on(model, a, inverse)
    right = independent & ((c.count == DUAL) | ~jnp.any(_mended(model, a, step) != a))
    found = found._replace(a=a, step=step, inverse=inverse, dependent=~independent | (c.count == FEWER))
    return _Attempt(c.count + 1, found, fewer, right)


def _by_dual_method(model: _Scaled, count: Array, before: tuple[_Found, Array]) -> tuple[_Found, Array]:
    """The active set from multipliers of zero, by `least_distance`: lo <= W z <= hi as rows W, -W."""
    free = model.reach + model.S @ model.lam
    slack = jnp.concatenate([model.hi - free, free - model.lo])
    far = float(jnp.finfo(free.dtype).eps) * (norm(free) + norm(model.lam @ model.W))  # from multipliers that z0 counts
    allow = jnp.concatenate([model.noise, model.noise]) + 10 * far
    # `skip` is never true here, but ties the inner loop to the carry: XLA would hoist it and run it always.
    exact = nearest(jnp.concatenate([model.W, -model.W]), slack, allow, skip=count != DUAL)
    at_hi, at_lo = (half.astype(free.dtype) for half in jnp.split(exact.active, 2))
    fewer = at_hi - at_lo
    a = jnp.where(model.fixed, 1, fewer)  # equalities that hold by themselves have multipliers, too
    return before[0]._replace(a=a, empty=exact.empty, unsolved=jnp.isnan(exact.d).any()), fewer


def solve_model(
    factor: Factor, limits: Rows, at: Point, active: Array, max_changes: int = MAX_CHANGES, inverse: Array | None = None
) -> Model:
    """The solution of the quadratic model at a point, searched for from an active set. Pure; for jit and vmap.

    Args:
        factor: of H and limits.C.
        limits: the rows, of y and not of the step.
        at: y, gradient and multipliers there.
        active: [m], as `Model.active`, the set to start from.
        max_changes: passes of the primal-dual search, after which the dual method takes over.
        inverse: `masked_inverse` of `active`, if it is at hand.
    """
    model = _scaled(factor, limits, at)
    no, count = jnp.array(False), jnp.array(len(active) + 1)
    inverse, independent = masked_inverse(model.S, active) if inverse is None else (inverse, ~no)
    step = _step_on(model, active, inverse)
    better = _mended(model, active, step)
    good = independent & jnp.isfinite(jnp.sum(step.change))
    first, done = jnp.where(good, better, active), good & ~jnp.any(better != active)
    begin = _Search(first, step, inverse, jnp.array(0), count, jnp.array(PATIENCE), no, done, no)
    found = _search(model, max_changes, begin)

    a, (change, value) = found.a, found.step
    total = model.lam + change
    slack = jnp.minimum(model.hi - value, value - model.lo)
    p = factor.up(-at.z - change @ model.W)
    return Model(
        p=p,
        multipliers=factor.d * total,
        active=a,
        inverse=found.inverse,
        empty=found.empty,
        unsolved=found.unsolved | ~jnp.isfinite(jnp.sum(p)),
        dependent=found.dependent,
        room=jnp.where(model.fixed, jnp.inf, jnp.where(a != 0, jnp.abs(total), slack)),
        noise=model.noise,
    )


def kkt_solve(factor: Factor, inverse: Array, active: Array, r: Array, s: Array | None = None) -> tuple[Array, Array]:
    """(u [n], v [m]) with H u + C_a' v_a = r, C_a u = s_a, and v_i = s_i on inactive rows; s = 0 where it is None."""
    z = factor.down(r)
    reach = factor.W @ z
    v = (inverse @ (reach if s is None else reach - factor.d * s)) @ inverse
    u = factor.up(z - v @ factor.W)
    if s is None:
        return u, factor.d * v
    more = 0 if factor.pin is None else factor.pin * s
    return u, jnp.where(active != 0, factor.d * v + more, s)
