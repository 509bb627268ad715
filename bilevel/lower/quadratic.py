"""A quadratic g on a polyhedron: one model, which is g itself, and iterative refinement of its solution.

On the active rows a of the model, of y and multipliers lam,

    [H  C_a'] [p   ]   [-(grad_y g + C' lam)]
    [C_a  0 ] [dlam] = [bound - C_a y       ],    y <- y + p,    lam <- lam + dlam.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from bilevel.backend.tree import norm
from bilevel.lower.polyhedral_level import Found, Level, Settings, Warm, ends, guess, on_face
from bilevel.qp.active_set import Factor, Model, Point, kkt_solve, solve_model
from bilevel.qp.convex import shifted
from bilevel.record import Status

REFINEMENTS, KEPT_REFINEMENTS = 5, 30  # steps at most, with fresh factors and with kept ones
PROXIMAL_STEPS = 50  # models at most, where g_yy is not definite
CLEARING_STEPS = 2  # further models at most where it is: from a point nearby and its multipliers they are more exact


def solve(level: Level, y: Array, settings: Settings, warm: Warm) -> Found:
    """The solution of the model at y, which is that of g, refined.

    Where g_yy is not definite the model is solved with a small shift of it, from where it ended, until that stands
    still; what is left is on the active rows alone (`qp.convex`). Where a row's side is not clear beyond the rounding
    error of a model, another one is made where it ended.
    """
    limits, kept = level.limits, warm.factor is not None
    grad = level.gradient(y)
    factor = level.factor_at(y, grad) if warm.factor is None else warm.factor
    found = _settled(level, factor, y, grad, settings, warm)
    face = on_face(limits, factor, found.model)
    kkt = _Kkt(level, face.factor, face.model, norm(grad))
    end = _refine(kkt, found.y, found.R, kept)
    status = jnp.where(shifted(factor) & found.moving, Status.STALLED, end.status)
    return end._replace(status=face.word(ends(level, status, factor, found.model)))


class _Pass(NamedTuple):
    """Carry of the models; one is enough where g_yy is definite and the rows' sides are clear."""

    y: Array
    """Where the last model leads to."""
    R: Array
    """[n], grad_y g + C' lam there."""
    model: Model
    moving: Array
    """[], whether another model is wanted: the active set or y still changes, or sides are not clear."""
    count: Array


def _settled(level: Level, factor: Factor, y: Array, grad: Array, settings: Settings, warm: Warm) -> _Pass:
    """The models, one after the other, each made where the one before leads to and with its multipliers."""
    limits, no = level.limits, jnp.array(False)
    again, eps = shifted(factor), float(jnp.finfo(y.dtype).eps)
    inverse = None
    if warm.active is None:
        active = guess(limits, factor, y, factor.down(grad))
    else:
        active, inverse = jnp.asarray(warm.active, y.dtype), warm.inverse if warm.factor is not None else None

    def step(c: _Pass) -> _Pass:
        at = Point(c.y, factor.down(c.R), c.model.multipliers)
        model = solve_model(factor, limits, at, c.model.active, settings.max_changes, inverse)
        y, length = c.y + model.p, norm(model.p)
        moving = jnp.any(model.active != c.model.active) | (length > eps**0.5 * norm(y))
        unclear = (jnp.any(model.room <= 10 * model.noise) | model.dependent) & (c.count < CLEARING_STEPS)
        alive = jnp.isfinite(length) & ~model.empty
        R = level.gradient(y) + limits.C.T @ model.multipliers
        return _Pass(y, R, model, jnp.where(again, moving, unclear) & alive, c.count + 1)

    nothing, m = jnp.zeros_like(limits.lo), len(limits.C)
    first = Model(jnp.zeros_like(y), nothing, active, jnp.zeros((m, m), y.dtype), no, no, no, nothing, nothing)
    begin = _Pass(y, grad, first, jnp.array(True), jnp.array(0))
    return lax.while_loop(lambda c: c.moving & (c.count < PROXIMAL_STEPS), step, begin)


class _Kkt(NamedTuple):
    """The equations of a quadratic g on the active rows of its model."""

    level: Level
    factor: Factor
    model: Model
    size: Array
    """[], |grad_y g| at the start."""

    @property
    def bound(self) -> Array:
        """[m], where the active rows belong."""
        limits = self.level.limits
        return jnp.where(self.model.active > 0, limits.hi, limits.lo)

    def size_of(self, y: Array, at: Array, R: Array) -> Array:
        """The size of what is left of the equations, in units of what rounding makes of it."""
        eps, tiny = (float(getattr(jnp.finfo(y.dtype), name)) for name in ("eps", "tiny"))
        off = self.factor.d * jnp.abs(self.bound - at) / jnp.maximum(self.model.noise, tiny)
        off = jnp.max(jnp.where(self.model.active != 0, off, 0), initial=0)
        scale = 10 * eps * (self.factor.trace * norm(y) + self.size)
        return jnp.maximum(off, norm(R) / jnp.maximum(scale, tiny))

    def correction(self, at: Array, R: Array) -> tuple[Array, Array]:
        """(p [n], dlam [m]): H p + C_a' dlam = -R, C_a p = bound - C_a y."""
        off = jnp.where(self.model.active != 0, self.bound - at, 0)
        return kkt_solve(self.factor, self.model.inverse, self.model.active, -R, off)


class _Refined(NamedTuple):
    """Carry of the refinement."""

    y: Array
    lam: Array
    at: Array
    """[m], C y."""
    R: Array
    """[n], grad_y g + C' lam."""
    size: Array
    """[], of the residual, in units of what rounding makes of it."""
    before: Array
    """[], the last pass's."""
    far: Array
    """[], the last step was of some length: a step's own rounding error is in proportion."""
    count: Array


def _refine(kkt: _Kkt, y: Array, R: Array, kept: bool) -> Found:
    """The quadratic g's solution by iterative refinement on the model's rows, from y, where the model leads to.

    Until the residual, R [n] at y, is rounding error, measured by tr(H) |y| + |grad_y g| at the start, or no longer
    halves; a step of some length is always followed by another one. Factors that were kept may be of another Hessian:
    then more steps are allowed, and less residual at the end.
    """
    eps, level, model = float(jnp.finfo(y.dtype).eps), kkt.level, kkt.model
    most, enough = (KEPT_REFINEMENTS, eps**-0.25) if kept else (REFINEMENTS, eps**-0.5)

    def go_on(c: _Refined) -> Array:
        return ((c.size > 1) | c.far) & (c.size <= c.before / 2) & (c.count < most)

    def here(y: Array, lam: Array, R: Array, p: Array, before: Array, count: Array) -> _Refined:
        at = level.limits.C @ y
        return _Refined(y, lam, at, R, kkt.size_of(y, at, R), before, norm(p) > 0.1 * norm(y), count)

    def body(c: _Refined) -> _Refined:
        p, change = kkt.correction(c.at, c.R)
        y, lam = c.y + p, c.lam + change
        return here(y, lam, level.gradient(y) + level.limits.C.T @ lam, p, c.size, c.count + 1)

    infinite = jnp.full((), jnp.inf, y.dtype)
    end = lax.while_loop(go_on, body, here(y, model.multipliers, R, model.p, infinite, jnp.array(0)))
    status = jnp.where(end.size <= enough, Status.CONVERGED, Status.STALLED)
    return Found(end.y, kkt.factor, model._replace(multipliers=end.lam), end.at, end.R, end.count + 2, status)
