"""`Newton`: the method for lower levels without constraints. It finds y with R(x, y) = 0, and a certificate."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.backend.norms import norms, norms_and_sums
from bilevel.linear import DENSE_LIMIT, LinearSolver
from bilevel.lower import adjoint as unconstrained
from bilevel.lower.directions import directions
from bilevel.lower.method import Adjoint, LowerMethod, LowerSolution, Solved
from bilevel.problem import BilevelProblem, Minimize
from bilevel.record import Hypergradient, Status
from bilevel.struct import static, struct

PyTree = Any
LEAST = 1 / 64  # the shortest Newton step of a fixed point


@struct
class Newton(LowerMethod):
    """Newton's method for the lower level, with backtracking (Minimize) or Picard steps (FixedPoint) as safeguard.

    Minimize: d = -H^-1 R; where Cholesky fails, a multiple of the absolute row sums is added to H's diagonal (dense),
    and CG stops at negative curvature (matrix-free, forcing term min(0.01, |R|/|R_0|)). The step is halved until g
    decreases (Armijo, 1e-4), or |R| halves while g does not rise beyond rounding.
    FixedPoint: d = -(I - T_y)^-1 R by LU or GMRES, along which |R| falls: the first of t = 1, 1/2, ... 1/64 with
    |R(y + t d)| <= (1 - t/2) |R|, else y <- T(x, y), which is the safe step of a contraction.
    A dense factor serves again while it cuts |R| tenfold (chord steps): a quadratic is factored once.

    The next direction's length estimates the error of y, whatever the scales of g and of y. With s^2 = |y|^2 +
    |longest step so far|^2, CONVERGED means that it is at most tol s; or that it was at most sqrt(eps) s, and |R| does
    not halve any more, nor g fall or the length halve: rounding allows no more. Where |R| and g stop falling before,
    the status is STALLED.
    Minimize: CONVERGED needs a Hessian that is positive semidefinite up to rounding (dense; matrix-free only along
    CG's directions), else SADDLE. s is one number: entries of y much smaller than the largest are less exact by that
    ratio.

    Args:
        tol: accuracy of y relative to s; default 10 eps of y's dtype.
        max_steps: steps, those rejected by the safeguard included; a look at the start is always taken.
        dense: form the Hessian; default where y has at most `linear.DENSE_LIMIT` entries.
    """

    tol: Any = None
    max_steps: int = static(default=400)
    dense: bool | None = static(default=None)

    def solve(self, problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> LowerSolution:
        """The lower-level solution from the warm start y, by `lower.newton.solve`."""
        return solve(problem, x, y, batch, self)

    def hypergradient(self, problem: BilevelProblem, x: PyTree, y: PyTree, adjoint: Adjoint) -> Hypergradient:
        """By the solution's last factor, or by products; see `lower.adjoint`."""
        return unconstrained.differentiate(problem, x, self.solve(problem, x, y, problem.lower_data.full()), adjoint)

    def solved(self, problem: BilevelProblem, x: PyTree, y: PyTree, method: LinearSolver | None) -> Solved:
        """Derivatives likewise."""
        return unconstrained.implicit_solution(problem, x, y, self.solve, method)


def solve(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree, settings: Newton) -> LowerSolution:
    """The lower-level solution from the warm start y, without constraints. Pure; for jit and vmap.

    Each pass of the loop looks at one trial point, so that every oracle is compiled once; the first looks at the start.
    """
    flat, unravel = ravel_pytree(y)
    level = _level(problem, x, y, batch, settings)

    def go_on(c: _Search) -> Array:
        return (c.status == Status.MAX_STEPS) & (c.steps < max(settings.max_steps, 1))

    end = lax.while_loop(go_on, partial(_step, level), _start(level, flat))
    return LowerSolution(unravel(end.y), end.R_size, end.steps, end.status, end.factor, end.R)


class _Level(NamedTuple):
    """The lower level at x, on raveled vectors. evaluate: y -> (g, R), g = 0 for a fixed point. prepare, apply,
    nothing: `directions`. minimize, dense, tol: of what kind it is, and what is asked for.
    """

    evaluate: Callable[[Array], tuple[Array, Array]]
    prepare: Callable
    apply: Callable
    nothing: PyTree
    minimize: bool
    dense: bool
    tol: Any


def _level(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree, settings: Newton) -> _Level:
    flat, unravel = ravel_pytree(y)
    dense = flat.size <= DENSE_LIMIT if settings.dense is None else settings.dense
    minimize = isinstance(problem.lower, Minimize)
    tol = 10 * jnp.finfo(flat.dtype).eps if settings.tol is None else settings.tol

    def evaluate(flat: Array) -> tuple[Array, Array]:
        if minimize:
            g, R = oracles.lower_value_and_gradient(problem, x, unravel(flat), batch)
            return g, ravel_pytree(R)[0]
        return jnp.zeros((), flat.dtype), ravel_pytree(oracles.residual(problem, x, unravel(flat), batch))[0]

    def operator(flat: Array) -> Callable[[Array], Array]:
        return oracles.flat_operator(problem, x, unravel(flat), batch)

    return _Level(evaluate, *directions(operator, flat, minimize, dense), minimize, dense, tol)


class _Search(NamedTuple):
    """Where the search stands, and its next step t d.

    y, R, d: [n] each. factor: as `directions` makes it. g: at y. t: length of the next step along d. length, R_size,
    first_size: |d|, |R| and |R at the start|. slope: R'd. reach: the longest step taken so far.
    definite: the Hessian behind d is positive semidefinite, up to rounding. fresh: the factor is R_y at y, not at an
    earlier point. safe: d is a Picard step, taken without a test. steps: trial points looked at. status: how it stands.
    """

    y: Array
    R: Array
    d: Array
    factor: PyTree
    g: Array
    t: Array
    length: Array
    R_size: Array
    first_size: Array
    slope: Array
    reach: Array
    definite: Array
    fresh: Array
    safe: Array
    steps: Array
    status: Array


class _Trial(NamedTuple):
    """A trial point and its worth.

    y, R [n], g, R_size: as in `_Search`. first: it is the start. finite: g and R are. ok: it is taken. steady: |R|
    has not halved. flat: g has not fallen, beyond rounding. refactor: R_y is to be factored anew at the point taken.
    """

    y: Array
    R: Array
    g: Array
    R_size: Array
    first: Array
    finite: Array
    ok: Array
    steady: Array
    flat: Array
    refactor: Array


def _start(level: _Level, y: Array) -> _Search:
    zero, nought, no = jnp.zeros_like(y), jnp.zeros((), y.dtype), jnp.array(False)
    return _Search(
        y, R=zero, d=zero, factor=level.nothing, g=nought, t=nought, length=nought, R_size=nought,
        first_size=nought, slope=nought, reach=nought, definite=no, fresh=no, safe=no, steps=jnp.array(0),
        status=jnp.array(Status.MAX_STEPS),
    )  # fmt: skip


def _step(level: _Level, c: _Search) -> _Search:
    """Look at y + t d; take it, or halve t; find the next direction; see whether this is the end."""
    trial = _look(level, c)
    first, ok = trial.first, trial.ok
    here = c._replace(
        y=jnp.where(first | ok, trial.y, c.y),
        R=jnp.where(first | ok, trial.R, c.R),
        g=jnp.where(ok, trial.g, c.g),
        R_size=jnp.where(first & ~trial.finite, jnp.nan, jnp.where(ok, trial.R_size, c.R_size)),
        reach=jnp.maximum(c.reach, jnp.where(ok, c.t * c.length, 0)),
    )
    here = here._replace(first_size=jnp.where(first, here.R_size, c.first_size))
    renew = ok | trial.refactor
    safe = ~renew & (c.t <= LEAST) & (not level.minimize)
    here, trusted = _redirect(level, here, renew, trial.refactor, safe)
    (size, length), (slope,) = norms_and_sums([here.y, here.d], [here.R * here.d])
    here = here._replace(
        length=length,
        slope=slope,
        t=jnp.where(renew | safe, 1, c.t / 2),
        fresh=jnp.where(renew, trial.refactor, c.fresh),
        safe=safe,
        steps=c.steps + 1,
    )
    return here._replace(status=_status(level, c, trial, here, jnp.hypot(size, here.reach), trusted))


def _look(level: _Level, c: _Search) -> _Trial:
    """The trial point. It is taken where g decreases (Armijo) or |R| halves; a fixed point's after a safe step, too."""
    eps, first = jnp.finfo(c.y.dtype).eps, c.steps == 0
    y = c.y + c.t * c.d
    g, R = level.evaluate(y)
    (R_size,) = norms(R)
    finite = jnp.isfinite(R_size) & jnp.isfinite(g)
    halved, steady = R_size <= 0.5 * c.R_size, R_size > 0.5 * c.R_size
    if level.minimize:
        slack = 1e3 * eps * (1 + jnp.abs(c.g))
        enough = ((c.slope < 0) & (g <= c.g + 1e-4 * c.t * c.slope)) | (halved & (g <= c.g + slack))
    else:
        enough = c.safe | (R_size <= (1 - c.t / 2) * c.R_size)
    ok = finite & (first | enough)
    chord = R_size <= 0.1 * c.R_size  # the old factor serves again while it cuts |R| tenfold
    refactor = jnp.where(ok, first | ~chord, ~c.fresh) if level.dense else ok
    flat = ~ok | (g >= c.g - 1e3 * eps * jnp.abs(c.g))
    return _Trial(y, R, g, R_size, first, finite, ok, steady, flat, refactor)


def _redirect(level: _Level, here: _Search, renew: Array, refactor: Array, safe: Array) -> tuple[_Search, Array]:
    """(`here` with the direction from its y where `renew`, whether that is to be trusted); else the same direction, or
    where it is `safe` the Picard step.
    """
    factor = lax.cond(refactor, level.prepare, lambda _: here.factor, here.y)
    otherwise = jnp.where(safe, -here.R, here.d)
    if level.dense:
        d, definite, trusted = level.apply(factor, here.y, here.R, None)
        d = jnp.where(renew, d, otherwise)
    else:
        eta = jnp.clip(here.R_size / here.first_size, jnp.finfo(here.y.dtype).eps, 0.01)
        kept = otherwise, here.definite, jnp.array(False)
        new = lambda: level.apply(factor, here.y, here.R, eta)  # noqa: E731
        d, definite, trusted = lax.cond(renew, new, lambda: kept)
    return here._replace(d=d, definite=definite, factor=factor), trusted


def _status(level: _Level, c: _Search, trial: _Trial, here: _Search, scale: Array, trusted: Array) -> Array:
    """How the search stands after the step from c to `here`; scale: s of `Newton`."""
    eps, ok, first = jnp.finfo(here.y.dtype).eps, trial.ok, trial.first
    small = (c.length <= eps**0.5 * scale) & ~first
    no_better = jnp.where(ok, trial.steady & (here.length >= c.length / 2), ~trial.refactor)
    stuck = here.t < eps
    if level.minimize:  # a Newton step that lowers neither |R| nor g: the conditioning allows no more
        idle = ok & ~first & c.fresh & c.definite & trial.steady & trial.flat
        no_better, stuck = no_better | idle, stuck | idle
    at_rounding = small & no_better & (here.length <= eps**0.5 * scale)
    done = (ok & trusted & (here.length <= level.tol * scale)) | at_rounding
    solved = here.definite & ((done & jnp.isfinite(scale)) | (here.R_size == 0))
    saddle = ~here.definite & ok & (here.R_size <= 10 * eps * here.first_size)
    status = jnp.where(stuck, Status.STALLED, Status.MAX_STEPS)
    status = jnp.where(solved, Status.CONVERGED, status)
    status = jnp.where(saddle, Status.SADDLE, status)
    return jnp.where((first | c.safe) & ~trial.finite, Status.NONFINITE, status)
