"""Derivatives of F through a polyhedral lower level: the hypergradient with its error, and F for `jax.grad`.

On the rows that are active at y(x), with H = g_yy, G = g_yx and the rows' bounds moving with x by -B (`polyhedral`),

    grad F = f_x - G' u - B' v,    [H  C_a'; C_a  0] [u; v] = [f_y; 0].

F is differentiable where every active row has a multiplier and the active rows are independent; elsewhere it has a
kink, and this is one of its one-sided derivatives. `directional` gives them all.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import constraints, oracles
from bilevel.linear import refine
from bilevel.lower import polyhedral
from bilevel.lower.polyhedral import PolyhedralSolution, Settings
from bilevel.problem import BilevelProblem
from bilevel.qp.active_set import Rows, factorize, kkt_solve, solve_model
from bilevel.record import Hypergradient, Status

PyTree = Any


def lower_failed(status: Array) -> Array:
    """Whether a constrained lower level has no usable solution; a weakly active one has."""
    return (status != Status.CONVERGED) & (status != Status.WEAKLY_ACTIVE)


def _at_solution(problem: BilevelProblem, x: PyTree, found: PolyhedralSolution, batch: PyTree) -> PolyhedralSolution:
    """`found` with factors of the Hessian at its y; those of a constant Hessian are."""
    if oracles.constant_hessian(problem, x, found.y, batch):
        return found
    C = constraints.rows(problem, x, found.y).C
    return polyhedral.refactored(found, factorize(oracles.lower_hessian(problem, x, found.y, batch), C))


def differentiate(
    problem: BilevelProblem, x: PyTree, y: PyTree, settings: Settings, estimate: bool = True
) -> Hypergradient:
    """The hypergradient from the warm start y, by Newton corrections of (y, lam) and (u, v) together.

    The first solves for (u, v), which gives the gradient; with `estimate` a second one gives a gradient that is right
    to higher order: twice the distance of the two, plus an allowance for rounding, estimates the first one's error. It
    is an estimate, and supposes that the active set is the right one, which the margin shows; no proof from constants
    is offered here.
    """
    upper_batch, lower_batch = problem.upper_data.full(), problem.lower_data.full()
    found = polyhedral.solve(problem, x, y, lower_batch, settings)
    found = _at_solution(problem, x, found, lower_batch)
    limits = constraints.rows(problem, x, y)
    inside = found.active != 0
    bound = jnp.where(found.active > 0, limits.hi, limits.lo)
    flat, unravel = ravel_pytree(found.y)
    fy = ravel_pytree(oracles.upper_gradients(problem, x, found.y, upper_batch)[1])[0]

    solve = partial(kkt_solve, found.factor, found.inverse, found.active)

    def look(flat: Array, lam: Array, u: Array, v: Array) -> tuple[tuple, tuple]:
        """((y, lam, u, v, residuals), what is seen there)."""
        value, gradients = oracles.upper_value_and_gradients(problem, x, unravel(flat), upper_batch)
        directions = oracles.directions(problem, x, unravel(flat), unravel(u), lower_batch)
        fx, fy, R, Hu, cross = (ravel_pytree(part)[0] for part in (*gradients, *directions))
        implicit = cross + limits.B.T @ v
        R, r_u = R + limits.C.T @ lam, fy - Hu - limits.C.T @ v
        off, r_v = (jnp.where(inside, part, 0) for part in (bound - limits.C @ flat, -(limits.C @ u)))
        sizes = jnp.stack([jnp.linalg.norm(part) for part in (jnp.append(R, off), jnp.append(r_u, r_v), fx, implicit)])
        return (flat, lam, u, v, R, off, r_u, r_v), (flat, u, value, fx - implicit, sizes)

    def correct(carry: tuple, _: None) -> tuple[tuple, tuple]:
        """Solve for the corrections of (y, lam) and (u, v), and look there."""
        flat, lam, u, v, R, off, r_u, r_v = carry
        (d, dlam), (du, dv) = solve(-R, off), solve(r_u, r_v)
        return look(flat + d, lam + dlam, u + du, v + dv)

    def kept_refined(u: Array, v: Array) -> tuple[Array, Array]:
        """Corrections until the adjoint's residual is rounding error or no longer halves: kept factors may be stale."""

        def seen(u: Array, v: Array) -> tuple:
            Hu = ravel_pytree(oracles.hvp(problem, x, found.y, unravel(u), lower_batch))[0]
            r_u, r_v = fy - Hu - limits.C.T @ v, jnp.where(inside, -(limits.C @ u), 0)
            return u, v, r_u, r_v, jnp.sqrt(jnp.sum(r_u**2) + jnp.sum(r_v**2))

        def go_on(c: tuple) -> Array:
            u, _, _, _, size, before, count = c
            noise = 10 * jnp.finfo(flat.dtype).eps * (found.factor.trace * jnp.linalg.norm(u) + jnp.linalg.norm(fy))
            return (size > noise) & (size <= before / 2) & (count < polyhedral.KEPT_REFINEMENTS)

        def body(c: tuple) -> tuple:
            u, v, r_u, r_v, size, _, count = c
            du, dv = solve(r_u, r_v)
            return *seen(u + du, v + dv), size, count + 1

        far = jnp.full((), jnp.inf, flat.dtype)
        return lax.while_loop(go_on, body, (*seen(u, v), far, jnp.array(0)))[:2]

    lam, kept = jnp.where(inside, found.multipliers, 0), settings.factor is not None
    if kept or not estimate:
        uv = solve(fy)
        first = look(flat, lam, *(kept_refined(*uv) if kept else uv))
    if estimate:
        zero, nothing = jnp.zeros_like(flat), jnp.zeros_like(lam)
        begin = first[0] if kept else (flat, lam, zero, nothing, zero, nothing, fy, nothing)
        (y, _), (u, _), (value, _), (slope, better), (sizes, _) = lax.scan(correct, begin, length=2)[1]
        error = 2 * jnp.linalg.norm(better - slope) + jnp.finfo(flat.dtype).eps * flat.size * jnp.sum(sizes[2:])
        good = jnp.array(Status.ESTIMATED)
    else:
        y, u, value, slope, sizes = first[1]
        error, good = jnp.full((), jnp.nan, flat.dtype), jnp.array(Status.UNCHECKED)
    return conclude(
        found.status, good, x, value, slope, error,
        y=unravel(y), lower_residual=sizes[0], linear_residual=sizes[1], active_margin=found.margin, v=unravel(u),
    )  # fmt: skip


def conclude(
    solved: Array, good: Array, x: PyTree, value: Array, gradient: Array, error: Array, **rest: Any
) -> Hypergradient:
    """The answer where the lower level ended as `solved`: with status `good` where that is CONVERGED and all is finite.

    gradient [dim x]; a failure is never a number.
    """
    failed = lower_failed(solved)
    finite = jnp.isfinite(gradient).all() & jnp.isfinite(value)
    return Hypergradient(
        value=jnp.where(failed, jnp.nan, value),
        gradient=ravel_pytree(x)[1](jnp.where(failed | ~finite, jnp.nan, gradient)),
        error_bound=jnp.where(failed | ~finite, jnp.inf, error),
        status=jnp.where(failed | finite, jnp.where(solved == Status.CONVERGED, good, solved), Status.NONFINITE),
        **rest,
    )


def implicit_value(problem: BilevelProblem, x: PyTree, y: PyTree, settings: Settings) -> Array:
    """f(x, y(x)), differentiable in x in both modes and again: a root of the masked KKT system

        grad_y g + C_a' lam_a = 0,    (C y - bound)_a = 0,    lam_i = 0 for i outside of a,

    whose Jacobian is symmetric. NaN where the lower level is infeasible or unsolved.
    """
    upper_batch, lower_batch = problem.upper_data.full(), problem.lower_data.full()
    fixed_x = lax.stop_gradient(x)
    found = polyhedral.solve(problem, fixed_x, lax.stop_gradient(y), lower_batch, settings)
    found = lax.stop_gradient(_at_solution(problem, fixed_x, found, lower_batch))
    inside = found.active != 0
    flat, unravel = ravel_pytree(found.y)
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
    start = jnp.where(lower_failed(found.status), jnp.nan, start)
    z = lax.custom_root(residual, start, lambda _, z: z, tangent)
    return oracles.upper_value(problem, x, unravel(z[:n]), upper_batch)


def directional(
    problem: BilevelProblem, x: PyTree, direction: PyTree, y: PyTree, settings: Settings | None = None
) -> tuple[Array, Array]:
    """(-F'(x; -d), F'(x; d)), the one-sided derivatives along the direction d, shaped like x: equal unless F has a
    kink at x across d. y: warm start of the lower level.

    y'(x; d) solves the quadratic program  min p'H p/2 + p'G d  over  C_i p = -B_i d on active rows with a multiplier,
    C_i p <= -B_i d (for rows at hi) on the weakly active ones: an inactive row is weakly active where its slack is at
    most its rounding error, and so is an active one with such a multiplier. NaN where the lower level is not solved.

    Reference: Jittorntrum. Solution point differentiability without strict complementarity in nonlinear programming.
    Mathematical Programming Studies 21, 1984.
    """
    upper_batch, lower_batch = problem.upper_data.full(), problem.lower_data.full()
    found = polyhedral.solve(problem, x, y, lower_batch, settings)
    found = _at_solution(problem, x, found, lower_batch)
    limits = constraints.rows(problem, x, y)
    (fx, fy), d = oracles.upper_gradients(problem, x, found.y, upper_batch), ravel_pytree(direction)[0]
    fx, fy = ravel_pytree(fx)[0], ravel_pytree(fy)[0]
    at = limits.C @ ravel_pytree(found.y)[0]
    near_hi, near_lo = jnp.abs(at - limits.hi) <= found.noise, jnp.abs(at - limits.lo) <= found.noise
    strong = (found.active != 0) & ~found.weak
    inf = jnp.full_like(at, jnp.inf)
    zero = jnp.zeros_like(ravel_pytree(found.y)[0])

    def along(sign: int) -> Array:
        moved = -sign * (limits.B @ d)
        held_hi = strong | near_hi | (found.weak & (found.active > 0))
        held_lo = strong | near_lo | (found.weak & (found.active < 0))
        cone = Rows(limits.C, jnp.where(held_lo, moved, -inf), jnp.where(held_hi, moved, inf), limits.B)
        slope = sign * ravel_pytree(oracles.cross_forward(problem, x, found.y, direction, lower_batch))[0]
        start = jnp.where(strong, 1, 0).astype(at.dtype)
        model = solve_model(found.factor, cone, zero, found.factor.down(slope), None, start, 200)
        change = sign * (fx @ d) + fy @ model.p
        return jnp.where(lower_failed(found.status) | model.empty | model.unsolved, jnp.nan, change)

    return -along(-1), along(1)
