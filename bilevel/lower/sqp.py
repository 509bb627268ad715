"""A strongly convex g on a polyhedron: sequential quadratic programming with backtracking.

At y with multipliers lam, the step p and the next multipliers solve the quadratic model

    min over p of  p' grad_y g + p' g_yy p/2   with  lo <= C (y + p) <= hi,    y <- y + t p,

t = 1 until y is feasible, or less where a gradient ten thousand times as steep says that g ends there; from then on the
first of T, T/2, T/4, ..., with T = 1 or twice the last t if that is less, for which g falls by Armijo's rule, and does
not rise again at y + t p more steeply than it fell at y: p' grad_y g(y + t p) <= 0.9 |p' grad_y g(y)|. A full step ends
on the rows, where an entropy or a logarithm is at the end of its domain: there g may be finite, and far from its
minimum, with a Hessian so large that the next step is none.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from bilevel.backend.tree import norm
from bilevel.lower.polyhedral_level import Found, Level, Settings, Warm, ends, guess, on_face
from bilevel.qp.active_set import Factor, Model, Point, Rows, solve_model
from bilevel.record import Status


class _Search(NamedTuple):
    """Carry: a pass looks at y + t p, and either moves there and makes a new model, or halves t."""

    y: Array
    t: Array
    """[], step length."""
    g: Array
    """[], value at y."""
    grad: Array
    """[n], grad_y g at y."""
    slope: Array
    """[], p' grad_y g."""
    reach: Array
    """[], the longest step so far."""
    feasible: Array
    """[], whether y is: from the start, or from the first full step on, which makes it so, or before."""
    factor: Factor
    model: Model
    """At y: the step p, the multipliers and the active set."""
    steep: Array
    """[], |grad_y g| at the start."""
    trace: Array
    """[], of the first g_yy."""
    steps: Array
    status: Array

    @property
    def curvature(self) -> Array:
        """The trace of g_yy, at the start or of the last factor, whichever is less: near a barrier it has no limit."""
        return jnp.minimum(self.trace, self.factor.trace)


class _Look(NamedTuple):
    """What a pass sees at its trial point."""

    y: Array
    g: Array
    grad: Array
    """[n], grad_y g."""
    R: Array
    """[n], grad_y g + C' lam."""
    finite: Array
    accepted: Array


def solve(level: Level, y: Array, settings: Settings, warm: Warm) -> Found:
    """The end of the search, where it converged with one more full step, which is too short to need a look."""
    limits, dtype = level.limits, y.dtype
    zero, no, nobody = jnp.zeros((), dtype), jnp.array(False), jnp.zeros_like(limits.lo)
    start = None if warm.active is None else jnp.asarray(warm.active, dtype)
    (m, n), first = limits.C.shape, nobody if start is None else start
    nothing = Model(jnp.zeros_like(y), nobody, first, jnp.zeros((m, m), dtype), no, no, no, nobody, nobody)
    square, rows = jnp.zeros((n, n), dtype), jnp.zeros((m, n), dtype)
    flat = jnp.zeros_like(y)
    unmade = Factor(square, None, rows, nothing.inverse, nobody, nobody, flat, flat, nobody)
    begin = _Search(
        y, zero + 1, zero, flat, zero, zero, no, unmade, nothing, zero, zero + jnp.inf, jnp.array(0),
        jnp.array(Status.MAX_STEPS),
    )  # fmt: skip

    def go_on(c: _Search) -> Array:
        return (c.status == Status.MAX_STEPS) & (c.steps < settings.max_steps)

    end = lax.while_loop(go_on, partial(_step, level, settings, start is None), begin)
    last = end.y + jnp.where(end.status == Status.CONVERGED, end.model.p, 0)
    grad = level.gradient(last)
    inside = jnp.isfinite(grad).all()  # a step that is short beside y may end where a logarithm does
    last, grad = jnp.where(inside, last, end.y), jnp.where(inside, grad, end.grad)
    R = grad + limits.C.T @ end.model.multipliers
    stalled = (end.status == Status.CONVERGED) & ~_balanced(level, end._replace(y=last, grad=grad))
    status = jnp.where(stalled, Status.STALLED, end.status)
    face = on_face(limits, end.factor, end.model)
    return Found(last, face.factor, face.model, limits.C @ last, R, end.steps, face.word(status))


def _balanced(level: Level, c: _Search) -> Array:
    """Whether grad_y g + C' lam is small with multipliers of the right signs alone: a short step proves nothing where
    the Hessian is very large.
    """
    eps = float(jnp.finfo(c.y.dtype).eps)
    enough = eps**0.5 * (c.steep + norm(c.grad)) + 100 * eps * c.curvature * norm(c.y)
    a, free = c.model.active, level.limits.lo == level.limits.hi
    lam = jnp.where(free | (a * c.model.multipliers > 0), c.model.multipliers, 0)
    return norm(c.grad + level.limits.C.T @ lam) <= enough


def _step(level: Level, settings: Settings, guessed: bool, c: _Search) -> _Search:
    """One pass. The first (t p = 0) only looks at the start; `guessed`: whether it has to find an active set, too."""
    first, limits = c.steps == 0, level.limits
    before = norm(c.factor.L @ (c.factor.L.T @ c.model.p))  # |H p| = |grad_y g + C' lam| at the last y
    look = _look(level, c, before)
    ok = look.accepted
    renew = first | (ok & ~((norm(look.R) <= 0.1 * before) & (c.t == 1)))
    factor = lax.cond(renew, lambda: level.factor_at(look.y, look.grad), lambda: c.factor)
    z, active = factor.down(look.R), c.model.active
    if guessed:
        active = jnp.where(first, guess(limits, factor, look.y, z), active)
    at = Point(look.y, z, c.model.multipliers)
    model = lax.cond(ok, lambda: solve_model(factor, limits, at, active, settings.max_changes), lambda: c.model)
    new = _Search(
        y=jnp.where(ok, look.y, c.y),
        t=jnp.where(ok, jnp.minimum(2 * c.t, 1), c.t / 2),
        g=jnp.where(ok, look.g, c.g),
        grad=jnp.where(ok, look.grad, c.grad),
        slope=look.grad @ model.p,
        reach=jnp.maximum(c.reach, jnp.where(first, 0, norm(c.t * c.model.p))),
        feasible=c.feasible | (ok & ((~first & (c.t == 1)) | _inside(limits, look.y))),
        factor=factor,
        model=model,
        steep=jnp.where(first, norm(look.grad), c.steep),
        trace=jnp.where(first, factor.trace, c.trace),
        steps=c.steps + 1,
        status=c.status,
    )
    status = ends(level, _status(level, settings, c, new, ok), factor, model)
    return new._replace(status=jnp.where(first & ~look.finite, Status.NONFINITE, status))


def _inside(limits: Rows, y: Array) -> Array:
    """Whether y fulfils the rows up to rounding."""
    at, noise = limits.C @ y, 100 * jnp.finfo(y.dtype).eps * (jnp.abs(limits.C) @ jnp.abs(y))
    return jnp.all((at <= limits.hi + noise) & (at >= limits.lo - noise))


def _look(level: Level, c: _Search, before: Array) -> _Look:
    """The trial point, and whether the search moves there; before: |H p|."""
    y = c.y + c.t * c.model.p
    g, grad = level.value_and_gradient(y)
    R = grad + level.limits.C.T @ c.model.multipliers
    finite = jnp.isfinite(g) & jnp.isfinite(R).all()
    # Descent is asked for between feasible points only: the first full step makes y feasible.
    eps = jnp.finfo(y.dtype).eps
    enough = g <= c.g + 1e-4 * c.t * c.slope + 1e3 * eps * (1 + jnp.abs(c.g))
    steep, size = norm(grad), norm(y)
    rounding = eps * (1e3 * norm(c.model.p) * (steep + c.curvature * size) + 100 * steep * size)
    enough = enough & (grad @ c.model.p <= 0.9 * jnp.abs(c.slope) + rounding)
    steepest = 1e4 * (norm(c.grad) + before)  # of a quadratic: 1
    good = jnp.where(c.feasible, enough, norm(grad) <= steepest)
    return _Look(y, g, grad, R, finite, finite & ((c.steps == 0) | good))


def _status(level: Level, settings: Settings, old: _Search, new: _Search, ok: Array) -> Array:
    """CONVERGED where the next step is short, or is rounding error: of full length, small, and not half the last."""
    first, eps = old.steps == 0, jnp.finfo(new.y.dtype).eps
    tol = 10 * eps if settings.tol is None else settings.tol
    length, before = norm(new.model.p), norm(old.model.p)
    scale = norm(new.y) + jnp.where(first, length, new.reach)
    rounding = ~first & (old.t == 1) & (length >= before / 2) & (length <= jnp.sqrt(eps) * scale)
    done = ok & ((length <= tol * scale) | rounding) & _balanced(level, new)
    return jnp.where(done, Status.CONVERGED, jnp.where(new.t < eps, Status.STALLED, Status.MAX_STEPS))
