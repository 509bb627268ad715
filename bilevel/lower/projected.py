"""Lower levels on boxes, balls, simplices and products of them, by products with the Hessian alone: y may be large.

    y(x) = argmin over y in Y of g(x, y),   g(x, .) strongly convex,   y = Proj(y - s R(x, y)),   R = grad_y g.

Accelerated projected gradient steps find the face of Y that holds y(x); Newton steps on that face then take over.
With P the orthogonal projection on the face's tangent space and D = mu I on a ball whose boundary is active, where
R = -mu (y - centre), and D = 0 elsewhere,

    Newton step:        P (H + D) P d = -P R,    y <- Proj(y + d),
    implicit gradient:  P (H + D) P u = P f_y,   grad F = f_x - g_yx' u,

both by conjugate gradients in the tangent space: no matrix, and no solve where H is a multiple of the identity.

Reference: Beck, Teboulle. A fast iterative shrinkage-thresholding algorithm. SIAM Journal on Imaging Sciences 2, 2009;
    restarted as in O'Donoghue, Candes, 2015, arXiv:1204.3982. Bertsekas. Projected Newton methods. SIAM Journal on
    Control and Optimization 20, 1982.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.backend.tree import norm
from bilevel.linear import CG, DENSE_LIMIT, nystrom
from bilevel.linear.nystrom import Nystrom
from bilevel.problem import BilevelProblem
from bilevel.qp.face import Face
from bilevel.record import Status
from bilevel.struct import static, struct

PyTree = Any
SKETCH_LIMIT = 1_000_000  # unknowns; a sketch takes memory for a hundred vectors like y while it is made
ROUND = 20  # accelerated steps between Newton steps
PATIENCE = 20  # rounds in which a small residual may fail to halve


@struct
class Settings:
    """The fields of `ProjectedNewton`, which explains them."""

    tol: Any = None
    max_rounds: int = static(default=500)


class ProjectedSolution(NamedTuple):
    """What `solve` returns."""

    y: PyTree
    """Shaped like the problem's."""
    residual: Array
    """[], |y - Proj(y - s R)|/s, recomputed."""
    steps: Array
    """[], rounds."""
    status: Array
    """[], CONVERGED; WEAKLY_ACTIVE, where an active constraint's multiplier, or an inactive one's slack, is rounding
    error; STALLED, MAX_STEPS, NONFINITE.
    """
    face: Face
    """At y."""
    R: Array
    """[n], at y, raveled."""
    sketch: Nystrom | None = None
    """Of H at the start, for `tangent_solve`; zeros where a Newton step has failed since; None up to
    `linear.DENSE_LIMIT` unknowns, beyond `SKETCH_LIMIT`, in half precision, with a ball, and where H is given.
    """


def tangent_solve(
    problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree, face: Face, sketch: Nystrom | None = None
) -> Callable:
    """(b, tol) -> v in the tangent space with P (H + D) P v = P b; `sketch`: of an H nearby, a preconditioner.

    With H given by its diagonal and E = H + D, v = E^-1 (b - N'm), N E^-1 N' m = N E^-1 b on the free entries: the
    normals N of a face are of different sets, so that N E^-1 N' is diagonal and nothing is solved.
    """
    diagonal = oracles.lower_diagonal(problem, x, y, batch)
    if diagonal is not None:
        E = ravel_pytree(diagonal)[0] + face.mu
        N = face.normals / E[None]
        size = jnp.sum(face.normals * N, axis=1)

        def closed(b: Array, tol: Any = None) -> Array:
            v = jnp.where(face.free, b, 0) / E
            return v - ((face.normals @ v) / jnp.where(size > 0, size, 1)) @ N

        return closed
    hessian = oracles.flat_operator(problem, x, y, batch)
    if not problem.constrained_lower:  # the face is all of R^n
        return lambda b, tol=None: CG(tol, preconditioner=sketch).iterate(hessian, b)[0]

    def operator(v: Array) -> Array:
        along = face.tangent(v)
        curved = hessian(along) + face.mu * along
        return face.tangent(curved) + (v - along) / face.s  # definite on all of R^n: rounding errors off the face fade

    inside = None if sketch is None else sketch.within(face.tangent)
    return lambda b, tol=None: CG(tol, preconditioner=inside).iterate(operator, face.tangent(b))[0]


class _Level(NamedTuple):
    """The lower level at one x, in the raveled y [n]. Not a pytree of arrays: it stays in one trace."""

    problem: BilevelProblem
    x: PyTree
    batch: PyTree
    unravel: Callable[[Array], PyTree]
    tol: Any

    def project(self, y: Array) -> Array:
        """The nearest point of Y."""
        return ravel_pytree(self.problem.y_set.project(self.unravel(y)))[0]

    def evaluate(self, y: Array) -> tuple[Array, Array]:
        """(g, R) at y."""
        g, R = oracles.lower_value_and_gradient(self.problem, self.x, self.unravel(y), self.batch)
        return g, ravel_pytree(R)[0]

    def residual(self, y: Array, R: Array, s: Array) -> Array:
        """The natural residual |y - Proj(y - s R)|."""
        return norm(y - self.project(y - s * R))


class _Search(NamedTuple):
    """Carry of the rounds."""

    y: Array
    R: Array
    """[n], at y."""
    s: Array
    """[], step size."""
    size: Array
    """[], the natural residual at y."""
    before: Array
    """[], the largest one so far."""
    rounds: Array
    status: Array
    idle: Array
    """[], rounds since the residual last was small and halved, or was not small."""
    near: Array
    """[], whether every Newton step so far was good: else the sketch is none of the Hessian here."""

    def scale(self) -> Array:
        """What `size` is measured by: |y| + s |R|."""
        return norm(self.y) + self.s * norm(self.R)


class _Accelerated(NamedTuple):
    """Carry of the accelerated steps: y, the point w ahead of it, theta, s; R at y."""

    y: Array
    w: Array
    theta: Array
    s: Array
    R: Array


def solve(
    problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree, settings: Settings | None = None
) -> ProjectedSolution:
    """The lower-level solution from the warm start y, which need not be feasible. Pure; for jit and vmap.

    CONVERGED: the natural residual is at most tol (|y| + s |R|) after a Newton step, or at most 100 eps times that,
    which is rounding error, and no longer halves. STALLED: it is at most sqrt(eps) times that, and has not halved for
    `PATIENCE` rounds.
    """
    settings = Settings() if settings is None else settings
    flat, unravel = ravel_pytree(y)
    eps = jnp.finfo(flat.dtype).eps
    level = _Level(problem, x, batch, unravel, 10 * eps if settings.tol is None else settings.tol)
    start = level.project(flat)
    sketch = _sketch(problem, x, unravel(start), batch)
    begin = _begin(level, start, sketch)
    end = lax.while_loop(
        lambda c: (c.status == Status.MAX_STEPS) & (c.rounds < settings.max_rounds),
        lambda c: _round(level, sketch, c),
        begin,
    )
    face = problem.y_set.face(unravel(end.y), unravel(end.R), end.s)
    noise = 1e3 * eps * end.scale()
    weak = (end.status == Status.CONVERGED) & (face.margin <= jnp.maximum(noise, 10 * end.size))
    status = jnp.where(weak, Status.WEAKLY_ACTIVE, end.status)
    kept = _trusted(sketch, end.near)
    return ProjectedSolution(unravel(end.y), end.size / end.s, end.rounds, status, face, end.R, kept)


def _begin(level: _Level, start: Array, sketch: Nystrom | None) -> _Search:
    """The search at a feasible point."""
    g, R = level.evaluate(start)
    s = 1 / _curvature(level, start, R, sketch)
    size = level.residual(start, R, s)
    status = jnp.where(jnp.isfinite(g) & jnp.isfinite(size), Status.MAX_STEPS, Status.NONFINITE)
    before = jnp.maximum(size, jnp.finfo(start.dtype).tiny)
    return _Search(start, R, s, size, before, jnp.array(0), status, jnp.array(0), jnp.array(True))


def _round(level: _Level, sketch: Nystrom | None, c: _Search) -> _Search:
    """A Newton step on the face, since a warm start needs no other; where it does not halve the natural residual,
    accelerated steps from y instead. Where these do not either, and the residual is no more than what rounding makes
    of it, that is the end; where it is larger, slow progress in flat directions: it is no sign of a solution.
    """
    newton = _newton_step(level, sketch, c)
    good = jnp.isfinite(newton.R).all() & (newton.size <= 0.5 * c.size)
    eps = jnp.finfo(c.y.dtype).eps
    small, least = c.size <= jnp.sqrt(eps) * c.scale(), c.size <= 100 * eps * c.scale()
    y, R, s = lax.cond(good, lambda: (newton.y, newton.R, c.s), lambda: _accelerated(level, c))
    size = jnp.where(good, newton.size, level.residual(y, R, s))
    scale = norm(y) + s * norm(R)
    stuck = small & ~good & (size > 0.5 * c.size)
    worse = stuck & ~(size <= c.size)
    idle = jnp.where(stuck, c.idle + 1, 0)
    size = jnp.where(worse, c.size, size)
    was = c.size <= level.tol * c.scale()  # so that a Newton step has nothing to halve, not even at 0
    solved = ((good | stuck | was) & (size <= level.tol * scale)) | (stuck & least)
    status = jnp.where(idle >= PATIENCE, Status.STALLED, Status.MAX_STEPS)
    status = jnp.where(solved, Status.CONVERGED, status)
    return _Search(
        y=jnp.where(worse, c.y, y),
        R=jnp.where(worse, c.R, R),
        s=s,
        size=size,
        before=jnp.maximum(c.before, c.size),
        rounds=c.rounds + 1,
        idle=idle,
        status=jnp.where(jnp.isfinite(size), status, Status.NONFINITE),
        near=c.near & (good | small),
    )


def _newton_step(level: _Level, sketch: Nystrom | None, c: _Search) -> _Search:
    """y <- Proj(y + d), P (H + D) P d = -P R on the face where a projected step ends; `c` with y, R, size there.

    By CG, to leave a third of the residual that is asked for.
    """
    problem, info = level.problem, jnp.finfo(c.y.dtype)
    base, R = c.y, c.R
    if problem.constrained_lower:
        base = level.project(c.y - c.s * c.R)
        R = level.evaluate(base)[1]
    face = problem.y_set.face(level.unravel(base), level.unravel(c.R), c.s)
    enough = level.tol * c.scale() / 3 / jnp.maximum(c.size, info.tiny)
    forcing = jnp.clip(jnp.maximum(c.size / c.before, enough), info.eps, 0.01)
    near = _trusted(sketch, c.near)
    d = tangent_solve(problem, level.x, level.unravel(base), level.batch, face, near)(-R, forcing)
    y = level.project(base + d)
    R = level.evaluate(y)[1]
    return c._replace(y=y, R=R, size=level.residual(y, R, c.s))


def _accelerated(level: _Level, c: _Search) -> tuple[Array, Array, Array]:
    """(y, R, s) after ROUND accelerated steps from y."""
    begin = _Accelerated(c.y, c.y, jnp.ones((), c.y.dtype), c.s, c.R)
    end = lax.fori_loop(0, ROUND, lambda _, at: _accelerate(level, at), begin)
    return end.y, end.R, end.s


def _accelerate(level: _Level, c: _Accelerated) -> _Accelerated:
    """One step of Beck and Teboulle, or half the step size where the quadratic model at w is not above g:

        y+ = Proj(w - s R(w)),    theta+ = (1 + (1 + 4 theta^2)^(1/2))/2,
        w+ = Proj(y+ + (theta - 1)/theta+ (y+ - y)),

    with theta+ = 1 and w+ = y+ where the step turns back, (w - y+)'(y+ - y) > 0.
    """
    eps = jnp.finfo(c.y.dtype).eps
    g, R = level.evaluate(c.w)
    trial = level.project(c.w - c.s * R)
    moved = trial - c.w
    g_trial, R_trial = level.evaluate(trial)
    above = g_trial <= g + R @ moved + moved @ moved / (2 * c.s) + 100 * eps * (1 + jnp.abs(g))
    ok = above & jnp.isfinite(R_trial).all()
    restart = (c.w - trial) @ (trial - c.y) > 0
    theta = jnp.where(restart, 1, (1 + jnp.sqrt(1 + 4 * c.theta**2)) / 2)
    ahead = trial + jnp.where(restart, 0, (c.theta - 1) / theta) * (trial - c.y)
    return _Accelerated(
        y=jnp.where(ok, trial, c.y),
        w=jnp.where(ok, level.project(ahead), c.y),
        theta=jnp.where(ok, theta, 1),
        s=jnp.where(ok, c.s, c.s / 2),
        R=jnp.where(ok, R_trial, c.R),
    )


def _trusted(sketch: Nystrom | None, near: Array) -> Nystrom | None:
    """The sketch, or one of nothing, so that CG goes without."""
    return jax.tree.map(lambda rows: jnp.where(near, rows, 0), sketch)


def _sketch(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> Nystrom | None:
    """Of H at y, for a large y and where D = 0."""
    flat = ravel_pytree(y)[0]
    given = oracles.lower_diagonal(problem, x, y, batch) is not None
    sized = DENSE_LIMIT < flat.size <= SKETCH_LIMIT and jnp.finfo(flat.dtype).bits >= 32
    if given or not sized or not problem.y_set.polyhedral:
        return None
    return nystrom.sketch(oracles.flat_operator(problem, x, y, batch), flat.size, flat.dtype)


def _curvature(level: _Level, y: Array, R: Array, sketch: Nystrom | None) -> Array:
    """1.1 L, L the largest curvature that ten power iterations find, or three from where the sketch saw the largest: an
    estimate that the line search corrects. Where g is linear, |R|/|y|: a step as long as y, since no other is too long.
    """
    hessian = oracles.flat_operator(level.problem, level.x, level.unravel(y), level.batch)

    def power(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        v, _ = carry
        w = hessian(v)
        size = norm(w)
        return w / jnp.where(size > 0, size, 1), size

    first, steps = jax.random.normal(jax.random.key(0), y.shape, y.dtype), 10
    if sketch is not None:
        seen = jnp.any(sketch.rows[-1] != 0)
        first, steps = jnp.where(seen, sketch.rows[-1], first), jnp.where(seen, 3, 10)
    _, L = lax.fori_loop(0, steps, power, (first / norm(first), jnp.zeros((), y.dtype)))
    pull = norm(R) / jnp.where(jnp.any(y != 0), norm(y), 1)
    return jnp.where(L > 0, 1.1 * L, jnp.where(pull > 0, pull, 1))
