"""Derivatives of F through a polyhedral lower level: the hypergradient with its error, and F for `jax.grad`.

On the rows that are active at y(x), with H = g_yy, G = g_yx and the rows' bounds moving with x by -B (`polyhedral`),

    grad F = f_x - G' u - B' v,    [H  C_a'; C_a  0] [u; v] = [f_y; 0].

F is differentiable where every active row has a multiplier and the active rows are independent; elsewhere it has a
kink, and this is one of its one-sided derivatives. `lower.directional` gives them all.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import constraints, oracles
from bilevel.backend.loops import once_if
from bilevel.backend.tree import norm, poisoned
from bilevel.linear import refine
from bilevel.lower import polyhedral, sides
from bilevel.lower.kkt_system import Error, Point, Residuals, System, solved_with_error
from bilevel.lower.method import Solved
from bilevel.lower.polyhedral import PolyhedralSolution, Settings
from bilevel.lower.polyhedral_level import Warm, start_of, unit_of
from bilevel.lower.quadratic import KEPT_REFINEMENTS
from bilevel.lower.rounding import underflow
from bilevel.problem import BilevelProblem
from bilevel.qp.active_set import kkt_solve
from bilevel.qp.convex import factorize_convex, pinned, shifted
from bilevel.record import Hypergradient, Status, solved

PyTree = Any


def at_solution(problem: BilevelProblem, x: PyTree, found: PolyhedralSolution, batch: PyTree) -> PolyhedralSolution:
    """`found` with factors of the Hessian at its y; those of a constant Hessian are."""
    if oracles.constant_hessian(problem, x, found.iterate, batch):
        return found
    limits, flat = constraints.rows(problem, x, found.iterate), ravel_pytree(found.iterate)[0]
    unit = unit_of(limits, flat, limits.C.T @ found.multipliers)
    factor = factorize_convex(oracles.lower_hessian(problem, x, found.iterate, batch), limits.C, unit)
    strong = (limits.lo == limits.hi) | ((found.active != 0) & ~found.weak)
    moved = shifted(factor) & jnp.isfinite(factor.L[-1, -1])
    factor = once_if(moved, lambda factor: pinned(factor, limits.C, strong), factor)
    found = polyhedral.refactored(found, factor)
    broken = solved(found.status) & jnp.isnan(factor.L[-1, -1])
    return found._replace(status=jnp.where(broken, jnp.where(moved, Status.UNDETERMINED, Status.SADDLE), found.status))


def differentiate(
    problem: BilevelProblem, x: PyTree, y: PyTree, settings: Settings, estimate: bool = True, warm: Warm | None = None
) -> Hypergradient:
    """The hypergradient from the warm start y (and `warm`), by Newton corrections of (y, lam) and (u, v) together.

    The first solves for (u, v), which gives the gradient; with `estimate` further ones find out how far it may be off
    (`kkt_system`): three times that, plus an allowance for rounding, is the bound. It is an estimate; no proof from
    constants is offered here.
    """
    warm = start_of(settings, warm)
    found = polyhedral.solve(problem, x, y, problem.lower_data.full(), settings, warm)
    found = at_solution(problem, x, found, problem.lower_data.full())
    flat, unravel = ravel_pytree(found.iterate)
    system = System(problem, x, found, constraints.rows(problem, x, y), unravel)
    fy = system.fy(found.iterate)
    zero, nothing = jnp.zeros_like(flat), jnp.zeros_like(found.multipliers)
    at = Point(flat, jnp.where(system.inside, found.multipliers, 0), zero, nothing)
    left, seen = Residuals(zero, nothing, fy, nothing), None  # y is as good as it gets, (u, v) = 0 are not solved for

    if warm.factor is not None or not estimate:
        u, v = system.solve(fy)
        if warm.factor is not None:
            u, v = _refined(system, fy, u, v)
        at = at._replace(u=u, v=v)
        left, seen = system.look(at)
    status, good, error = found.status, jnp.array(Status.UNCHECKED), jnp.full((), jnp.nan, flat.dtype)
    if estimate:
        at, seen, off = solved_with_error(system, at, left)
        rounding = jnp.finfo(flat.dtype).eps * flat.size * seen.sizes
        rounding = rounding + underflow(seen.sizes, at.u) + underflow(seen.sizes, at.v)
        status, good, error = _resolved(system, at, off), jnp.array(Status.ESTIMATED), 3 * off.gradient + rounding
    assert seen is not None
    return conclude(
        status, good, x, seen.value, seen.gradient, error, y=unravel(at.y), v=unravel(at.u),
        lower_residual=seen.lower_residual, linear_residual=seen.linear_residual, active_margin=found.margin,
    )  # fmt: skip


def _resolved(system: System, at: Point, off: Error) -> Array:
    """The lower level's status, with what the errors of y and the multipliers say of the active rows: WEAKLY_ACTIVE
    where they may turn one, STALLED where they are more than rounding of the data and may.
    """
    found = system.found
    there = sides.Solved(system.limits, found.factor, found.inverse, found.active, at.y, at.lam).sides(off.y, off.lam)
    touching = (found.status == Status.CONVERGED) & jnp.any(there.near)
    status = jnp.where(touching, Status.WEAKLY_ACTIVE, found.status)
    return jnp.where(solved(status) & there.unknown, Status.STALLED, status)


class _Adjoint(NamedTuple):
    """Carry of `_refined`: (u, v), what is left of their equations, its norm and the last pass's."""

    u: Array
    v: Array
    r_u: Array
    r_v: Array
    size: Array
    before: Array
    count: Array


def _refined(system: System, fy: Array, u: Array, v: Array) -> tuple[Array, Array]:
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
    """The answer where the lower level ended as `lower`: with status `good` where that is CONVERGED and all is finite,
    and where `good` is no good word.

    gradient [dim x]; a failure is never a number, and a gradient whose error overflows is one.
    """
    failed = ~solved(lower)
    good = jnp.where((lower == Status.CONVERGED) | ~solved(good), good, lower)
    bounded = ~jnp.isnan(error) | (good == Status.UNCHECKED)  # that one has no bound
    finite = jnp.isfinite(gradient).all() & jnp.isfinite(value) & bounded
    return Hypergradient(
        value=jnp.where(failed, jnp.nan, value),
        gradient=ravel_pytree(x)[1](jnp.where(failed | ~finite, jnp.nan, gradient)),
        error_bound=jnp.where(failed | ~finite, jnp.inf, error),
        status=jnp.where(failed, lower, jnp.where(finite, good, Status.NONFINITE)),
        **rest,
    )


def implicit_solution(problem: BilevelProblem, x: PyTree, y: PyTree, settings: Settings) -> Solved:
    """y(x), differentiable in x and in the problem's arrays in both modes and again: a root of the masked KKT system

        grad_y g + C_a' lam_a = 0,    (C y - bound)_a = 0,    lam_i = 0 for i outside of a,

    whose Jacobian is symmetric. NaN where the lower level is infeasible or unsolved.
    """
    lower_batch = problem.lower_data.full()
    fixed, fixed_x = lax.stop_gradient((problem, x))
    fixed_batch = fixed.lower_data.full()
    found = polyhedral.solve(fixed, fixed_x, lax.stop_gradient(y), fixed_batch, settings)
    found = lax.stop_gradient(at_solution(fixed, fixed_x, found, fixed_batch))
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
