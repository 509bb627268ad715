"""Derivatives of F through a polyhedral lower level: the hypergradient with its error, and F for `jax.grad`.

On the rows that are active at y(x), with H = g_yy, G = g_yx and the rows' bounds moving with x by -B (`polyhedral`),

    grad F = f_x - G' u - B' v,    [H  C_a'; C_a  0] [u; v] = [f_y; 0].

F is differentiable where every active row has a multiplier and the active rows are independent; elsewhere it has a
kink, and this is one of its one-sided derivatives. `lower.directional` gives them all.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import constraints, oracles
from bilevel.backend.tree import norm, poisoned, take
from bilevel.linear import refine
from bilevel.lower import polyhedral
from bilevel.lower.method import Solved
from bilevel.lower.polyhedral import PolyhedralSolution, Settings
from bilevel.lower.polyhedral_level import Warm, start_of
from bilevel.lower.quadratic import KEPT_REFINEMENTS
from bilevel.problem import BilevelProblem
from bilevel.qp.active_set import Rows, factorize, kkt_solve
from bilevel.record import Hypergradient, Status, solved

PyTree = Any


def at_solution(problem: BilevelProblem, x: PyTree, found: PolyhedralSolution, batch: PyTree) -> PolyhedralSolution:
    """`found` with factors of the Hessian at its y; those of a constant Hessian are."""
    if oracles.constant_hessian(problem, x, found.iterate, batch):
        return found
    C = constraints.rows(problem, x, found.iterate).C
    return polyhedral.refactored(found, factorize(oracles.lower_hessian(problem, x, found.iterate, batch), C))


class _Point(NamedTuple):
    """A root of the KKT system and of its adjoint, or an approximation: y, u [n] and lam, v [rows]."""

    y: Array
    lam: Array
    u: Array
    v: Array


class _Residuals(NamedTuple):
    """What is left of the two systems at a point, zero at their roots."""

    R: Array
    """[n], grad_y g + C' lam."""
    off: Array
    """[rows], bound - C y on the active rows, else 0."""
    r_u: Array
    """[n], f_y - H u - C' v."""
    r_v: Array
    """[rows], -C u on the active rows, else 0."""


class _Seen(NamedTuple):
    """What else is seen at a point; all [] but u and gradient."""

    y: Array
    u: Array
    value: Array
    """f(x, y)."""
    gradient: Array
    """[dim x], f_x - G' u - B' v."""
    lower_residual: Array
    linear_residual: Array
    sizes: Array
    """|f_x| + |G' u + B' v|, for rounding error."""


class _System(NamedTuple):
    """The KKT system of the active rows at one x, and its adjoint. Not a pytree of arrays: it stays in one trace."""

    problem: BilevelProblem
    x: PyTree
    found: PolyhedralSolution
    """With factors for the Hessian at its y."""
    limits: Rows
    unravel: Callable[[Array], PyTree]

    @property
    def inside(self) -> Array:
        """[rows], which are active."""
        return self.found.active != 0

    def solve(self, r: Array, s: Array | None = None) -> tuple[Array, Array]:
        """(u, v) with H u + C_a' v = r, C_a u = s_a."""
        return kkt_solve(self.found.factor, self.found.inverse, self.found.active, r, s)

    def fy(self, y: PyTree) -> Array:
        """f_y at y, [n]."""
        return ravel_pytree(oracles.upper_gradients(self.problem, self.x, y, self.problem.upper_data.full())[1])[0]

    def look(self, at: _Point) -> tuple[_Residuals, _Seen]:
        """Residuals, value and gradient at a point."""
        problem, x, limits, y, u = self.problem, self.x, self.limits, self.unravel(at.y), self.unravel(at.u)
        value, gradients = oracles.upper_value_and_gradients(problem, x, y, problem.upper_data.full())
        directions = oracles.directions(problem, x, y, u, problem.lower_data.full())
        fx, fy, R, Hu, cross = (ravel_pytree(part)[0] for part in (*gradients, *directions))
        implicit = cross + limits.B.T @ at.v
        bound = jnp.where(self.found.active > 0, limits.hi, limits.lo)
        left = _Residuals(
            R=R + limits.C.T @ at.lam,
            off=jnp.where(self.inside, bound - limits.C @ at.y, 0),
            r_u=fy - Hu - limits.C.T @ at.v,
            r_v=jnp.where(self.inside, -(limits.C @ at.u), 0),
        )
        return left, _Seen(
            y=at.y,
            u=at.u,
            value=value,
            gradient=fx - implicit,
            lower_residual=norm(jnp.append(left.R, left.off)),
            linear_residual=norm(jnp.append(left.r_u, left.r_v)),
            sizes=norm(fx) + norm(implicit),
        )

    def correct(self, carry: tuple[_Point, _Residuals], _: None) -> tuple[tuple[_Point, _Residuals], _Seen]:
        """A Newton step on both systems, and a look at where it leads."""
        at, left = carry
        (d, dlam), (du, dv) = self.solve(-left.R, left.off), self.solve(left.r_u, left.r_v)
        at = _Point(at.y + d, at.lam + dlam, at.u + du, at.v + dv)
        left, seen = self.look(at)
        return (at, left), seen


def differentiate(
    problem: BilevelProblem, x: PyTree, y: PyTree, settings: Settings, estimate: bool = True, warm: Warm | None = None
) -> Hypergradient:
    """The hypergradient from the warm start y (and `warm`), by Newton corrections of (y, lam) and (u, v) together.

    The first solves for (u, v), which gives the gradient; with `estimate` a second one gives a gradient that is right
    to higher order: twice the distance of the two, plus an allowance for rounding, estimates the first one's error. It
    is an estimate, and supposes that the active set is the right one, which the margin shows; no proof from constants
    is offered here.
    """
    warm = start_of(settings, warm)
    found = polyhedral.solve(problem, x, y, problem.lower_data.full(), settings, warm)
    found = at_solution(problem, x, found, problem.lower_data.full())
    flat, unravel = ravel_pytree(found.iterate)
    system = _System(problem, x, found, constraints.rows(problem, x, y), unravel)
    fy = system.fy(found.iterate)
    zero, nothing = jnp.zeros_like(flat), jnp.zeros_like(found.multipliers)
    start = _Point(flat, jnp.where(system.inside, found.multipliers, 0), zero, nothing)
    unsolved = _Residuals(zero, nothing, fy, nothing)  # y is as good as it gets, (u, v) = 0 are not solved for

    seen = None
    if warm.factor is not None or not estimate:
        u, v = system.solve(fy)
        if warm.factor is not None:
            u, v = _refined(system, fy, u, v)
        start = start._replace(u=u, v=v)
        unsolved, seen = system.look(start)
    if estimate:
        both = lax.scan(system.correct, (start, unsolved), length=2)[1]  # a scan, so that `look` is compiled once
        seen, better = (take(both, k) for k in (0, 1))
        rounding = jnp.finfo(flat.dtype).eps * flat.size * seen.sizes
        error, good = 2 * norm(better.gradient - seen.gradient) + rounding, jnp.array(Status.ESTIMATED)
    else:
        error, good = jnp.full((), jnp.nan, flat.dtype), jnp.array(Status.UNCHECKED)
    assert seen is not None
    return conclude(
        found.status, good, x, seen.value, seen.gradient, error, y=unravel(seen.y), v=unravel(seen.u),
        lower_residual=seen.lower_residual, linear_residual=seen.linear_residual, active_margin=found.margin,
    )  # fmt: skip


class _Adjoint(NamedTuple):
    """Carry of `_refined`: (u, v), what is left of their equations, its norm and the last pass's."""

    u: Array
    v: Array
    r_u: Array
    r_v: Array
    size: Array
    before: Array
    count: Array


def _refined(system: _System, fy: Array, u: Array, v: Array) -> tuple[Array, Array]:
    """(u, v) corrected until the adjoint's residual is rounding error or no longer halves: kept factors may be stale.

    Here y stands still; H u is a product with the Hessian at hand.
    """
    problem, limits, found = system.problem, system.limits, system.found

    def look(u: Array, v: Array, before: Array, count: Array) -> _Adjoint:
        batch = problem.lower_data.full()
        Hu = ravel_pytree(oracles.hvp(problem, system.x, found.iterate, system.unravel(u), batch))[0]
        r_u, r_v = fy - Hu - limits.C.T @ v, jnp.where(system.inside, -(limits.C @ u), 0)
        return _Adjoint(u, v, r_u, r_v, norm((r_u, r_v)), before, count)

    def go_on(c: _Adjoint) -> Array:
        noise = 10 * jnp.finfo(fy.dtype).eps * (found.factor.trace * norm(c.u) + norm(fy))
        return (c.size > noise) & (c.size <= c.before / 2) & (c.count < KEPT_REFINEMENTS)

    def body(c: _Adjoint) -> _Adjoint:
        du, dv = system.solve(c.r_u, c.r_v)
        return look(c.u + du, c.v + dv, c.size, c.count + 1)

    end = lax.while_loop(go_on, body, look(u, v, jnp.full((), jnp.inf, fy.dtype), jnp.array(0)))
    return end.u, end.v


def conclude(
    lower: Array, good: Array, x: PyTree, value: Array, gradient: Array, error: Array, **rest: Any
) -> Hypergradient:
    """The answer where the lower level ended as `lower`: with status `good` where that is CONVERGED and all is finite.

    gradient [dim x]; a failure is never a number.
    """
    failed = ~solved(lower)
    finite = jnp.isfinite(gradient).all() & jnp.isfinite(value)
    return Hypergradient(
        value=jnp.where(failed, jnp.nan, value),
        gradient=ravel_pytree(x)[1](jnp.where(failed | ~finite, jnp.nan, gradient)),
        error_bound=jnp.where(failed | ~finite, jnp.inf, error),
        status=jnp.where(failed | finite, jnp.where(lower == Status.CONVERGED, good, lower), Status.NONFINITE),
        **rest,
    )


def implicit_solution(problem: BilevelProblem, x: PyTree, y: PyTree, settings: Settings) -> Solved:
    """y(x), differentiable in x in both modes and again: a root of the masked KKT system

        grad_y g + C_a' lam_a = 0,    (C y - bound)_a = 0,    lam_i = 0 for i outside of a,

    whose Jacobian is symmetric. NaN where the lower level is infeasible or unsolved.
    """
    lower_batch = problem.lower_data.full()
    fixed_x = lax.stop_gradient(x)
    found = polyhedral.solve(problem, fixed_x, lax.stop_gradient(y), lower_batch, settings)
    found = lax.stop_gradient(at_solution(problem, fixed_x, found, lower_batch))
    inside = found.active != 0
    flat, unravel = ravel_pytree(found.iterate)
    n = flat.size

    def residual(z: Array) -> Array:
        point, lam = z[:n], z[n:]
        limits = constraints.rows(problem, x, unravel(point))
        R = ravel_pytree(oracles.residual(problem, x, unravel(point), lower_batch))[0]
        off = limits.C @ point - jnp.where(found.active > 0, limits.hi, jnp.where(inside, limits.lo, 0))
        return jnp.concatenate([R + limits.C.T @ jnp.where(inside, lam, 0), jnp.where(inside, off, lam)])

    def inverse(r: Array) -> Array:
        return jnp.concatenate(kkt_solve(found.factor, found.inverse, found.active, r[:n], r[n:]))

    def tangent(matvec: Any, b: Array) -> Array:
        solve = lambda matvec, b: refine(matvec, inverse, b)  # noqa: E731
        return lax.custom_linear_solve(matvec, b, solve, transpose_solve=solve, symmetric=True)

    start = jnp.concatenate([flat, jnp.where(inside, found.multipliers, 0)])
    start = poisoned(start, solved(found.status))
    z = lax.custom_root(residual, start, lambda _, z: z, tangent)
    return Solved(unravel(z[:n]), found.status)
