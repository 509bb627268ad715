"""A quadratic g on a polyhedron: one model, which is g itself, and iterative refinement of its solution.

On the active rows a of the model, of y and multipliers lam,

    [H  C_a'] [p   ]   [-(grad_y g + C' lam)]
    [C_a  0 ] [dlam] = [bound - C_a y       ],    y <- y + p,    lam <- lam + dlam.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from bilevel.backend.tree import norm
from bilevel.lower.polyhedral_level import Found, Level, Settings, Warm, ends, guess
from bilevel.qp.active_set import Factor, Model, Point, Rows, kkt_solve, solve_model
from bilevel.record import Status

REFINEMENTS, KEPT_REFINEMENTS = 5, 30  # steps at most, with fresh factors and with kept ones


def solve(level: Level, y: Array, settings: Settings, warm: Warm) -> Found:
    """The solution of the model at y, which is that of g, refined."""
    limits, kept = level.limits, warm.factor is not None
    grad = level.gradient(y)
    factor = level.factor_at(y) if warm.factor is None else warm.factor
    z = factor.down(grad)
    inverse = None
    if warm.active is None:
        active = guess(limits, factor, y, z)
    else:
        active, inverse = jnp.asarray(warm.active, y.dtype), warm.inverse if kept else None
    at = Point(y, z)
    model = solve_model(factor, limits, at, active, settings.max_changes, inverse)
    end = _refine(_Kkt(level, factor, model, norm(grad)), y, kept)
    if kept:
        stale = (end.status == Status.CONVERGED) & _contradicts(limits, end)
        end = end._replace(status=jnp.where(stale, Status.STALLED, end.status))
    return end._replace(status=ends(level, end.status, factor, model))


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

    def residual(self, y: Array, lam: Array) -> tuple[Array, Array, Array]:
        """(C y [m], R = grad_y g + C' lam [n], the size of the residual in units of what rounding makes of it)."""
        eps, tiny = (float(getattr(jnp.finfo(y.dtype), name)) for name in ("eps", "tiny"))
        at = self.level.limits.C @ y
        R = self.level.gradient(y) + self.level.limits.C.T @ lam
        off = self.factor.d * jnp.abs(self.bound - at) / jnp.maximum(self.model.noise, tiny)
        off = jnp.max(jnp.where(self.model.active != 0, off, 0), initial=0)
        scale = 10 * eps * (self.factor.trace * norm(y) + self.size)
        return at, R, jnp.maximum(off, norm(R) / jnp.maximum(scale, tiny))

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


def _refine(kkt: _Kkt, y: Array, kept: bool) -> Found:
    """The quadratic g's solution from its model's at y, by iterative refinement on the model's rows.

    Until the residual is rounding error, measured by tr(H) |y| + |grad_y g| at the start, or no longer halves; a step
    of some length is always followed by another one. Factors that were kept may be of another Hessian: then more steps
    are allowed, and less residual at the end.
    """
    eps = float(jnp.finfo(y.dtype).eps)
    most, enough = (KEPT_REFINEMENTS, eps**-0.25) if kept else (REFINEMENTS, eps**-0.5)

    def go_on(c: _Refined) -> Array:
        return ((c.size > 1) | c.far) & (c.size <= c.before / 2) & (c.count < most)

    def moved(y: Array, lam: Array, p: Array, before: Array, count: Array) -> _Refined:
        y = y + p
        at, R, size = kkt.residual(y, lam)
        return _Refined(y, lam, at, R, size, before, norm(p) > 0.1 * norm(y), count)

    def body(c: _Refined) -> _Refined:
        p, change = kkt.correction(c.at, c.R)
        return moved(c.y, c.lam + change, p, c.size, c.count + 1)

    model, infinite = kkt.model, jnp.full((), jnp.inf, y.dtype)
    end = lax.while_loop(go_on, body, moved(y, model.multipliers, model.p, infinite, jnp.array(0)))
    status = jnp.where(end.size <= enough, Status.CONVERGED, Status.STALLED)
    return Found(end.y, kkt.factor, model._replace(multipliers=end.lam), end.at, end.R, end.count + 2, status)


def _contradicts(limits: Rows, end: Found) -> Array:
    """Whether a row is violated, or its multiplier has the wrong sign, by more than rounding error."""
    noise, d, a = 100 * end.model.noise, end.factor.d, end.model.active
    outside = d * jnp.maximum(end.at - limits.hi, limits.lo - end.at) > noise
    wrong = (a * end.model.multipliers < -d * noise) & (limits.lo != limits.hi)
    return jnp.any(outside | wrong)
