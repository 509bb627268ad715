"""Lower levels over polyhedra, solved exactly: a warm-started active-set method, and the implicit gradient.

    y(x) = argmin_y g(x, y)   over   lo <= C y <= hi,

g(x, .) convex, its minimiser unique, one row of C per two-sided constraint: bounds of boxes and simplices, rows of
`Polyhedron` and of `LinearCoupling` (whose hi is b - B x); lo = hi is an equality. With signed multipliers lam (>= 0 at
hi, <= 0 at lo)

    grad_y g + C' lam = 0,    lam_i = 0 or (C y)_i at its bound.

Sequential quadratic programming: each step solves a quadratic program exactly (`active_set`), warm-started from the
last active set and multipliers (`sqp`). A quadratic g takes one such step, and iterative refinement (`quadratic`).

Implicit gradient at (y, lam, a), with the same factors:

    [H  C_a'] [u]   [f_y]
    [C_a  0 ] [v] = [ 0 ],      grad F = f_x - g_yx' u - B' v.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.backend.tree import norm, poisoned
from bilevel.constraints import rows
from bilevel.lower import quadratic, sqp
from bilevel.lower.polyhedral_level import Found, Level, Settings, Warm, noise_of, start_of
from bilevel.lower.sides import Solved
from bilevel.problem import BilevelProblem
from bilevel.qp.active_set import Factor, Point, Rows, exact_inverse, factorize, kkt_solve, solve_model
from bilevel.record import Status, solved

PyTree = Any


class PolyhedralSolution(NamedTuple):
    """What `solve` returns; m rows.

    INFEASIBLE_LOWER: the iterate and the multipliers are NaN.
    """

    iterate: PyTree
    """Where the search stopped, whatever the status, shaped like the problem's y."""
    multipliers: Array
    """[m], signed: >= 0 at hi, <= 0 at lo."""
    active: Array
    """[m], 1 at hi, -1 at lo, 0 between."""
    margin: Array
    """[], how far the bound of a row must move, in units of y, until that row changes sides, the least over the rows:
    the slack of inactive ones, |lam_i| (C H^-1 C')_ii of active ones, both over |C_i|. Equalities do not count.
    """
    residual: Array
    """[], norm of (grad_y g + C' lam, violations), recomputed."""
    steps: Array
    """[], gradients of g taken."""
    status: Array
    """[], CONVERGED; WEAKLY_ACTIVE, solved with a margin of rounding error, or with active rows that depend on each
    other; INFEASIBLE_LOWER; SADDLE, H has a negative eigenvalue; UNDETERMINED, the minimiser is not unique;
    MAX_STEPS, STALLED, NONFINITE.
    """
    factor: Factor
    """Of the last step's Hessian."""
    inverse: Array
    """[m, m], of the active rows, for `kkt_solve`."""
    weak: Array
    """[m], rows whose multiplier, or slack, is rounding error."""
    noise: Array
    """[m], how much slack that is."""

    @property
    def y(self) -> PyTree:
        """The lower-level solution: the iterate where the status says that it is one (`record.solved`), else NaN."""
        return poisoned(self.iterate, solved(self.status))

    def warm(self) -> Warm:
        """Where to start on a problem with the same g_yy and normals: here, with these factors."""
        return Warm(self.active, self.factor.for_many_calls(), self.inverse)

    def kept(self) -> Settings:
        """Deprecated: `warm`."""
        return Settings(start=self.active, factor=self.factor.for_many_calls(), inverse=self.inverse)


def solve(
    problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree, settings: Settings | None = None,
    warm: Warm | None = None,
) -> PolyhedralSolution:  # fmt: skip
    """The lower-level solution from the warm start y, which need not be feasible. Pure; for jit and vmap.

    Where g's Hessian does not depend on y (found out at trace time), it is formed and factored once; else at each
    accepted point whose KKT residual the last factor did not cut tenfold, with backtracking on g along feasible steps.
    """
    settings = Settings() if settings is None else settings
    warm = start_of(settings, warm)
    flat, unravel = ravel_pytree(y)
    level = Level(problem, x, batch, unravel, rows(problem, x, y))
    find = quadratic.solve if oracles.constant_hessian(problem, x, y, batch) else sqp.solve
    return _certify(level, find(level, flat, settings, warm))


def _certify(level: Level, end: Found) -> PolyhedralSolution:
    """The residual's norm at the last point, the margin and the final status."""
    limits, model, (d, length) = level.limits, end.model, (end.factor.d, end.factor.length)
    nan, good = end.status == Status.INFEASIBLE_LOWER, end.status == Status.CONVERGED
    outside = jnp.maximum(jnp.maximum(end.at - limits.hi, limits.lo - end.at), 0)
    at = Solved(limits, end.factor, model.inverse, model.active, end.y, model.multipliers)
    sides = at.sides(*at.uncertain(ravel_pytree(level.x)[0]))
    noise = noise_of(limits, end.factor, end.y, model.multipliers)
    weak = ((sides.room <= 10 * noise) | sides.open) & (length > 0)
    units = 1 / jnp.where(length > 0, length, 1)
    margin = jnp.min(jnp.where(length > 0, jnp.maximum(sides.room, 0) * units, jnp.inf), initial=jnp.inf)
    status = jnp.where(good & (jnp.any(weak) | model.dependent), Status.WEAKLY_ACTIVE, end.status)
    return PolyhedralSolution(
        iterate=level.unravel(jnp.where(nan, jnp.nan, end.y)),
        multipliers=jnp.where(nan, jnp.nan, model.multipliers),
        active=model.active,
        margin=jnp.where(nan, jnp.nan, jnp.where(model.dependent, 0, margin)),
        residual=norm((end.R, outside)),
        steps=end.steps,
        status=jnp.where(good & (sides.unknown | at.lost()), Status.STALLED, status),
        factor=end.factor,
        inverse=model.inverse,
        weak=weak,
        noise=10 * noise / d,
    )


def adjoint(solution: PolyhedralSolution, fy: Array) -> tuple[Array, Array]:
    """(u [n], v [m]) of the module's adjoint system for f_y [n]; v is zero on inactive rows."""
    return kkt_solve(solution.factor, solution.inverse, solution.active, fy)


def refactored(solution: PolyhedralSolution, factor: Factor) -> PolyhedralSolution:
    """The solution with the factors of another Hessian."""
    return solution._replace(factor=factor, inverse=exact_inverse(factor, solution.active))


def natural_residual(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> Array:
    """Proj(y - grad_y g) - y [n] on the feasible set: zero exactly at y(x). One quadratic program; NaN if empty."""
    grad = ravel_pytree(oracles.residual(problem, x, y, batch))[0]
    return projected_step(rows(problem, x, y), ravel_pytree(y)[0], grad)


def projected_step(limits: Rows, flat: Array, d: Array) -> Array:
    """Proj(y - d) - y [n] on {lo <= C y <= hi}, y = flat [n], which need not be in it. One quadratic program; NaN if
    the set is empty.
    """
    factor = factorize(jnp.eye(flat.size, dtype=flat.dtype), limits.C)
    model = solve_model(factor, limits, Point(flat, factor.down(d)), jnp.zeros_like(limits.lo))
    return jnp.where(model.empty | model.unsolved, jnp.nan, model.p)
