"""Lower levels over polyhedra, solved exactly: a warm-started active-set method, and the implicit gradient.

    y(x) = argmin_y g(x, y)   over   lo <= C y <= hi,

g(x, .) strongly convex, one row of C per two-sided constraint: bounds of boxes and simplices, rows of `Polyhedron` and
of `LinearCoupling` (whose hi is b - B x); lo = hi is an equality. With signed multipliers lam (>= 0 at hi, <= 0 at lo)

    grad_y g + C' lam = 0,    lam_i = 0 or (C y)_i at its bound.

Sequential quadratic programming: each step solves a quadratic program exactly (`active_set`), warm-started from the
last active set and multipliers. A quadratic g takes one such step and one of iterative refinement.

Implicit gradient at (y, lam, a), with the same factors:

    [H  C_a'] [u]   [f_y]
    [C_a  0 ] [v] = [ 0 ],      grad F = f_x - g_yx' u - B' v.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.constraints import rows
from bilevel.problem import BilevelProblem
from bilevel.qp.active_set import Factor, Model, Rows, factorize, kkt_solve, masked_inverse, solve_model
from bilevel.record import Status
from bilevel.struct import static, struct

PyTree = Any


@struct
class Settings:
    """The fields of `ActiveSet`, which explains them."""

    tol: Any = None
    start: Any = None
    factor: Any = None
    inverse: Any = None
    max_steps: int = static(default=100)
    max_changes: int = static(default=200)


class PolyhedralSolution(NamedTuple):
    """What `solve` returns.

    y: shaped like the problem's. multipliers [m], signed. active [m]: 1 at hi, -1 at lo, 0 between. margin []: how far
    the bound of a row must move, in units of y, until that row changes sides, the least over the rows: the slack of
    inactive ones, |lam_i| (C H^-1 C')_ii of active ones, both over |C_i|; equalities do not count. residual []: norm of
    (grad_y g + C' lam, violations). steps []: gradients of g taken. factor, inverse: the last step's.
    weak, noise [m]: rows whose multiplier, or slack, is rounding error, and how much slack that is.
    status []: CONVERGED; WEAKLY_ACTIVE, solved with a margin of rounding error, or with active rows that depend on each
    other; INFEASIBLE_LOWER, y is NaN; SADDLE, H is not positive definite; MAX_STEPS, STALLED, NONFINITE.

    `kept` makes of it the settings of a warm start.
    """

    y: PyTree
    multipliers: Array
    active: Array
    margin: Array
    residual: Array
    steps: Array
    status: Array
    factor: Factor
    inverse: Array
    weak: Array
    noise: Array

    def kept(self) -> Settings:
        """Settings for a problem with the same g_yy and normals: start here, with these factors."""
        return Settings(start=self.active, factor=self.factor.for_many_calls(), inverse=self.inverse)


class _Search(NamedTuple):
    """y and the model's step p from it, of length t; value of g, residual norm of the model's KKT system, its start;
    the longest step so far; whether y is feasible; factor and model; steps; status.
    """

    y: Array
    t: Array
    g: Array
    slope: Array
    reach: Array
    feasible: Array
    factor: Factor
    model: Model
    steps: Array
    status: Array


def solve(
    problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree, settings: Settings | None = None
) -> PolyhedralSolution:
    """The lower-level solution from the warm start y, which need not be feasible. Pure; for jit and vmap.

    Where g's Hessian does not depend on y (found out at trace time), it is formed and factored once; else at each
    accepted point whose KKT residual the last factor did not cut tenfold, with backtracking on g along feasible steps.
    """
    settings = Settings() if settings is None else settings
    flat, unravel = ravel_pytree(y)
    limits = rows(problem, x, y)
    eps, m, dtype = jnp.finfo(flat.dtype).eps, limits.C.shape[0], flat.dtype
    tol = 10 * eps if settings.tol is None else settings.tol
    bad = jnp.isnan(limits.lo).any() | jnp.isnan(limits.hi).any() | ~jnp.isfinite(limits.C).all()
    constant = oracles.constant_hessian(problem, x, y, batch)

    def evaluate(flat: Array) -> tuple[Array, Array]:
        g, R = oracles.lower_value_and_gradient(problem, x, unravel(flat), batch)
        return g, ravel_pytree(R)[0]

    def factor_at(flat: Array) -> Factor:
        return factorize(oracles.lower_hessian(problem, x, unravel(flat), batch), limits.C)

    def guess(z: Array, factor: Factor) -> Array:
        at = limits.C @ flat
        near = 100 * eps * (jnp.abs(limits.C) @ jnp.abs(flat) + jnp.linalg.norm(limits.C, axis=1))
        moved = at - (factor.W @ z) / factor.d
        held = jnp.where(jnp.abs(at - limits.hi) <= near, moved >= limits.hi, False)
        held_lo = jnp.where(jnp.abs(at - limits.lo) <= near, moved <= limits.lo, False)
        some = jnp.any(held | held_lo)
        high, low = jnp.where(some, held, moved > limits.hi), jnp.where(some, held_lo, moved < limits.lo)
        return jnp.where(high | (limits.lo == limits.hi), 1, jnp.where(low, -1, 0)).astype(dtype)

    zero, no = jnp.zeros((), dtype), jnp.array(False)
    start = settings.start
    nobody = jnp.zeros(m, dtype)
    if constant:
        grad = ravel_pytree(oracles.residual(problem, x, y, batch))[0]
        kept = settings.factor is not None
        factor = settings.factor if kept else factor_at(flat)
        z = factor.down(grad)
        a = guess(z, factor) if start is None else jnp.asarray(start, dtype)
        inverse = settings.inverse if kept and start is not None else None
        model = solve_model(factor, limits, flat, z, None, a, settings.max_changes, inverse)
        end = _refine(problem, x, unravel, batch, limits, factor, model, flat, jnp.linalg.norm(grad), kept)
        stale = kept & (end.status == Status.CONVERGED) & _contradicts(limits, end)
        status = _ends(jnp.where(stale, Status.STALLED, end.status), factor, model, bad)
        return _certify(unravel, limits, end._replace(status=status))

    def body(c: _Search) -> _Search:
        first = c.steps == 0
        trial = c.y + c.t * c.model.p
        g, grad = evaluate(trial)
        R = grad + limits.C.T @ c.model.multipliers
        finite = jnp.isfinite(g) & jnp.isfinite(R).all()
        # Descent is asked for between feasible points only: the first full step makes y feasible.
        enough = g <= c.g + 1e-4 * c.t * c.slope + 1e3 * eps * (1 + jnp.abs(c.g))
        ok = finite & (first | ~c.feasible | enough)
        before = jnp.linalg.norm(c.factor.L @ (c.factor.L.T @ c.model.p))
        renew = ok & ~first & ~((jnp.linalg.norm(R) <= 0.1 * before) & (c.t == 1))
        factor = lax.cond(renew, lambda: factor_at(trial), lambda: c.factor)
        z = factor.down(R)
        a = c.model.active
        a = jnp.where(first, guess(z, factor), a) if start is None else a
        new = lambda: solve_model(factor, limits, trial, z, c.model.multipliers, a, settings.max_changes)  # noqa: E731
        model = lax.cond(ok, new, lambda: c.model)
        length = jnp.linalg.norm(model.p)
        y_next = jnp.where(ok, trial, c.y)
        reach = jnp.maximum(c.reach, jnp.where(first, 0, jnp.linalg.norm(c.t * c.model.p)))
        scale = jnp.linalg.norm(y_next) + jnp.where(first, length, reach)
        t = jnp.where(ok, 1, c.t / 2).astype(dtype)
        before = jnp.linalg.norm(c.model.p)
        level = ~first & (c.t == 1) & (length >= before / 2) & (length <= jnp.sqrt(eps) * scale)  # rounding
        done = ok & ((length <= tol * scale) | level)
        status = jnp.where(done, Status.CONVERGED, jnp.where(t < eps, Status.STALLED, Status.MAX_STEPS))
        status = _ends(status, factor, model, (first & ~finite) | bad)
        feasible = c.feasible | (ok & ~first & (c.t == 1))
        return _Search(y_next, t, jnp.where(ok, g, c.g), grad @ model.p, reach, feasible, factor, model,
                       c.steps + 1, status)  # fmt: skip

    a0 = nobody if start is None else jnp.asarray(start, dtype)
    nothing = Model(jnp.zeros_like(flat), nobody, a0, jnp.zeros((m, m), dtype), no, no, no, nobody, nobody)
    begin = _Search(flat, zero + 1, zero, zero, zero, no, factor_at(flat), nothing, jnp.array(0),
                    jnp.array(Status.MAX_STEPS))  # fmt: skip

    def go_on(c: _Search) -> Array:
        return (c.status == Status.MAX_STEPS) & (c.steps < settings.max_steps)

    end = lax.while_loop(go_on, body, begin)
    last = end.y + jnp.where(end.status == Status.CONVERGED, end.model.p, 0)
    R = ravel_pytree(oracles.residual(problem, x, unravel(last), batch))[0] + limits.C.T @ end.model.multipliers
    return _certify(unravel, limits, _Found(last, end.factor, end.model, limits.C @ last, R, end.steps, end.status))


class _Found(NamedTuple):
    """y; factor and model; C y; grad_y g + C' lam there; steps; status."""

    y: Array
    factor: Factor
    model: Model
    at: Array
    R: Array
    steps: Array
    status: Array


REFINEMENTS, KEPT_REFINEMENTS = 5, 30


def _refine(
    problem: BilevelProblem, x: PyTree, unravel: Any, batch: PyTree, limits: Rows, factor: Factor, model: Model,
    flat: Array, size: Array, kept: bool,
) -> _Found:  # fmt: skip
    """The quadratic g's solution from its model's: iterative refinement on the model's rows, until the residual is
    rounding error, measured by tr(H) |y| + |grad_y g| at the start (`size`), or no longer halves. A step's own rounding
    error is in proportion to its length, so that a step of some length is always followed by another one. Factors that
    were kept may be of another Hessian: then more steps are allowed, and less residual at the end.
    """
    eps, tiny = (float(getattr(jnp.finfo(flat.dtype), name)) for name in ("eps", "tiny"))
    most, enough = (KEPT_REFINEMENTS, eps**-0.25) if kept else (REFINEMENTS, eps**-0.5)
    inside = model.active != 0
    bound = jnp.where(model.active > 0, limits.hi, limits.lo)

    def look(flat: Array, lam: Array) -> tuple[Array, Array, Array]:
        """(C y, R, the residual's norm in units of what rounding makes of it)."""
        at = limits.C @ flat
        R = ravel_pytree(oracles.residual(problem, x, unravel(flat), batch))[0] + limits.C.T @ lam
        scale = 10 * eps * (factor.trace * jnp.linalg.norm(flat) + size)
        off = jnp.max(jnp.where(inside, factor.d * jnp.abs(bound - at) / jnp.maximum(model.noise, tiny), 0), initial=0)
        return at, R, jnp.maximum(off, jnp.linalg.norm(R) / jnp.maximum(scale, tiny))

    def go_on(c: tuple) -> Array:
        size, before, far, count = c[-4:]
        return ((size > 1) | far) & (size <= before / 2) & (count < most)

    def body(c: tuple) -> tuple:
        flat, lam, at, R, size, _, _, count = c
        p, change = kkt_solve(factor, model.inverse, model.active, -R, jnp.where(inside, bound - at, 0))
        return follow(flat, lam + change, p, size, count + 1)

    def follow(flat: Array, lam: Array, p: Array, before: Array, count: Array) -> tuple:
        y = flat + p
        return y, lam, *look(y, lam), before, p @ p > 0.01 * (y @ y), count

    begin = follow(flat, model.multipliers, model.p, jnp.full((), jnp.inf, flat.dtype), jnp.array(0))
    flat, lam, at, R, size, _, _, count = lax.while_loop(go_on, body, begin)
    status = jnp.where(size <= enough, Status.CONVERGED, Status.STALLED)
    return _Found(flat, factor, model._replace(multipliers=lam), at, R, count + 2, status)


def _contradicts(limits: Rows, end: _Found) -> Array:
    """Whether a row is violated, or its multiplier has the wrong sign, by more than rounding error."""
    noise, d, a = 100 * end.model.noise, end.factor.d, end.model.active
    outside = d * jnp.maximum(end.at - limits.hi, limits.lo - end.at) > noise
    wrong = (a * end.model.multipliers < -d * noise) & (limits.lo != limits.hi)
    return jnp.any(outside | wrong)


def _ends(status: Array, factor: Factor, model: Model, bad: Array) -> Array:
    """The status after a model was solved, where it did not go well."""
    status = jnp.where(model.unsolved, Status.STALLED, status)
    status = jnp.where(model.empty, Status.INFEASIBLE_LOWER, status)
    status = jnp.where(jnp.isnan(factor.L[-1, -1]), Status.SADDLE, status)
    return jnp.where(bad, Status.NONFINITE, status)


def _certify(unravel: Any, limits: Rows, end: _Found) -> PolyhedralSolution:
    """The residual's norm at the last point, the margin and the final status."""
    model, d, length = end.model, end.factor.d, end.factor.length
    nan = end.status == Status.INFEASIBLE_LOWER
    outside = jnp.maximum(jnp.maximum(end.at - limits.hi, limits.lo - end.at), 0)
    residual = jnp.sqrt(jnp.sum(end.R**2) + jnp.sum(outside**2))
    weak = (model.room <= 10 * model.noise) & (length > 0)
    units = 1 / jnp.where(length > 0, length, 1)
    margin = jnp.min(jnp.where(length > 0, jnp.maximum(model.room, 0) * units, jnp.inf), initial=jnp.inf)
    status = jnp.where(
        (end.status == Status.CONVERGED) & (jnp.any(weak) | model.dependent), Status.WEAKLY_ACTIVE, end.status
    )
    return PolyhedralSolution(
        y=unravel(jnp.where(nan, jnp.nan, end.y)),
        multipliers=jnp.where(nan, jnp.nan, model.multipliers),
        active=model.active,
        margin=jnp.where(nan, jnp.nan, jnp.where(model.dependent, 0, margin)),
        residual=residual,
        steps=end.steps,
        status=status,
        factor=end.factor,
        inverse=model.inverse,
        weak=weak,
        noise=10 * model.noise / d,
    )


def adjoint(solution: PolyhedralSolution, fy: Array) -> tuple[Array, Array]:
    """(u [n], v [m]) of the module's adjoint system for f_y [n]; v is zero on inactive rows."""
    return kkt_solve(solution.factor, solution.inverse, solution.active, fy)


def refactored(solution: PolyhedralSolution, factor: Factor) -> PolyhedralSolution:
    """The solution with the factors of another Hessian."""
    return solution._replace(factor=factor, inverse=masked_inverse(factor.S, solution.active)[0])


def natural_residual(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> Array:
    """Proj(y - grad_y g) - y [n] on the feasible set: zero exactly at y(x). One quadratic program; NaN if empty."""
    grad = ravel_pytree(oracles.residual(problem, x, y, batch))[0]
    return projected_step(rows(problem, x, y), ravel_pytree(y)[0], grad)


def projected_step(limits: Rows, flat: Array, d: Array) -> Array:
    """Proj(y - d) - y [n] on {lo <= C y <= hi}, y = flat [n], which need not be in it. One quadratic program; NaN if
    the set is empty.
    """
    factor = factorize(jnp.eye(flat.size, dtype=flat.dtype), limits.C)
    nobody = jnp.zeros(len(limits.C), flat.dtype)
    model = solve_model(factor, limits, flat, factor.down(d), None, nobody, Settings().max_changes)
    return jnp.where(model.empty | model.unsolved, jnp.nan, model.p)
